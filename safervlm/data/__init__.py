"""Data modules: read images, tables and saved responses, and return questions and training examples."""
