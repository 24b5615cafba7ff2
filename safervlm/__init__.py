"""Measure, judge and align the safety ethics of vision-language models."""

from safervlm import legacy, plugins

__version__ = "0.1.0"

legacy.install_old_names()
plugins.install_callbacks()
