"""Labels of people for a sample of a run's responses: the sample, the labels, sheets, and agreement."""
