"""Transformation of the logits of a model's head: a scale, then a cap, both named in its configuration.

Configurations name the values, but not all models use them alike: a value called ``logits_scaling`` divides in one
family and multiplies in another, and some releases of transformers omit the cap. So the candidates are compared with
the model's own logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAP = "final_logit_softcapping"
# Tolerated difference between logits computed in two ways: of each of them, and of their common scale, in which the
# roundings of many values cancel.
ROUNDING = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SCALE_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class LogitTransform:
    """Transformation of the logits after the head: they are scaled, then capped.

    Attributes:
        factor: Factor by which the logits are multiplied.
        divisor: Divisor by which the logits are divided.
        cap: Largest absolute value of the logits, approached as by tanh; None for no cap.
    """

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Returns the transformed logits.

        Args:
            logits: Output of the head, of any shape.
        """
        logits = logits if self.factor == 1 else logits * self.factor
        logits = logits if self.divisor == 1 else logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def candidates(config: Any) -> Iterator[LogitTransform]:
    """Yields the transformations that a configuration may mean; the last one is the identity.

    Args:
        config: The model's configuration.
    """
    parts = (config.get_text_config(), config)

    def named(name: str) -> float | None:
        found = next((value for part in parts if (value := getattr(part, name, None)) is not None), None)
        return float(found) if isinstance(found, int | float) and found > 0 else None

    scales = [value for name in SCALES if (value := named(name)) is not None and value != 1]
    cap = named(CAP)
    for capped in [cap, None] if cap is not None else [None]:
        for scale in scales:
            yield LogitTransform(factor=scale, cap=capped)
            yield LogitTransform(divisor=scale, cap=capped)
        yield LogitTransform(cap=capped)


def transform_between(config: Any, bare: Tensor, logits: Tensor) -> LogitTransform | None:
    """Returns the transformation that turns the output of a head into the model's logits; None if it is unknown.

    Of several that agree within rounding, the closest one is selected, and the first of equally close ones.

    Args:
        config: The model's configuration.
        bare: Output of the head.
        logits: The model's logits, of the same shape.
    """

    def apart(transform: LogitTransform) -> float:
        return float((transform(bare).float() - logits.float()).square().mean())

    best = min(candidates(config), key=apart)
    expected, found = best(bare).double(), logits.double()
    tolerance = ROUNDING.get(bare.dtype, 1e-3)
    if not torch.allclose(expected, found, atol=tolerance, rtol=tolerance):
        return None
    square = float(expected.square().sum())
    scale = float((expected * found).sum()) / square if square else 1.0  # by least squares
    return best if abs(scale - 1) <= SCALE_ROUNDING.get(bare.dtype, 1e-4) else None
