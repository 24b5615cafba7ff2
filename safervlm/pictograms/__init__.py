"""The pictogram world: a small, offline stand-in for the datasets, VLMs and judges, in the real file formats."""
