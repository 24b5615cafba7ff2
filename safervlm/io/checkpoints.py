"""Content of a checkpoint: read without running code, and checked before a trainer loads it.

Lightning does not check the content: it resumes without the steps made so far if the progress is missing, keeps a newly
initialised weight if a trained one is missing, and raises nearly every kind of exception for a value of another type.
"""

import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safervlm.errors import RecordError, UserError, first_line
from safervlm.finite import all_finite

REMEDY = "take an earlier copy, or delete it and train again"
# Parts that Lightning writes -> their types; without the first ones a run can't be resumed.
NEEDED = {
    "state_dict": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "pytorch-lightning_version": str,
}
TYPES = NEEDED | {"callbacks": dict, "trained": list}


def require_valid_checkpoint(path: Path, argument: str) -> None:
    """Rejects a file that is not a checkpoint of a training run, or a damaged one: parts, their types, finite numbers.

    Args:
        path: Checkpoint file, a zip archive; it is mapped into memory, not copied.
        argument: Argument that names it, for the error message.

    Raises:
        RecordError: The message names the file and the part.
        Exception: ``torch.load`` can't read the file.
    """
    named = f"{argument}: {str(path)!r}"
    content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise RecordError(f"{named} is not a checkpoint of a training run; name its last.ckpt")
    for part, kind in TYPES.items():
        if part in NEEDED and (part not in content or (part == "optimizer_states" and content[part] == [])):
            raise RecordError(f"{named} lacks its part {part}, so that no run can be resumed from it; {REMEDY}")
        if not isinstance(content.get(part, kind()), kind):
            found = type(content[part]).__name__
            raise RecordError(f"{named} is damaged ({part} is a {found}, not a {kind.__name__}); {REMEDY}")
    for name, value in content["state_dict"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RecordError(f"{named} is damaged (its weight {name!r:.200} is not a tensor); {REMEDY}")
    for part in ("state_dict", "optimizer_states"):
        if not all_finite([each for each in tensors_in(content[part]) if each.is_floating_point()]):
            raise RecordError(f"{named}: its {part} has numbers that are not finite (NaN or infinite); {REMEDY}")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterates over the tensors in nested dictionaries and lists.

    Args:
        value: Value of any type.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def require_matching_weights(checkpoint: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Rejects a checkpoint whose trained weights are not exactly those of a module; loading it would not report this.

    Args:
        checkpoint: Loaded checkpoint, with the names of the trained weights.
        state: Name -> trained weight of the module.

    Raises:
        RecordError: No objective wrote the checkpoint; or a weight is missing, unexpected, or of another shape or type.
    """
    if not isinstance(checkpoint.get("trained"), list):
        raise RecordError(
            "--ckpt_path: the checkpoint was not written by an objective; name the last.ckpt of a fit's run folder"
        )
    there = checkpoint.get("state_dict", {})  # empty for DeepSpeed, which stores the weights outside of it
    wrong = set(map(str, checkpoint["trained"])) ^ set(state)
    wrong |= set(state) - set(there) if there else set()
    wrong |= {
        name
        for name, value in there.items()
        if name in state and (value.shape != state[name].shape or not value.is_floating_point())
    }
    if wrong:
        raise RecordError(
            f"--ckpt_path: the checkpoint is of another adapter or objective: {len(wrong)} weights don't fit, for "
            f"example {min(wrong)}; resume with the settings that it was made with"
        )


def unloadable(error: BaseException, path: str) -> RecordError | None:
    """Returns the one-line error for an exception that Lightning raised while it restored a checkpoint, else None.

    Args:
        error: Exception with which a command ended.
        path: Checkpoint of the command.
    """
    frames = traceback.extract_tb(error.__traceback__)
    restoring = any(
        frame.filename.endswith("checkpoint_connector.py") and frame.name.lstrip("_").startswith(("restore", "resume"))
        for frame in frames
    )
    if not restoring or isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
        return None
    return RecordError(
        f"--ckpt_path: {path!r} can't be loaded ({type(error).__name__}: {first_line(error):.300}); name the last.ckpt "
        "of a run with this strategy and these versions of packages"
    )
