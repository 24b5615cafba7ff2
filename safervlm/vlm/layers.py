"""Weights of a language model that LoRA can adapt: where they are in the module tree, and of which kind; dropout.

A language model is a stack of blocks. Its weights are the matrices in the blocks; embeddings, the head, norms and
biases are not counted. Nothing here depends on the name of a model family.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
ATTENTION, LINEAR_ATTENTION, MLP = "attention", "linear attention", "MLP"
EXPERTS, ROUTER, GATE = "experts", "router", "gates"


@dataclass(frozen=True)
class Weight:
    """A matrix of the language model, or a stack of matrices.

    Attributes:
        module: Full name of the module that owns it.
        parameter: Its name in the module.
        kind: ``attention``, ``linear attention``, ``MLP``, ``experts``, ``router`` or ``gates``.
        size: Number of values.
        linear: Whether the module is a linear layer, which LoRA adapts as a module. A stack of experts is adapted as a
            parameter instead.
        outputs: Number of outputs of a linear layer; 0 for other modules.
    """

    module: str
    parameter: str
    kind: str
    size: int
    linear: bool
    outputs: int


def language_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns the blocks of the language model: full name -> module, or the whole decoder if it has no list of blocks.

    They are the list with as many modules as the text configuration has layers. If there are several, the one least
    deep in the decoder is used, outside the encoders of images and sounds.

    Args:
        model: A vision-language model.
    """
    decoder = model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    elsewhere: set[int] = set()
    for modality in ("image", "audio"):
        encoder = model.get_encoder(modality=modality)
        # One of the model's own modules represents an encoder that transformers does not know.
        if encoder is not None and encoder not in (model, model.base_model, decoder):
            elsewhere |= {id(module) for module in encoder.modules()}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) not in elsewhere
    ]
    if not lists:
        return {names[id(decoder)]: decoder}
    stack = min(lists, key=lambda module: names[id(module)].count("."))  # the first of equally deep ones
    return {names[id(block)]: block for block in stack}


def language_weights(model: PreTrainedModel) -> list[Weight]:
    """Returns the matrices in the blocks of the language model, in the order of the module tree.

    Args:
        model: A vision-language model, without adapters.
    """
    found: list[Weight] = []
    for name, block in language_blocks(model).items():
        found += _weights(name, block)
    return found


def _weights(name: str, block: nn.Module) -> Iterator[Weight]:
    stacks = _experts(block)
    recurrent = {
        child
        for child, module in block.named_children()
        if any(isinstance(inner, nn.Conv1d) or hasattr(inner, "A_log") for inner in module.modules())
    }
    for place, module in block.named_modules():
        if isinstance(module, nn.Embedding | CONVOLUTIONS) or place.endswith("norm"):  # norms per head have two axes
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if value.ndim < 2 or parameter.endswith("bias"):
                continue
            linear = isinstance(module, nn.Linear) and parameter == "weight"
            outputs = module.out_features if isinstance(module, nn.Linear) else 0
            # A quantised matrix is stored in another shape.
            size = module.in_features * module.out_features if isinstance(module, nn.Linear) else value.numel()
            kind = _kind(place, value, stacks, recurrent)
            yield Weight(f"{name}.{place}".strip("."), parameter, kind, size, linear, outputs)


def _experts(block: nn.Module) -> dict[str, int]:
    """Returns the modules of a block that contain experts, by name, each with the number of experts."""
    found: dict[str, int] = {}
    for place, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            shapes = [[(n, tuple(p.shape)) for n, p in each.named_parameters()] for each in module]
            if shapes[0] and all(each == shapes[0] for each in shapes):
                found[place] = len(module)
        elif not isinstance(module, CONVOLUTIONS):
            counts = {value.shape[0] for value in _own(module) if value.ndim == 3 and value.is_floating_point()}
            if len(counts) == 1 and min(counts) > 1:
                found[place] = min(counts)
    return found


def _own(module: nn.Module) -> list[Any]:
    return [value for _, value in module.named_parameters(recurse=False)]


def _kind(place: str, value: Any, stacks: dict[str, int], recurrent: set[str]) -> str:
    if any(place == stack or place.startswith(f"{stack}.") for stack in stacks):
        return EXPERTS
    if place.split(".")[0] in recurrent:
        return LINEAR_ATTENTION
    if re.search(r"attn|attention", place):
        return ATTENTION
    # A router has one output per expert. It is next to the experts, or a few levels deeper.
    for stack, count in stacks.items():
        parent = stack.rpartition(".")[0]
        if count in value.shape and (not parent or place.startswith(f"{parent}.")):
            return ROUTER
    return GATE if place.endswith("gate") else MLP


def switch_off_dropout(config: Any) -> None:
    """Sets every dropout probability of a configuration to 0, including those of nested configurations.

    Args:
        config: A configuration of transformers; changed in place.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            switch_off_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Context manager in which all modules of a model are in evaluation mode, without dropout.

    Args:
        model: The model; the previous mode of each module is restored afterwards.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
