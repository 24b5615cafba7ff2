"""Intervals, differences and diversity: functions of arrays, which know nothing of runs or models."""
