"""Scores as tables, plots, pages, workbooks and LaTeX."""
