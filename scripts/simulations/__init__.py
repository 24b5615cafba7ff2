"""The simulated studies of ``scripts/coverage.py``, and code shared with the other coverage scripts."""
