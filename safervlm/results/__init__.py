"""From a run's records to scores: data frames, measures with their intervals, comparisons of runs."""
