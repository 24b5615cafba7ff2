"""The simulated studies of ``scripts/coverage.py``, and what the other coverage scripts share with them."""
