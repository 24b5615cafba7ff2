"""Intervals, differences and diversity: functions of arrays, independent of runs and models."""
