"""Compares two ways to compute the same values, one of which a family's code may not support."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Tolerated root-mean-square difference between two ways to compute the same values, relative to their standard
# deviation. Rounding to bfloat16 causes a few hundredths. Values of other types must be equal.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def equals(rows: Sequence[Sequence[Tensor]]) -> tuple[list[int], list[int]]:
    """Finds duplicate rows.

    Args:
        rows: Rows of tensors, with the same number of tensors in each.

    Returns:
        The indices of the rows that differ from all rows before them, and for each row, the place in that list of the
        row it equals.
    """
    firsts: list[int] = []
    number: list[int] = []
    for place, row in enumerate(rows):
        for known, first in enumerate(firsts):
            if all(torch.equal(mine, other) for mine, other in zip(row, rows[first], strict=True)):
                number.append(known)
                break
        else:
            number.append(len(firsts))
            firsts.append(place)
    return firsts, number


def agree(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether two results differ only by rounding, in the precision of ``dtype``.

    Args:
        one: The first result.
        other: The second result.
        dtype: Data type in which they were computed. For types without an entry in :data:`ROUNDING`, and for different
            shapes, only exact equality counts.
    """
    if one.shape != other.shape or dtype not in ROUNDING:
        return torch.equal(one, other)
    apart = (one.float() - other.float()).square().mean().sqrt()
    return bool(apart <= ROUNDING[dtype] * one.float().std(correction=0))


def attempt(compute: Callable[[], T]) -> T | Exception:
    """Performs a computation that a family's code may not support.

    Args:
        compute: Calls the family's code.

    Returns:
        The result, or the exception that the code raised, which may be of any type.

    Raises:
        torch.OutOfMemoryError: There is too little memory, which does not mean that the code is unsupported.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error
