"""What a model's weights have to be: complete, of the right shapes, finite; and what is said where they aren't.

Every loader uses it: the VLMs, their adapters and the judges.
"""

import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from safervlm.errors import ArgumentError, UserError, first_line
from safervlm.hashing import fingerprint
from safervlm.io.boundary import warn
from safervlm.io.reading import read_object

# What of a model's folder decides an answer, besides its weights.
DECIDES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("chat_template.*", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),  # of tokenizers that have no tokenizer.json
)
# Names that PEFT gives to the weights of an adapter: a model that ignores them is measured without its adapter.
ADAPTER_KEYS = re.compile(r"\b(lora_\w+|base_layer|modules_to_save|original_module|ia3_l|hada_\w+|oft_\w+)\b")


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has panicked: its exception is no ``Exception``."""
    return type(error).__name__ == "PanicException"


@contextmanager
def reading(name: str, argument: str = "vlm.model") -> Iterator[None]:
    """Within it, whatever a library raises about a model that it can't read becomes one line.

    A damaged or foreign file makes transformers, tokenizers and safetensors raise nearly every kind of exception.

    Args:
        name: the model's folder, or its name on the Hub.
        argument: that names it.

    Raises:
        ArgumentError: in place of the library's exception. Running out of memory is not the model's fault, and passes.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        remedy = "give a folder that save_pretrained wrote, or a name on the Hugging Face Hub"
        if isinstance(error, OSError):
            remedy += " (`hf auth login` for a gated model)"
        if isinstance(error, ImportError):
            remedy = "install it, or name another model"
        if "trust_remote_code" in str(error):
            raise ArgumentError(
                f"{argument}: {name!r} brings Python code of its own (auto_map in its config.json or tokenizer_config."
                "json), which is not run; name a model that the library knows"
            ) from error
        reason = first_line(error)
        if type(error) in (KeyError, IndexError, AttributeError, TypeError, UnicodeDecodeError, RecursionError):
            reason = f"{type(error).__name__}: {reason}"
        raise ArgumentError(f"{argument}: {name!r} can't be read ({reason}); {remedy}") from error


@contextmanager
def without_report() -> Iterator[None]:
    """Within it, transformers doesn't print its table of missing weights: :func:`checked` says it in one line."""
    library = logging.getLogger("transformers.modeling_utils")

    def nothing(record: logging.LogRecord) -> bool:
        return False

    library.addFilter(nothing)
    try:
        yield
    finally:
        library.removeFilter(nothing)


def load_model(
    kind: Any, name: str, argument: str = "vlm.model", whole: bool = True, **settings: Any
) -> PreTrainedModel:
    """``kind.from_pretrained``, for a model that has to be complete; code that its folder brings is not run.

    Args:
        kind: a class of transformers with ``from_pretrained``.
        name: the model's folder, or its name on the Hub.
        argument: that names it.
        whole: the folder is expected to hold this model and no more; otherwise weights that are not read are normal,
            as where the vision tower alone of a CLIP is read.
        settings: of ``from_pretrained``.

    Raises:
        ArgumentError: it can't be read; a weight is missing, has another shape, or is not finite.
    """
    with reading(name, argument), without_report():
        model, found = kind.from_pretrained(
            name, **settings, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    return checked(model, found, name, argument, whole)


def checked(model: PreTrainedModel, found: Mapping[str, Any], name: str, argument: str, whole: bool) -> PreTrainedModel:
    """A model as it was loaded, if its folder provides every weight.

    Weights that transformers itself doesn't expect in a file (tied weights, buffers that the model computes) are not
    among the missing ones. Weights in the file that the model has no place for are named in a warning.

    Args:
        model: the loaded model.
        found: what ``from_pretrained`` gives with ``output_loading_info``.
        name: the model's folder, or its name on the Hub.
        argument: that names it.
        whole: see :func:`load_model`.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ArgumentError(
            f"{argument}: {name!r} holds an adapter (adapter_config.json), not a model; name its base model there and "
            "the adapter as vlm.adapter"
        )
    if missing := found["missing_keys"]:
        raise ArgumentError(
            f"{argument}: {name!r} lacks {len(missing)} weights, for example {min(missing)}, which would be random "
            "numbers; give the whole model"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        key, there, needed = mismatched[0]
        raise ArgumentError(
            f"{argument}: {len(mismatched)} weights of {name!r} have another shape than its config.json says, for "
            f"example {key}: {tuple(there)} there, {tuple(needed)} needed; give the config.json of these weights"
        )
    if errors := found.get("error_msgs"):
        raise ArgumentError(f"{argument}: {name!r} can't be read ({str(errors[0]).strip().splitlines()[0]})")
    unread = sorted(found["unexpected_keys"])
    if adapters := [key for key in unread if ADAPTER_KEYS.search(key)]:
        raise ArgumentError(
            f"{argument}: {name!r} holds an adapter's weights beside its own, for example {adapters[0]}, which would "
            "have no effect; merge the adapter (merge_and_unload), or give it as vlm.adapter"
        )
    if unread and whole:
        warn(
            f"{argument}: {name!r} holds {len(unread)} weights that {type(model).__name__} has no place for, for "
            f"example {unread[0]}; they are not used"
        )
    # Not the buffers: some (rotary frequencies) are computed after loading, and hold anything until then.
    must_be_finite(model.named_parameters(), f"{argument}: {name!r}")
    return model


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity; None if there is none.

    Args:
        tensors: names and tensors; those of whole numbers and those without storage are passed over.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # 8 bits have no aminmax
            low, high = torch.aminmax(values)  # both are NaN where one number is; nothing is copied
            if not torch.isfinite(torch.stack([low, high]).float()).all():
                return name
    return None


def must_be_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Rejects NaN and infinities in weights.

    Args:
        tensors: names and tensors.
        what: has them, beginning with the argument.
    """
    if (name := not_finite(tensors)) is not None:
        raise ArgumentError(f"{what} holds NaN or infinite numbers in {name}; its file is damaged, get it again")


def read_tensors(file: Path, argument: str) -> dict[str, Tensor]:
    """The tensors in a file of weights, which is never trusted to run code.

    Args:
        file: a ``.safetensors``, or what ``torch.save`` made of a plain state dict.
        argument: that names it.

    Raises:
        ArgumentError: the file is damaged, or holds anything but names with tensors.
    """
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ArgumentError(
            f"{argument}: {str(file)!r} is not a plain state dict ({first_line(error)}); get the file again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ArgumentError(f"{argument}: {str(file)!r} is not a plain state dict: names with tensors")
    return state


def model_config(folder: Path, argument: str = "vlm.model") -> dict[str, Any]:
    """The ``config.json`` of a model's folder.

    Args:
        folder: of the model.
        argument: that names it.

    Raises:
        ArgumentError: it is missing, damaged, or no JSON object.
    """
    try:
        return read_object(folder / "config.json", "give a folder that save_pretrained wrote")
    except UserError as error:
        raise ArgumentError(f"{argument}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: those that transformers prefers, where there are two kinds."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


@lru_cache(maxsize=64)
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    return fingerprint(*(path for path, _, _ in files))


def weights_fingerprint(name: str, revision: str | None, argument: str = "vlm.model") -> str | None:
    """What tells a model's weights, and what else in its folder decides an answer, from others under the same name.

    Args:
        name: a folder, whose files are hashed, or a name on the Hub, whose commit is returned.
        revision: on the Hub.
        argument: that names it.
    """
    folder = Path(name)
    if folder.is_dir():
        with reading(name, argument):
            found = [file for kind in DECIDES for file in sorted(folder.glob(kind))]
            files = [*dict.fromkeys(found), *weight_files(folder)]  # tokenizer.model is found twice
            # Gigabytes are hashed once a process, as long as the files stay as they are.
            return _hash(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    with reading(name, argument):
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
