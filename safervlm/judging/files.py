"""Finds the files of a judge: its weights and its configuration, local or on the Hub."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers.utils import cached_file

from safervlm.errors import ArgumentError, first_line

WEIGHTS = "model.safetensors"


def config_file(base: str) -> Path:
    """Returns the local file of a judge's configuration, downloaded if its base is on the Hub.

    Args:
        base: Folder, or name on the Hub.
    """
    return Path(cached_file(base, "config.json"))


def checkpoint_file(checkpoint: str) -> Path:
    """Returns the local file of a checkpoint's weights, downloaded if the checkpoint is on the Hub.

    Args:
        checkpoint: File, exported folder, or ``owner/name:file`` on the Hub.

    Raises:
        ArgumentError: There is no such file.
    """
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise ArgumentError(
                f"checkpoint: no {WEIGHTS} in the folder {checkpoint!r}; a state dict such as epoch_10.pt is named "
                "itself, with the folder of its configuration and tokenizer as base"
            )
        return path / WEIGHTS
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+):(.+)", checkpoint)
    if on_hub is None:
        raise ArgumentError(
            f"checkpoint: {checkpoint!r} doesn't exist; give a state dict (epoch_10.pt), a folder that fit exported, "
            "or owner/name:file on the Hub"
        )
    try:
        return Path(hf_hub_download(on_hub[1], on_hub[2]))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"checkpoint: {checkpoint!r} is not a file here and can't be loaded from the Hub ({first_line(error)}); "
            "try again, give a file or an exported folder, or train one: safervlm fit --config configs/judge.yaml"
        ) from error
