"""Bounds on the size that a model's configuration states: it must match the existing weights.

A ``config.json`` of a few bytes can describe a model that uses all memory before its weights are read and compared.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from safervlm.errors import ArgumentError, UserError
from safervlm.io.reading import read_object
from safervlm.io.settings import flat

# Names of settings that count the parts of a model. A configuration creates lists of that length.
COUNT = re.compile(r"(^|[._])(num_labels|n_layers?|\w*(layers|blocks|experts)|depths?)(\.\d+)?$")
LARGEST_COUNT = 100_000
# Numbers that a byte of a weight file can store, at 1 bit each, with those of weights that are tied to others.
NUMBERS_PER_BYTE = 16
NUMBERS_OF_A_WEIGHT = 1_000  # added for each weight, for the memory of its module
ALLOWANCE = 2_000_000  # numbers of a model without any weights


def bounded_config(name: str, revision: str | None = None, argument: str = "vlm.model") -> PreTrainedConfig:
    """Reads the configuration of a model.

    Args:
        name: Folder of the model, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.
        argument: Name of the argument, for the error message.

    Raises:
        ArgumentError: The configuration has NaN as a number, or counts more layers, labels or the like than any model
            has.
        Exception: Transformers can't read it; see :func:`safervlm.vlm.weights.reading`.
    """
    try:
        raw = read_object(Path(str(cached_file(name, "config.json", revision=revision))), finite=False)
    except UserError:
        raw = {}  # transformers states what is wrong with it
    for key, value in flat(raw, lists=True):
        if isinstance(value, float) and isnan(value):
            raise ArgumentError(
                f"{argument}: the config.json of {name!r} has {key} NaN; give the config.json of its weights"
            )
        if COUNT.search(key) and isinstance(value, int) and value > LARGEST_COUNT:
            raise ArgumentError(
                f"{argument}: the config.json of {name!r} has {key} {value}, more than {LARGEST_COUNT:,}; give the "
                "config.json of its weights"
            )
    config: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return config


@contextmanager
def sized(name: str, files: list[Path], argument: str) -> Iterator[None]:
    """Context manager in which no model may be created that is much larger than its weight files.

    Args:
        name: Name of the model, for the error message.
        files: Its weight files; empty if they are unknown, for no bound.
        argument: Name of the argument, for the error message.

    Raises:
        ArgumentError: A model inside has more numbers than the files can contain.
    """
    there = sum(file.stat().st_size for file in files)
    left = NUMBERS_PER_BYTE * there + ALLOWANCE

    def count(module: nn.Module, parameter: str, value: nn.Parameter | None) -> None:
        nonlocal left
        left -= NUMBERS_OF_A_WEIGHT + (0 if value is None else value.numel())
        if left < 0:
            raise ArgumentError(
                f"{argument}: the config.json of {name!r} describes a larger model than its weights of {there:,} bytes "
                "can be; give the config.json of these weights"
            )

    hook = register_module_parameter_registration_hook(count) if files else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
