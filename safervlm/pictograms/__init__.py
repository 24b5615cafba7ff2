"""The embedded default: a small world of pictograms in the real formats."""
