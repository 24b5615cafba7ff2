"""Presents scores as tables, plots, pages, workbooks and LaTeX."""
