"""Cuts the responses of a rollout into mini-batches and micro-batches.

Shapes: N responses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def split_into_parts(rows: Tensor, size: int, fewest: int) -> tuple[Tensor, ...]:
    """Splits rows into parts; the number of parts depends only on ``fewest``.

    All processes have to make the same number of parts, although their numbers of rows differ.

    Args:
        rows: (N,) indices, N >= ``fewest``.
        size: Number of rows of a part.
        fewest: The smallest N of all processes.

    Returns:
        ceil(fewest / size) parts of ``size`` rows each; the last one has the remaining rows.
    """
    return rows.tensor_split(list(range(size, fewest, size)))


def rows_by_name(rows: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Groups rows by their names, in the order in which the names occur first.

    Args:
        rows: (N,) indices.
        names: The name of each index.

    Returns:
        The indices of each name.
    """
    groups: dict[str, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(names[row], []).append(row)
    return [torch.tensor(group) for group in groups.values()]


def micro_batches(rows: Tensor, names: Sequence[str], lengths: Tensor, size: int) -> list[Tensor]:
    """Cuts rows into parts of similar length, so that a part contains little padding.

    Args:
        rows: (N,) indices.
        names: The name of each index; rows of one name share computation, and stay in one part where they fit.
        lengths: The length of each index.
        size: Maximum number of rows of a part.

    Returns:
        The parts, the shortest first.
    """
    parts: list[list[int]] = []
    for group in sorted(rows_by_name(rows, names), key=lambda group: int(lengths[group].max())):
        for piece in group.split(size):
            if parts and len(parts[-1]) + len(piece) <= size:
                parts[-1] += piece.tolist()
            else:
                parts.append(piece.tolist())
    return [torch.tensor(part) for part in parts]
