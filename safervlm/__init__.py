"""Measure, judge and align the safety ethics of vision-language models."""

__version__ = "0.1.0"
