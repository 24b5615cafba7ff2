"""Checks that a LoRA adapter's ``adapter_config.json`` agrees with its weight file.

PEFT scales an update by the configuration: a wrong rank or alpha would change the result without an error, or with one
that names the base model as the cause.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from safervlm.errors import ArgumentError

PREFIX = "base_model.model."
RANKED = re.compile(r"\.lora_(embedding_)?([AB])(\.weight)?$")  # names of LoRA's two matrices
FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")  # PEFT treats any text as true
# Kind of setting -> setting of the whole adapter.
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


def require_matching_settings(
    settings: Mapping[str, Any], state: Mapping[str, Tensor], config: str, weights: str
) -> None:
    """Rejects a LoRA adapter whose settings are of another type, or contradict the shapes or names of its weights.

    Adapters of other kinds are not checked here.

    Args:
        settings: Content of ``adapter_config.json``.
        state: The adapter's tensors.
        config: Argument and file of the settings, for the error message.
        weights: Name of the weight file, for the error message.

    Raises:
        ArgumentError: The message names the file, the key, and both values.
    """
    if settings["peft_type"] != "LORA":
        return
    for kind in PATTERNS:
        if not isinstance(patterns := settings.get(kind) or {}, dict):
            raise ArgumentError(
                f"{config}: {kind} must be an object of names and numbers, got {patterns!r:.80}; correct it"
            )
    for key, value in numbers_of(settings):
        whole = not key.startswith(("lora_alpha", "alpha"))
        number = isinstance(value, int) or (isinstance(value, float) and not whole)
        if isinstance(value, bool) or not number or (whole and value < 1):
            needed = "an integer of at least 1" if whole else "a number"
            raise ArgumentError(f"{config}: {key} must be {needed}, got {value!r:.80}; correct it")
        if value == 0 and key.startswith("alpha"):  # lora_alpha may be replaced by patterns
            raise ArgumentError(f"{config}: {key} is 0, so that the adapter changes nothing there; correct it")
    for key in FLAGS:
        if not isinstance(value := settings.get(key, False), bool | None):
            raise ArgumentError(f"{config}: {key} must be true or false, got {value!r:.80}; correct it")
    ranks = {
        key.removeprefix(PREFIX)[: found.start() - len(PREFIX)]: (key, value.shape[0])
        for key, value in state.items()
        if (found := RANKED.search(key)) and found[2] == "A" and value.ndim
    }
    for kind in PATTERNS:
        for pattern, value in (settings.get(kind) or {}).items():
            if ranks and not any(applies(pattern, module) for module in ranks):
                raise ArgumentError(
                    f"{config}: {kind} has {pattern!r}: {value}, but none of the {len(ranks)} modules in {weights} has "
                    f"this name, for example {min(ranks)}; correct or remove it"
                )
    stacks = bool(settings.get("target_parameters"))  # experts: the ranks of a stack are in one matrix
    for module, (key, rank) in ranks.items():
        pattern = next((each for each in settings.get("rank_pattern") or {} if applies(each, module)), None)
        given = settings.get("r", 8) if pattern is None else settings["rank_pattern"][pattern]
        if rank != given and not (stacks and rank % given == 0):
            name = "r" if pattern is None else f"rank_pattern[{pattern!r}]"
            raise ArgumentError(
                f"{config}: {name} is {given}, but {key} in {weights} has rank {rank}; use the two files of one adapter"
            )


def numbers_of(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Iterates over the settings that have to be numbers, with their names.

    Args:
        settings: Content of ``adapter_config.json``.

    Yields:
        ``r`` and ``lora_alpha``, if set, and the values of their patterns.
    """
    for kind, key in PATTERNS.items():
        if key in settings:
            yield key, settings[key]
        yield from ((f"{kind}[{pattern!r}]", value) for pattern, value in (settings.get(kind) or {}).items())


def applies(pattern: str, module: str) -> bool:
    """Returns whether a key of a pattern selects a module, as in PEFT.

    Args:
        pattern: Regular expression of the end of the module's name. It may be invalid.
        module: Full name.
    """
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return module.endswith(pattern)
