"""Encodes identical images of a batch once, if the model's image encoder allows it."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from safervlm.vlm.comparing import agree, attempt, equals
from safervlm.vlm.compat import tree_leaves, tree_map


class DeduplicatedEncoder:
    """Wraps an image encoder, and encodes identical images of a batch once.

    Most encoders have one row per image, and encode the distinct images together. Others pack the patches of all
    images, or their outputs; those encode each distinct image separately. The first time a batch has duplicates, it is
    also encoded without deduplication, and the results are compared: if they differ, nothing is deduplicated.

    Args:
        encode: Forward pass of the encoder.
    """

    def __init__(self, encode: Callable[..., Any]) -> None:
        self.encode = encode
        self.works: bool | None = None
        # For an encoder that packs: the dimension of each tensor of its output in which the images follow each other.
        self.axes: list[int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the encoder's output, computed from the distinct images."""
        images = [] if self.works is False else split_images(args, kwargs)
        firsts, number = equals([_tensors(image) for image in images])
        if len(firsts) == len(number):
            return self.encode(*args, **kwargs)
        distinct = [images[place] for place in firsts]
        if self.works and self.axes is None:
            return self._rows(args, kwargs, firsts, number)
        if self.works:
            return self._packed(distinct, number)
        every = self.encode(*args, **kwargs)
        if len(images) == len(next(iter(_tensors((args, kwargs))))):
            self.works = self._equal(every, attempt(lambda: self._rows(args, kwargs, firsts, number)))
        if not self.works:
            self.works = attempt(lambda: self._packs(every, distinct, number)) is True
        return every

    def _packs(self, every: Any, distinct: Sequence[tuple[Any, Any]], number: Sequence[int]) -> bool:
        """Finds where the images are in the output for all images, and returns whether it consists of nothing else."""
        self.axes = packed_axes(every, [self.encode(*some, **named) for some, named in distinct], number)
        return self.axes is not None and self._equal(every, self._packed(distinct, number))

    def _equal(self, every: Any, encoded: Any) -> bool:
        whole, part = _tensors(every), _tensors(encoded)
        return 0 < len(whole) == len(part) and all(
            agree(other, mine, other.dtype) for other, mine in zip(whole, part, strict=True)
        )

    def _rows(self, args: Any, kwargs: Any, firsts: list[int], number: list[int]) -> Any:
        """Encodes the distinct rows, and repeats their outputs; None if the output has no row per image."""

        def rows(tree: Any, places: list[int]) -> Any:
            return tree_map(lambda leaf: leaf[places] if isinstance(leaf, Tensor) else leaf, tree)

        some, named = rows((args, kwargs), firsts)
        encoded = self.encode(*some, **named)
        return rows(encoded, number) if all(leaf.shape[:1] == (len(firsts),) for leaf in _tensors(encoded)) else None

    def _packed(self, distinct: Sequence[tuple[Any, Any]], number: Sequence[int]) -> Any:
        """Encodes each distinct image separately, and repeats and joins their outputs."""
        outputs = [self.encode(*some, **named) for some, named in distinct]
        parts = zip(*map(_tensors, outputs), self.axes or [], strict=True)  # the outputs' tensors, then their axis

        def joined(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            *those, axis = next(parts)
            return torch.cat([those[place] for place in number], dim=axis)

        return tree_map(joined, outputs[0])


def packed_axes(every: Any, alone: Sequence[Any], number: Sequence[int]) -> list[int] | None:
    """Finds in which dimension of each tensor of an encoder's output the images follow each other.

    Args:
        every: Output for all images.
        alone: Outputs for the distinct images.
        number: Index of the distinct image at each place.

    Returns:
        A dimension per tensor; None if an output is not a concatenation.
    """
    axes = []
    for whole, *parts in zip(_tensors(every), *map(_tensors, alone), strict=False):
        shapes = [list(parts[place].shape) for place in number]
        fits = [
            axis
            for axis in range(whole.dim())
            if all(len(shape) == whole.dim() for shape in shapes)
            and sum(shape[axis] for shape in shapes) == whole.shape[axis]
            and all(
                shape[:axis] + shape[axis + 1 :] == [*whole.shape[:axis], *whole.shape[axis + 1 :]] for shape in shapes
            )
        ]
        if not fits:
            return None
        axes.append(fits[0])
    return axes


def split_images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Splits the arguments of an image encoder by images.

    A tensor has one row per image, or one row per patch if another tensor has the grid of each image, whose product is
    the number of its patches.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The arguments for each image; empty if they can't be split.
    """
    tree = (args, dict(kwargs))
    tensors = _tensors(tree)
    if not tensors or not all(tensor.dim() for tensor in tensors):
        return []
    fewest = min(len(tensor) for tensor in tensors)
    most = max(len(tensor) for tensor in tensors)
    # A list may have one entry per image, for example of sizes; one of another length has not, if rows are images.
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, list | tuple | Mapping)]
    rows_are_images = most == fewest and max(tensor.dim() for tensor in tensors) > 3
    if lists and (not rows_are_images or any(len(value) == fewest for value in lists)):
        return []
    counts = [1] * fewest
    if most > fewest:
        grids = [t for t in tensors if len(t) == fewest and t.dim() == 2 and not t.is_floating_point()]
        counts = next((c for c in (grid.prod(-1).tolist() for grid in grids) if sum(c) == most), [])
    if not counts or any(len(tensor) not in (fewest, most) for tensor in tensors):
        return []
    ends = list(accumulate(counts))

    def of_image(leaf: Any, image: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[image : image + 1] if len(leaf) == fewest else leaf[ends[image] - counts[image] : ends[image]]

    return [tree_map(lambda leaf, image=image: of_image(leaf, image), tree) for image in range(fewest)]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
