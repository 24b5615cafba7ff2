"""Models whose Python code comes with their weights."""
