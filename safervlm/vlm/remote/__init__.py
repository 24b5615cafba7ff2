"""Models whose code comes with their weights."""
