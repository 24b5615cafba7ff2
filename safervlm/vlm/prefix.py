"""Batches processor encodings: pads them, appends completions, and shares common prefixes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

from safervlm.io.boundary import warn
from safervlm.vlm.cache import PreallocatedLayer, growing_cache
from safervlm.vlm.compat import CACHE, position_ids, takes_a_plain_cache, tree_leaves, tree_map
from safervlm.vlm.packing import common_beginning

Encoding = Mapping[str, Tensor]
T = TypeVar("T")

# Tolerated root-mean-square difference between two ways to compute the same values, relative to their standard
# deviation. Rounding to bfloat16 causes some hundredths. Values of other types must be equal.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
GROWS = "the model's KV cache doesn't keep all positions, or the model overrides generate"


def extend(encoding: Encoding, completion: Sequence[int], written: Encoding) -> dict[str, Tensor]:
    """Appends a completion to the encoding of a prompt.

    Args:
        encoding: Encoding of the prompt.
        completion: Token ids of the completion.
        written: (1, 1, ...) values to append per token to the other inputs that grow with the tokens.

    Returns:
        The inputs of the prompt followed by the completion.
    """
    rest = {name: value.expand(-1, len(completion), *value.shape[2:]) for name, value in written.items()}
    rest["input_ids"] = torch.tensor([completion], device=encoding["input_ids"].device)
    return {**encoding, **{name: torch.cat([encoding[name], more], dim=1) for name, more in rest.items()}}


def join(
    encodings: Sequence[Encoding], pad_token_id: int, dtype: torch.dtype, left: Collection[str] = ()
) -> dict[str, Tensor]:
    """Joins encodings of single questions into a batch, padded with zeros at the end of each dimension.

    Args:
        encodings: Encodings of single questions by the same model.
        pad_token_id: Padding token of ``input_ids``, which the attention mask hides.
        dtype: Data type of the weights; floating-point inputs (images) are converted to it.
        left: Names of the inputs that are padded on the left instead, as generation requires for tokens.

    Returns:
        The inputs of the batch, by name.
    """
    joined = {}
    for name, first in encodings[0].items():
        tensors = [encoding[name] for encoding in encodings]
        widest = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, first.dim())]
        padded = []
        for tensor in tensors:
            missing = [wide - size for wide, size in zip(widest, tensor.shape[1:], strict=True)]
            sides = [side for gap in reversed(missing[1:]) for side in (0, gap)]
            sides += ([missing[0], 0] if name in left else [0, missing[0]]) if missing else []
            padded.append(F.pad(tensor, sides, value=pad_token_id if name == "input_ids" else 0))
        joined[name] = torch.cat(padded).to(dtype if first.is_floating_point() else first.dtype)
    return joined


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
    """Returns whether two results differ by rounding only, in the precision of ``dtype``.

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
    """Computes what a family's code may not support.

    Args:
        compute: Calls the family's code.

    Returns:
        The result, or the exception that the code raised, which may be any.

    Raises:
        torch.OutOfMemoryError: There is too little memory, which says nothing about the code.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error


class DeduplicatedEncoder:
    """Wraps an image encoder, and encodes identical images of a batch once.

    Most encoders have one row per image, and encode the distinct images together. Others pack the patches of all
    images, or their outputs; those encode each distinct image by itself. The first time a batch has duplicates, it is
    also encoded as it is, and the results are compared: if they differ, nothing is deduplicated.

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
        """Finds where the images are in the output for all images, and returns whether that is what it consists of."""
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
        """Encodes each distinct image by itself, and repeats and joins their outputs."""
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
        number: Which of the distinct images comes at each place.

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


class PrefixSharing:
    """Prefix sharing: computes the common prefix of prompts about one image once, and reuses its KV cache.

    It is used only where it doesn't change the responses: for models whose tokens attend to all tokens before them and
    to none after them. The first time, a few questions are computed both ways and their logits are compared.

    Args:
        model: A causal model.
        pad_token_id: Padding token, which the attention mask hides.
        image_token_ids: Placeholder tokens of images.
        dtype: Data type of the base weights.

    Attributes:
        plain: Whether every layer caches all positions, and the library's ``generate`` is used.
        works: Whether prompts share their common prefix; None before it is known.
        obstacle: Why steps of fixed shapes are not used, or an empty text (:mod:`safervlm.vlm.prompted`); None before
            it is known.
    """

    def __init__(
        self, model: PreTrainedModel, pad_token_id: int, image_token_ids: set[int], dtype: torch.dtype
    ) -> None:
        self.model, self.pad_token_id, self.image_token_ids, self.dtype = model, pad_token_id, image_token_ids, dtype
        # Excludes layers that don't keep all positions (sliding window, recurrent state), code older than the library's
        # caches, and models that override ``generate`` (Q-Former).
        self.plain = (
            type(model).generate is GenerationMixin.generate
            and takes_a_plain_cache(model)
            and all(type(layer) is PreallocatedLayer for layer in self.cache().layers)
        )
        self.works: bool | None = None if self.plain else False
        self.obstacle: str | None = None if self.plain else GROWS

    def cache(self) -> DynamicCache:
        """Returns an empty KV cache for the model."""
        return growing_cache(self.model.config.get_text_config())

    def inputs(self, encodings: Sequence[Encoding], tokenwise: Collection[str]) -> dict[str, Any] | None:
        """Returns the inputs of ``generate`` with prefix sharing: whole prompts, and the KV cache of their prefixes.

        Args:
            encodings: Encodings of the questions.
            tokenwise: Names of the inputs that grow with the tokens.

        Returns:
            The inputs, or None if each question has to be computed alone. This is so if no two questions are about one
            image, if the common prefix contains no image or is followed by one, or if tokens have further inputs
            besides the attention mask and the image token types. Such inputs (token types, which images a token attends
            to) imply attention that is not purely causal.
        """
        if self.works is False or not {*tokenwise} <= {"input_ids", "attention_mask", "mm_token_type_ids"}:
            return None
        firsts, image_of = equals([[e[name] for name in e if name not in tokenwise] for e in encodings])
        prompts = [encoding["input_ids"][0].tolist() for encoding in encodings]
        beginnings = [
            common_beginning([prompt for prompt, image in zip(prompts, image_of, strict=True) if image == number])
            for number in range(len(firsts))
        ]
        cuts = [len(beginnings[image]) for image in image_of]
        if len(firsts) == len(prompts) or any(
            self.image_token_ids.isdisjoint(prompt[:cut]) or not self.image_token_ids.isdisjoint(prompt[cut:])
            for prompt, cut in zip(prompts, cuts, strict=True)
        ):
            return None
        if self.works is None:
            self.works = self._agrees(encodings, image_of, tokenwise)
            return self.inputs(encodings, tokenwise)

        # A row is ``padding | beginning | padding | rest``: all beginnings end in one column, and so do all prompts.
        before, behind = (
            self._join(
                [{name: e[name][:, side] for name in tokenwise} for e, side in zip(encodings, sides, strict=True)]
            )
            for sides in ([slice(cut) for cut in cuts], [slice(cut, None) for cut in cuts])
        )
        whole = {name: torch.cat([before[name], behind[name]], dim=1) for name in tokenwise}
        images = self._join([encodings[question] for question in firsts])
        # Image tokens may have two-dimensional positions, which depend on the image sizes; text continues from them.
        sizes = self._join([{n: e[n] for n in e if not e[n].is_floating_point()} for e in encodings])
        positions = position_ids(self.model, whole["input_ids"], sizes | whole)
        cache = self.model(
            **images | {name: tensor[firsts] for name, tensor in before.items()},
            position_ids=positions[..., firsts, : before["input_ids"].shape[1]],
            **{CACHE: self.cache()},
            use_cache=True,
            logits_to_keep=1,
        )[CACHE]
        cache.batch_select_indices(torch.tensor(image_of, device=positions.device))
        whole.pop("mm_token_type_ids", None)  # only needed for the positions
        return whole | {"position_ids": positions, CACHE: cache}

    def alone(self, encodings: Sequence[Encoding], tokenwise: Collection[str]) -> dict[str, Any]:
        """Returns the inputs of ``generate`` without prefix sharing.

        Args:
            encodings: Encodings of the questions.
            tokenwise: Names of the inputs that grow with the tokens; these are padded on the left.
        """
        inputs = join(encodings, self.pad_token_id, self.dtype, tokenwise)
        return {**inputs, CACHE: self.cache()} if self.plain else inputs

    def _join(self, encodings: Sequence[Encoding]) -> dict[str, Tensor]:
        left = ("input_ids", "attention_mask", "mm_token_type_ids")
        return join(encodings, self.pad_token_id, self.dtype, left)

    def _agrees(self, encodings: Sequence[Encoding], image_of: list[int], tokenwise: Collection[str]) -> bool:
        """Returns whether a few questions have the same logits with and without prefix sharing."""
        image = next(number for number in image_of if image_of.count(number) > 1)
        of_it = [place for place, number in enumerate(image_of) if number == image]
        others = [place for place, number in enumerate(image_of) if number != image]
        few = [encodings[place] for place in of_it[:2] + others[:1]]
        trial = copy(self)
        trial.works = True
        alone = self._two_tokens(self._join(few))
        shared = attempt(lambda: self._two_tokens(trial.inputs(few, tokenwise) or {}))
        same = False
        if not isinstance(shared, Exception):
            same = agree(alone.logits[0], shared.logits[0], self.dtype)
            # Also compares the second token's logits where the first token is the same (rounding may change it).
            rows = alone.sequences[:, -2] == shared.sequences[:, -2]
            if rows.any():
                same = same and agree(alone.logits[1][rows], shared.logits[1][rows], self.dtype)
        if not same:
            warn("the questions about an image are computed one by one: this model's can't share what they begin with")
        return same

    def _two_tokens(self, inputs: Mapping[str, Any]) -> Any:
        """Generates the two most probable tokens, with their logits."""
        settings = GenerationConfig(
            max_new_tokens=2, output_logits=True, return_dict_in_generate=True, pad_token_id=self.pad_token_id
        )
        return self.model.generate(**inputs, generation_config=settings)
