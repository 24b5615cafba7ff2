"""Merges the adapter of a model into its weights, and writes the merged model as a folder of the Hub."""

import json
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from safervlm.errors import ArgumentError
from safervlm.io.reading import read_object
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.lora import PEFT_NAMES, switched
from safervlm.vlm.weights import reading

# Files of a model's folder that are not copied with the merged weights: other weights, code, and the model card.
LEFT_OUT = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.index.json"),
    *("*.py", "README.md", "adapter_config.json", "safervlm.json", ".*"),
)


@torch.no_grad()
def merge_adapter(vlm: LocalVLM) -> None:
    """Adds the policy adapter to the weights of a loaded model; afterwards the model has no adapter.

    The sum is computed in float64 and rounded once to the data type of the weights.

    Args:
        vlm: Loaded with an adapter.

    Raises:
        ArgumentError: The adapter is of a kind that is not plain LoRA, it changes one of two layers that share their
            weights, or the weights are quantised.
        TypeError: The VLM was loaded without an adapter.
    """
    if not isinstance(vlm.model, PeftModel):
        raise TypeError("there is no adapter to merge: the VLM was loaded without one")
    if getattr(vlm.base.config, "quantization_config", None) is not None:
        raise ArgumentError(
            f"run: the weights of {vlm.name!r} are quantised, so the adapter's update can't be added; name a run "
            "on the unquantised model"
        )
    layers = switched(vlm.model)
    _must_share_nothing(layers, vlm.base)
    for layer in layers:
        for weight, update in _updates(layer):
            weight.copy_((weight.double() + update).to(weight.dtype))
    vlm.model = vlm.model.unload()
    vlm.eval()


def _must_share_nothing(layers: Sequence[nn.Module], model: nn.Module) -> None:
    """Rejects adapted layers that share weights with another layer, for example a head with the embedding."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            owners.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    for weight in (weight for layer in layers for weight in layer.parameters()):
        if len(names := owners[id(weight)]) > 1:
            raise ArgumentError(
                f"run: its adapter changes one of {' and '.join(names)}, which have the same weights (tie_word_"
                "embeddings), so merging would change both; serve the base model with its adapter"
            )


def _updates(layer: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the weight of each matrix that a layer adapts, and its update in float64; one expert at a time."""
    (name,) = PEFT_NAMES["policy"]
    plain = isinstance(layer, LoraLayer) and name in layer.lora_A and not any(layer.use_dora.values())
    if not plain or any(layer.lora_bias.values()):  # type: ignore[operator]
        raise ArgumentError(f"run: its adapter has a {type(layer).__name__} that is not plain LoRA; merge it with PEFT")
    assert isinstance(layer, LoraLayer)  # noqa: S101 (checked above; for the type checker)
    first, second = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    scale = layer.scaling[name]
    base: Any = layer.get_base_layer()
    if not isinstance(layer, ParamWrapper):
        yield base.weight, scale * (second @ first)
        return
    stack, count = layer.get_param(), layer.num_experts
    transposed = getattr(base, "is_transposed", False)  # PEFT uses it, too; the shapes may be square
    first = first.reshape(count, -1, first.shape[-1])
    second = second.reshape(second.shape[0], -1, count)
    for number in range(count):
        update = scale * (second[:, :, number] @ first[number])
        yield stack[number] if stack.ndim > 2 else stack, update.T if transposed else update


def write_merged(vlm: LocalVLM, folder: Path, shard_size: str) -> None:
    """Writes the weights of a model, and the other files of the folder that it was loaded from.

    Args:
        vlm: Loaded, without an adapter.
        folder: Existing empty folder.
        shard_size: Largest size of a weight file, such as ``5GB``.
    """
    vlm.base.save_pretrained(folder, max_shard_size=shard_size)
    # Loading has changed the configuration (no dropout, no generation settings): the original's files are kept.
    with reading(vlm.name):
        there = Path(vlm.name)
        if not there.is_dir():
            there = Path(snapshot_download(vlm.name, revision=vlm.revision, ignore_patterns=list(LEFT_OUT)))
        copy_others(there, folder)
    config = folder / "config.json"
    named = str(vlm.dtype).removeprefix("torch.")
    config.write_text(json.dumps(_with_dtype(read_object(config), named), indent=2), "utf-8", newline="\n")


def copy_others(source: Path, folder: Path) -> None:
    """Copies the files of a model's folder other than weights, code and model card, as files that can be written.

    Args:
        source: Folder of the base model, which may be read-only.
        folder: Existing folder to copy to.
    """
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        if file.is_file() and not any(fnmatch(part, left) for part in inside.parts for left in LEFT_OUT):
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / inside)


def _with_dtype(config: Any, named: str) -> Any:
    if not isinstance(config, dict):
        return config
    kinds = ("dtype", "torch_dtype")
    return {key: named if key in kinds and value else _with_dtype(value, named) for key, value in config.items()}
