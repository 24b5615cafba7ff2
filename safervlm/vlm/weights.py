"""Validation of model weights: complete, of the right shapes, finite; otherwise a one-line error.

Used by all loaders: VLMs, their adapters, and judges.
"""

import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from safervlm.errors import ArgumentError, UserError, first_line
from safervlm.hashing import fingerprint_of_files
from safervlm.io.boundary import warn
from safervlm.io.reading import read_object
from safervlm.vlm.sizes import sized
from safervlm.vlm.stored import require_floating_point, require_unconverted_weights, type_name, weight_files

# Files of a model folder that affect its responses, besides the weights.
DECIDES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("chat_template.*", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),  # for tokenizers without tokenizer.json
)
# Fingerprints by the paths, sizes and times of the files: gigabytes are hashed once, and by one process of a run
# (:class:`safervlm.manifest.RunManifest`), as long as the files are unchanged.
HASHES: dict[tuple[tuple[str, int, int], ...], str] = {}
# Names of adapter weights in PEFT. A model that ignores them would be measured without its adapter.
ADAPTER_KEYS = re.compile(r"\b(lora_\w+|base_layer|modules_to_save|original_module|ia3_l|hada_\w+|oft_\w+)\b")


def is_panic(error: BaseException) -> bool:
    """Returns whether an exception is a panic of a Rust library, which is not a subclass of ``Exception``.

    Args:
        error: The exception.
    """
    return type(error).__name__ == "PanicException"


@contextmanager
def reading(name: str, argument: str = "vlm.model") -> Iterator[None]:
    """Context manager that turns any exception of a library that reads a model into a one-line error.

    A damaged or foreign file makes transformers, tokenizers and safetensors raise nearly every kind of exception.

    Args:
        name: Folder of the model, or its name on the Hub.
        argument: Name of the argument, for the error message.

    Raises:
        ArgumentError: Replaces the library's exception. Out-of-memory errors are not the model's fault, and are passed
            through.
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
        if "torchvision" in str(error).lower():
            remedy = "pip install 'safervlm[vision]', or name another model"
        elif isinstance(error, ImportError):
            remedy = "install it, or name another model"
        if "trust_remote_code" in str(error):
            raise ArgumentError(
                f"{argument}: {name!r} comes with its own Python code (auto_map in its config.json or tokenizer_config."
                "json), which is not run; name a model that the library knows"
            ) from error
        reason = first_line(error)
        if type(error) in (KeyError, IndexError, AttributeError, TypeError, UnicodeDecodeError, RecursionError):
            reason = f"{type(error).__name__}: {reason}"
        raise ArgumentError(f"{argument}: {name!r} can't be read ({reason}); {remedy}") from error


@contextmanager
def without_report() -> Iterator[None]:
    """Context manager that silences transformers' table of missing weights, which :func:`checked` reports."""
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
    """Loads a model with ``from_pretrained`` and validates its weights; code in its folder is not run.

    Args:
        kind: A class of transformers with ``from_pretrained``.
        name: Folder of the model, or its name on the Hub.
        argument: Name of the argument, for error messages.
        whole: Whether the folder should contain exactly this model. If False, unused weights are expected, for example
            where only the vision tower of a CLIP is loaded.
        **settings: Keyword arguments of ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArgumentError: The model can't be read; its configuration describes a much larger one; or a weight is missing,
            has another shape, or is not finite.
    """
    with reading(name, argument), without_report(), sized(name, weight_files(Path(name)), argument):
        model, found = kind.from_pretrained(
            name, **settings, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    return checked(model, found, name, argument, whole)


def checked(model: PreTrainedModel, found: Mapping[str, Any], name: str, argument: str, whole: bool) -> PreTrainedModel:
    """Validates that the folder of a loaded model provided every weight.

    Weights that transformers itself doesn't expect in a file (tied weights, computed buffers) don't count as missing.
    Unused weights in the file cause a warning.

    Args:
        model: The loaded model.
        found: Loading information of ``from_pretrained`` (``output_loading_info``).
        name: Folder of the model, or its name on the Hub.
        argument: Name of the argument, for error messages.
        whole: Whether to warn about unused weights; see :func:`load_model`.

    Returns:
        The same model.

    Raises:
        ArgumentError: A weight is missing, has another shape, or is not finite; it is stored as integers, or twice; the
            folder contains adapter weights, or those of more layers than the configuration counts; or loading reported
            an error.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ArgumentError(
            f"{argument}: {name!r} contains an adapter (adapter_config.json), not a model; name its base model there "
            "and the adapter as vlm.adapter"
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
            f"{argument}: {name!r} contains an adapter's weights besides its own, for example {adapters[0]}, which "
            "would have no effect; merge the adapter (merge_and_unload), or give it as vlm.adapter"
        )
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if beyond := [key for key in unread if any(key[: part.start()] in lists for part in re.finditer(r"\.\d+\.", key))]:
        raise ArgumentError(
            f"{argument}: {name!r} contains {len(beyond)} weights of layers that its config.json does not count, for "
            f"example {beyond[0]}; give the config.json of these weights"
        )
    if unread and whole:
        warn(
            f"{argument}: {name!r} contains {len(unread)} weights that {type(model).__name__} has no place for, for "
            f"example {unread[0]}; they are not used"
        )
    # Buffers are not checked: some (rotary frequencies) are computed after loading, and uninitialised until then.
    require_finite_weights_in(model.named_parameters(), f"{argument}: {name!r}")
    with reading(name, argument):
        require_unconverted_weights(model, Path(name), f"{argument}: {name!r}")
    return model


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Returns the name of the first tensor with NaN or infinite values; None if there is none.

    Args:
        tensors: Names and tensors. Integer tensors and tensors without storage are skipped.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # 8-bit: no aminmax
            low, high = torch.aminmax(values)  # both are NaN if any value is; nothing is copied
            if not torch.isfinite(torch.stack([low, high]).float()).all():
                return name
    return None


def require_finite_weights_in(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Rejects weights with NaN or infinite values.

    Args:
        tensors: Names and tensors.
        what: Owner of the weights, beginning with the argument's name, for the error message.

    Raises:
        ArgumentError: A value is not finite.
    """
    if (name := not_finite(tensors)) is not None:
        raise ArgumentError(f"{what} has NaN or infinite numbers in {name}; its file is damaged, download it again")


def require_finite_floats(state: Mapping[str, Tensor], what: str) -> None:
    """Rejects weights as they are read from a file, if they are not finite floating-point numbers.

    Args:
        state: Name -> tensor.
        what: Owner of the weights, beginning with the argument's name, for the error message.

    Raises:
        ArgumentError: A tensor is of another type, or a value is not finite.
    """
    require_floating_point(((name, type_name(tensor)) for name, tensor in state.items()), what)
    require_finite_weights_in(state.items(), what)


def read_tensors(file: Path, argument: str) -> dict[str, Tensor]:
    """Loads the tensors of a weight file, without running code from it.

    Args:
        file: A ``.safetensors`` file, or a plain state dict saved by ``torch.save``.
        argument: Name of the argument, for error messages.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        ArgumentError: The file is damaged, or is not a mapping of names to tensors.
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
            f"{argument}: {str(file)!r} is not a plain state dict ({first_line(error)}); download the file again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ArgumentError(f"{argument}: {str(file)!r} is not a plain state dict: names with tensors")
    return state


def model_config(folder: Path, argument: str = "vlm.model") -> dict[str, Any]:
    """Returns the content of a model's ``config.json``.

    Args:
        folder: Folder of the model.
        argument: Name of the argument, for error messages.

    Raises:
        ArgumentError: The file is missing, damaged, or not a JSON object.
    """
    try:
        return read_object(folder / "config.json", "give a folder that save_pretrained wrote")
    except UserError as error:
        raise ArgumentError(f"{argument}: {error}") from None


def weights_fingerprint(name: str, revision: str | None, argument: str = "vlm.model") -> str | None:
    """Returns a fingerprint of a model's weights and of the other files in its folder that affect its responses.

    Args:
        name: Folder of the model, whose files are hashed, or its name on the Hub, whose commit is returned.
        revision: Branch, tag or commit on the Hub.
        argument: Name of the argument, for error messages.

    Returns:
        The hash or the commit; None if the commit is unknown.
    """
    folder = Path(name)
    if folder.is_dir():
        with reading(name, argument):
            found = [file for kind in DECIDES for file in sorted(folder.glob(kind))]
            files = [*dict.fromkeys(found), *weight_files(folder)]  # tokenizer.model matches two patterns
            states = [file.stat() for file in files]
            now = tuple((str(f), each.st_size, each.st_mtime_ns) for f, each in zip(files, states, strict=True))
            if now not in HASHES:
                HASHES[now] = fingerprint_of_files(files)
            return HASHES[now]
    with reading(name, argument):
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
