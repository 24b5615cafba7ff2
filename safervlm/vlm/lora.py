"""LoRA: settings, target layers, and switching of the active adapter.

PEFT's own ``set_adapter`` and ``disable_adapter`` also change ``requires_grad``: a policy forward pass, then
``set_adapter("value")``, then one joint backward pass leaves the policy without a gradient, without an error. Here
``requires_grad`` is set once, and switching changes only the active adapter of the layers.
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
# PEFT saves the adapter named "default" into the folder itself, and others into subfolders.
PEFT_NAMES: dict[Adapter, list[str]] = {"policy": ["default"], "value": ["value"], "reference": []}

# Bare names such as q_proj, or PEFT's "all-linear", would also match the vision tower.
LANGUAGE_LAYERS = r".*\b(language_model|text_model)\.((model|decoder)\.)*layers\.\d+\.(\w+\.)*(\w+_proj|fc[12])"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv:2106.09685) of the language model's linear layers.

    The defaults are those of the published training (arXiv:2507.11155).

    Args:
        r: Rank of the update.
        alpha: Scale of the update, which is multiplied by alpha / r.
        dropout: Probability of dropping an input of the update during training.
        target_modules: Regular expression that must match the full name of a module. By default, every linear layer of
            the language model and none of the vision tower.

    Raises:
        ArgumentError: A value is out of range, or ``target_modules`` is no regular expression.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    target_modules: str = LANGUAGE_LAYERS

    def __post_init__(self) -> None:
        """Rejects values that PEFT would fail on later."""
        in_range("lora", least=1, r=self.r, alpha=self.alpha)
        in_range("lora", least=0, below=1, dropout=self.dropout)
        try:
            re.compile(self.target_modules)
        except re.error as error:
            raise ArgumentError(
                f"lora.target_modules: {self.target_modules!r} is no regular expression ({error})"
            ) from None

    def to_peft(self) -> LoraConfig:
        """Returns the settings as PEFT's configuration."""
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.target_modules
        )


def switched(model: nn.Module) -> list[nn.Module]:
    """Returns the modules whose adapter :func:`active` selects: tuner layers, and fully trained modules of PEFT.

    Args:
        model: A model, with or without adapters.
    """
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def active(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Context manager that makes a model compute with one adapter; the previous one is restored afterwards.

    ``requires_grad`` is not changed, so the graphs of several adapters can be joined in one backward pass.

    Args:
        model: A model with adapter layers.
        adapter: The adapter to activate; ``reference`` is the base model, without an adapter.
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
    """Turns on gradient checkpointing that recomputes each layer with the adapter of its forward pass.

    The recomputation happens during the backward pass, when another adapter may be active. Plain gradient checkpointing
    then returns wrong gradients.

    Args:
        model: The Hugging Face model with its adapters; its own ``activation_checkpointing_enable`` is called.
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
