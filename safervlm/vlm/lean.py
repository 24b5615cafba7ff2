"""LoRA in decoding steps: two operations per adapted layer instead of six, in the data type of the layer.

PEFT converts a layer's input to the adapter's float32, multiplies it by both factors and the scale, adds the result and
converts it back. For the few tokens of a decoding step, such small operations take as long as the large one of the
layer. Here the factors are converted once per batch of responses, with the scale, and the second product is added in
place.

The adapter is not added to the weights: in bfloat16 that would round away updates below 1/256 of a weight, so that
responses would be sampled from another policy than the one that is scored; and the original weights would need as much
memory again. Here the sampled and the scored policy differ only by the rounding of the update. The objectives take the
log-probabilities of the sampled tokens from a scoring pass, so that the first ratio of policies is 1.

Shapes: B tokens, I inputs and O outputs of a layer, r rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from safervlm.vlm.lora import PEFT_NAMES, Adapter, switched


@contextmanager
def lean_lora(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Context manager in which plain LoRA layers compute their active adapter with fewer operations, without gradients.

    Other adapter layers are not changed.

    Args:
        model: A model, with or without adapters.
        adapter: The adapter that is active.
    """
    changed = []
    try:
        for layer in switched(model):
            forward = _lean(layer, PEFT_NAMES[adapter])  # the copies of the factors may exceed the memory
            if forward is not None:
                layer.forward = forward
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _lean(layer: Any, names: list[str]) -> Callable[..., Tensor] | None:
    """Returns a layer's function with one adapter or none, or None if it is not plain LoRA of whole matrices."""
    base = layer.get_base_layer() if type(layer) is Linear else None
    if not isinstance(base, nn.Linear) or layer.merged or "forward" in vars(layer):
        return None
    own = [name for name in names if name in layer.lora_A]
    if not own:
        return base.__call__
    (name,) = own
    first, second = layer.lora_A[name], layer.lora_B[name]
    whole = (second.weight.shape, first.weight.shape) == (
        (base.out_features, layer.r[name]),
        (layer.r[name], base.in_features),
    )
    if name in layer.lora_variant or layer.lora_bias[name] or not whole:  # DoRA; a process's share of a matrix
        return None
    device = base.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
    if not dtype.is_floating_point:  # a quantised base
        return None
    down = first.weight.detach().to(dtype)  # (r, I)
    up = (layer.scaling[name] * second.weight.detach()).to(dtype).T  # (r, O)

    def forward(inputs: Tensor) -> Tensor:
        result: Tensor = base(inputs)
        # In place, because the addition would otherwise begin with a copy.
        result.view(-1, result.shape[-1]).addmm_(nn.functional.linear(inputs.flatten(0, -2), down), up)
        return result

    return forward
