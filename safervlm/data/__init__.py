"""The data: folders in, questions and examples out."""
