"""LoRA: its settings, where it goes, and which adapter is at work.

PEFT's own ``set_adapter`` and ``disable_adapter`` also change ``requires_grad``: a policy forward, then
``set_adapter("value")``, then one joint backward leaves the policy without a gradient, and says nothing. Here
``requires_grad`` is set once, and switching changes nothing but the adapter that the layers read.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from safervlm.errors import ArgumentError
from safervlm.ranges import in_range
from safervlm.vlm.compat import checkpoint_activations

Adapter = Literal["policy", "value", "reference"]
# PEFT writes the adapter called "default" into the folder itself, and others into sub-folders of it.
PEFT_NAMES: dict[Adapter, list[str]] = {"policy": ["default"], "value": ["value"], "reference": []}

# Bare names such as q_proj, or PEFT's "all-linear", would also hit the vision tower.
LANGUAGE_LAYERS = r".*\b(language_model|text_model)\.((model|decoder)\.)*layers\.\d+\.(\w+\.)*(\w+_proj|fc[12])"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv:2106.09685) of the language model's linear layers; the defaults are the paper's.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input of the update while training.
        target_modules: regular expression that a module's whole name has to match; the default is every linear layer
            of the language model and none of the vision tower.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    target_modules: str = LANGUAGE_LAYERS

    def __post_init__(self) -> None:
        """Refuses values that PEFT would only trip over later."""
        in_range("lora", least=1, r=self.r, alpha=self.alpha)
        in_range("lora", least=0, below=1, dropout=self.dropout)
        try:
            re.compile(self.target_modules)
        except re.error as error:
            raise ArgumentError(
                f"lora.target_modules: {self.target_modules!r} is no regular expression ({error})"
            ) from None

    def to_peft(self) -> LoraConfig:
        """PEFT's configuration."""
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.target_modules
        )


def switched(model: nn.Module) -> list[nn.Module]:
    """The modules whose adapter :func:`active` chooses: tuner layers, and the modules that PEFT saves whole."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def active(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Within it, ``model`` computes with ``adapter``; ``reference`` is the base model, no adapter at all.

    ``requires_grad`` stays as it is, so the graphs of several adapters can be joined in one backward.
    """
    layers: list[Any] = switched(model)
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = PEFT_NAMES[adapter]
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def checkpoint_gradients(model: nn.Module) -> None:
    """Recomputes a layer's activations in the backward pass, with the adapter that its forward pass used.

    The recomputation happens at backward time, when another adapter may be at work: plain gradient checkpointing then
    gives wrong gradients.

    Args:
        model: the Hugging Face model; its own ``activation_checkpointing_enable`` is called.
    """
    layers: list[Any] = switched(model)

    @contextmanager
    def again(names: list[list[str]]) -> Iterator[None]:
        before = [layer._active_adapter for layer in layers]
        for layer, then in zip(layers, names, strict=True):
            layer._active_adapter = then
        try:
            yield
        finally:
            for layer, now in zip(layers, before, strict=True):
                layer._active_adapter = now

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again([layer._active_adapter for layer in layers])

    checkpoint_activations(model, {"use_reentrant": False, "context_fn": contexts})
