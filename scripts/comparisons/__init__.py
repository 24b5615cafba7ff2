"""The comparisons of ``scripts/benchmark.py``, one file each, and their shared code."""
