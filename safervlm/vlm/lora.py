"""LoRA: settings, target layers, and switching of the active adapter.

PEFT's own ``set_adapter`` and ``disable_adapter`` also change ``requires_grad``: a policy forward pass, then
``set_adapter("value")``, then one joint backward pass leaves the policy without a gradient, without an error. Here
``requires_grad`` is set once, and switching changes only the active adapter of the layers.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from safervlm.errors import ArgumentError, explained
from safervlm.limits import reject_slow_patterns
from safervlm.ranges import in_range
from safervlm.vlm.compat import checkpoint_activations, names_as_given
from safervlm.vlm.layers import EXPERTS, GATE, ROUTER, language_weights

Adapter = Literal["policy", "value", "reference"]
# PEFT saves the adapter named "default" into the folder itself, and others into subfolders.
PEFT_NAMES: dict[Adapter, list[str]] = {"policy": ["default"], "value": ["value"], "reference": []}


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv:2106.09685) of the language model's linear layers.

    The defaults are those of the published training (arXiv:2507.11155).

    Args:
        r: Rank of the update.
        alpha: Scale of the update, which is multiplied by alpha / r.
        dropout: Probability of dropping an input of the update during training.
        target_modules: Regular expression that must match the full name of a module. None for every linear layer in the
            blocks of the language model, without routers, gates of one output, experts, and the vision tower.
        experts: Also adapt the experts of a mixture-of-experts model. Needs ``dropout`` 0; ``configs/experts.yaml``
            sets both.
        min_coverage: Share of the language model's weights that has to be adapted, from 0 to 1. A model below it is
            rejected.

    Raises:
        ArgumentError: A value is out of range, ``target_modules`` is not a regular expression, or ``experts`` is
            combined with dropout.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    target_modules: str | None = None
    experts: bool = False
    min_coverage: float = 0.5

    def __post_init__(self) -> None:
        """Rejects values that PEFT would fail on later."""
        in_range("lora", least=1, r=self.r, alpha=self.alpha)
        in_range("lora", least=0, below=1, dropout=self.dropout)
        in_range("lora", least=0, most=1, min_coverage=self.min_coverage)
        if self.experts and self.dropout:
            raise ArgumentError(
                f"lora.dropout: experts are adapted without dropout, got {self.dropout}; give 0, or add --config "
                "configs/experts.yaml"
            )
        try:
            re.compile(self.target_modules or "")
        except re.error as error:
            raise ArgumentError(
                f"lora.target_modules: {self.target_modules!r} is not a regular expression ({error})"
            ) from None

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the trained weights."""
        described = {"r": self.r, "alpha": self.alpha, "dropout": self.dropout, "target_modules": self.target_modules}
        return described | ({"experts": True} if self.experts else {})

    def to_peft(self, layers: "AdaptedLayers") -> LoraConfig:
        """Returns the settings as PEFT's configuration.

        Args:
            layers: Layers to adapt, from :func:`adapted_layers`.
        """
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(layers.modules),
            target_parameters=list(layers.parameters) or None,
        )


@dataclass(frozen=True)
class AdaptedLayers:
    """The layers that LoRA adapts in a model, and their share of the language model.

    Attributes:
        modules: Full names of the adapted linear layers.
        parameters: Full names of the adapted stacks of experts.
        adapted: Kind of weight -> number of adapted values.
        weights: Kind of weight -> number of values.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    adapted: Mapping[str, int]
    weights: Mapping[str, int]

    @property
    def share(self) -> float:
        """Adapted share of the language model's weights."""
        return sum(self.adapted.values()) / max(1, sum(self.weights.values()))

    def describe(self) -> dict[str, Any]:
        """Returns the shares as JSON values, for the manifest."""
        total = max(1, sum(self.weights.values()))
        kinds = {
            kind: {"adapted": self.adapted.get(kind, 0) / total, "missed": (count - self.adapted.get(kind, 0)) / total}
            for kind, count in self.weights.items()
        }
        return {"adapted": self.share, "missed": 1 - self.share, "kinds": kinds}

    def __str__(self) -> str:
        """Returns one line with the adapted and the missed share, by kind."""
        described = self.describe()

        def kinds(side: str) -> str:
            parts = [f"{kind} {100 * each[side]:.1f}" for kind, each in described["kinds"].items() if each[side]]
            return f" ({', '.join(parts)})" if parts else ""

        return (
            f"LoRA adapts {100 * self.share:.1f} % of the language model's weights{kinds('adapted')} and misses "
            f"{100 * described['missed']:.1f} %{kinds('missed')}"
        )


def adapted_layers(model: PreTrainedModel, lora: LoRA, seconds: float | None = None) -> AdaptedLayers:
    """Returns the layers that LoRA adapts in a model.

    Args:
        model: The base model, without adapters.
        lora: Settings.
        seconds: Limit of the CPU time of the regular expression; None for the default.

    Raises:
        ArgumentError: The regular expression matches no module, or matching it takes too long.
    """
    weights = language_weights(model)
    if lora.target_modules is None:
        modules = {
            weight.module
            for weight in weights
            if weight.linear
            and weight.kind not in (ROUTER, EXPERTS)
            and not (weight.kind == GATE and weight.outputs == 1)
        }
    else:
        names = [name for name, _ in model.named_modules()]
        reject_slow_patterns([lora.target_modules], names, "lora.target_modules", seconds)
        modules = {name for name in names if re.fullmatch(lora.target_modules, name)}
    experts = [weight for weight in weights if weight.kind == EXPERTS and lora.experts]
    modules |= {weight.module for weight in experts if weight.linear}
    parameters = {f"{weight.module}.{weight.parameter}" for weight in experts if not weight.linear}
    if lora.experts and not experts:
        raise ArgumentError(f"lora.experts: {model.config.name_or_path!r} has no experts; leave it out")
    if not modules | parameters:
        raise ArgumentError(
            f"lora.target_modules: {lora.target_modules!r} matches no module of {model.config.name_or_path!r}; give a "
            "regular expression that matches linear layers of the language model"
        )
    adapted: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for weight in weights:
        every[weight.kind] += weight.size
        if weight.module in modules or f"{weight.module}.{weight.parameter}" in parameters:
            adapted[weight.kind] += weight.size
    return AdaptedLayers(tuple(sorted(modules)), tuple(sorted(parameters)), adapted, every)


def require_coverage(layers: AdaptedLayers, lora: LoRA, name: str) -> None:
    """Rejects a model of which LoRA would adapt too small a share.

    Args:
        layers: The adapted layers.
        lora: Settings.
        name: Name of the model.

    Raises:
        ArgumentError: The share is below ``lora.min_coverage``.
    """
    if layers.share >= lora.min_coverage:
        return
    remedy = "let lora.target_modules match more layers"
    if lora.target_modules is None:
        remedy = "name the missed layers in lora.target_modules"
    if not lora.experts and EXPERTS in layers.weights:
        remedy = "adapt the experts (--config configs/experts.yaml)"
    raise ArgumentError(
        f"lora.min_coverage: {layers} of {name!r}, less than {100 * lora.min_coverage:g} %; {remedy}, or lower "
        "lora.min_coverage"
    )


def add_adapters(base: PreTrainedModel, lora: LoRA, layers: AdaptedLayers, names: Sequence[Adapter]) -> PeftModel:
    """Adds new adapters to exactly the given layers.

    Args:
        base: The base model; PEFT adds the layers to it.
        lora: Settings.
        layers: Layers to adapt.
        names: The adapters; the first is the policy.

    Raises:
        ArgumentError: PEFT can't adapt one of the modules.
    """
    remedy = "give a regular expression that matches linear layers of the language model"
    what = f"lora.target_modules: {lora.target_modules!r} can't be used"
    with explained(what, remedy, ValueError, TypeError, error=ArgumentError), names_as_given():
        model = get_peft_model(base, lora.to_peft(layers))
        for name in names[1:]:
            model.add_adapter(name, lora.to_peft(layers))
    for config in model.peft_config.values():
        config.target_modules = list(layers.modules)  # PEFT shortens long lists to what is unique in this model
        config.target_parameters = list(layers.parameters) or None
    there = {name.replace(".base_layer", "") for name, part in base.named_modules() if isinstance(part, BaseTunerLayer)}
    wanted = {*layers.modules, *(name.rpartition(".")[0] for name in layers.parameters)}
    if wrong := sorted(there ^ wanted):
        raise RuntimeError(f"PEFT adapted other layers than it was given, for example {wrong[0]}")
    return model


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
