"""What the weight files of a model store: names and number types, read without the numbers."""

import zipfile
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from safervlm.errors import ArgumentError
from safervlm.io.reading import read_object

WHOLE = ("model.safetensors", "pytorch_model.bin")  # each may be divided into several files, with an index


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of a model: safetensors if there are any, otherwise PyTorch files.

    Args:
        folder: Folder of the model.
    """
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def files_read(folder: Path) -> list[Path]:
    """Returns those weight files of a model that the library reads: one, or those that an index names.

    Args:
        folder: Folder of the model.
    """
    files = weight_files(folder)
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            places = read_object(index).get("weight_map")
            named = set(places.values()) if isinstance(places, Mapping) else set()
            return [file for file in files if file.name in named]
    return files


def stored_types(file: Path) -> dict[str, str]:
    """Returns the number type of each tensor of a weight file, by the tensor's name, such as F32 or I64.

    Args:
        file: A ``.safetensors`` file, or a plain state dict saved by ``torch.save``.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    state = torch.load(file, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(file))
    return {name: type_name(value) for name, value in state.items()}


def type_name(tensor: Tensor) -> str:
    """Returns the name of a tensor's number type, F32 for any type of real numbers.

    Args:
        tensor: The tensor.
    """
    return "F32" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def require_floating_point(types: Iterable[tuple[str, str]], what: str) -> None:
    """Rejects weights stored as integers, truth values or complex numbers: converted, they would be other numbers.

    Args:
        types: Names of tensors and their types, see :func:`stored_types`.
        what: Owner of the weights, beginning with the argument's name, for the error message.

    Raises:
        ArgumentError: A tensor is stored so.
    """
    for name, kind in types:
        if not kind.startswith(("F", "BF")):
            raise ArgumentError(f"{what} stores {name} as {kind}, not as floating-point numbers; get its weights again")


def require_unconverted_weights(model: PreTrainedModel, folder: Path, what: str) -> None:
    """Rejects weight files whose numbers the library would convert or choose without a message.

    Args:
        model: The loaded model. One that is quantised by its configuration may store integers.
        folder: Its folder. Nothing is checked if it doesn't exist, as for a model of the Hub.
        what: Owner of the weights, beginning with the argument's name, for the error message.

    Raises:
        ArgumentError: A weight is stored as integers, or twice in the files that the index names.
    """
    last_parts = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    last_parts -= {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    read: dict[str, dict[str, str]] = {}
    for file in files_read(folder):
        types = read[file.name] = stored_types(file)
        if getattr(model.config, "quantization_config", None) is None:
            require_floating_point(((n, kind) for n, kind in types.items() if n.rpartition(".")[2] in last_parts), what)
    for (one, names), (other, others) in combinations(read.items(), 2):
        if twice := names.keys() & others.keys():
            raise ArgumentError(f"{what} stores {min(twice)} twice, in {one} and in {other}; get these files again")
