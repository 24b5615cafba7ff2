"""Rows of encoded questions: joined to a batch, gone on with, and what those about one image have in common shared."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

from safervlm.io.boundary import warn
from safervlm.vlm.cache import RoomyLayer, roomy
from safervlm.vlm.compat import CACHE, position_ids, takes_a_plain_cache, tree_leaves, tree_map
from safervlm.vlm.packed import common_beginning

Encoding = Mapping[str, Tensor]

# Of the spread of numbers, how far two ways to compute them may lie apart; bfloat16 rounds by some hundredths of it. Of
# other kinds they have to be equal.
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def extend(encoding: Encoding, completion: Sequence[int], written: Encoding) -> dict[str, Tensor]:
    """A prompt's encoding with a completion behind it.

    Args:
        encoding: of the prompt.
        completion: its tokens.
        written: what stands for each token of an answer in the inputs that go with the tokens, (1, 1, ...).
    """
    rest = {name: value.expand(-1, len(completion), *value.shape[2:]) for name, value in written.items()}
    rest["input_ids"] = torch.tensor([completion], device=encoding["input_ids"].device)
    return {**encoding, **{name: torch.cat([encoding[name], more], dim=1) for name, more in rest.items()}}


def join(
    encodings: Sequence[Encoding], pad_token_id: int, dtype: torch.dtype, left: Collection[str] = ()
) -> dict[str, Tensor]:
    """One batch of encodings: everything is padded at its end, with zeros.

    Args:
        encodings: of single questions, all of the same model.
        pad_token_id: for the tokens, which the attention mask hides.
        dtype: of the weights, and so of images.
        left: names of those that are padded on the left instead, as generating needs the tokens.
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
    """The places of the rows that differ from all before them, and of each row the one of those that it equals.

    Args:
        rows: of tensors, as many in each.
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
    """Whether two ways to compute something, in the precision of ``dtype``, differ by rounding alone."""
    if one.shape != other.shape or dtype not in ROUNDING:
        return torch.equal(one, other)
    apart = (one.float() - other.float()).square().mean().sqrt()
    return bool(apart <= ROUNDING[dtype] * one.float().std(correction=0))


class EachOnce:
    """An image encoder that encodes an image once, however many rows show it.

    The first time that it can, it does both and compares: an encoder may lay all of its images into one row.

    Args:
        encode: the encoder's forward pass.
    """

    def __init__(self, encode: Callable[..., Any]) -> None:
        self.encode = encode
        self.works: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the encoder gives for tensors that have a row an image."""
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if isinstance(value, Tensor)]
        # A list, of the images' sizes for example, may have a row an image, too.
        listed = any(isinstance(value, Sequence | Mapping) and not isinstance(value, str) for value in given)
        if self.works is False or listed or len({tensor.shape[:1] for tensor in tensors}) != 1 or not tensors[0].dim():
            return self.encode(*args, **kwargs)
        firsts, number = equals(list(zip(*tensors, strict=True)))
        if len(firsts) == len(number):
            return self.encode(*args, **kwargs)

        def rows(tree: Any, places: list[int]) -> Any:
            return tree_map(lambda leaf: leaf[places] if isinstance(leaf, Tensor) else leaf, tree)

        encoded = self.encode(*rows(args, firsts), **rows(kwargs, firsts))
        if self.works is None:
            every = self.encode(*args, **kwargs)
            whole, part = _tensors(every), _tensors(encoded)
            self.works = 0 < len(whole) == len(part) and all(
                mine.shape[:1] == (len(firsts),) and agree(other, mine[number], other.dtype)
                for other, mine in zip(whole, part, strict=True)
            )
            return every
        return rows(encoded, number)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Sharing:
    """Computes what the prompts about an image begin with once, for the library's ``generate`` to go on with.

    Where that changes no answer: where a token looks back alone, at all that stands before it. The first time it is
    done on few questions in both ways, and the logits are compared.

    Args:
        model: a causal one.
        pad_token_id: for tokens that the attention mask hides.
        image_token_ids: what stands in an image's places.
        dtype: of the base weights.
    """

    def __init__(
        self, model: PreTrainedModel, pad_token_id: int, image_token_ids: set[int], dtype: torch.dtype
    ) -> None:
        self.model, self.pad_token_id, self.image_token_ids, self.dtype = model, pad_token_id, image_token_ids, dtype
        # Not where a layer forgets (a sliding window, a recurrent state), the code is older than the library's caches,
        # or the model has a ``generate`` of its own (a Q-Former).
        self.plain = (
            type(model).generate is GenerationMixin.generate
            and takes_a_plain_cache(model)
            and all(type(layer) is RoomyLayer for layer in self.cache().layers)
        )
        self.works: bool | None = None if self.plain else False

    def cache(self) -> DynamicCache:
        """An empty one."""
        return roomy(self.model.config.get_text_config())

    def inputs(self, encodings: Sequence[Encoding], tokenwise: Collection[str]) -> dict[str, Any] | None:
        """The inputs of ``generate``: whole prompts, and the cache of what they begin with.

        Args:
            encodings: of the questions.
            tokenwise: the names of the inputs that go with the tokens.

        Returns:
            None where each question is to be computed alone: no two are about one image, an image stands behind the
            question, or a token has more beside it than the mask and whether it is an image's. Such an input (a token's
            type, which images it looks at) stands for attention that doesn't look back alone.
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

        # A row is ``padding | beginning | padding | rest``: the beginnings end in one column, and so do the prompts.
        before, behind = (
            self._join(
                [{name: e[name][:, side] for name in tokenwise} for e, side in zip(encodings, sides, strict=True)]
            )
            for sides in ([slice(cut) for cut in cuts], [slice(cut, None) for cut in cuts])
        )
        whole = {name: torch.cat([before[name], behind[name]], dim=1) for name in tokenwise}
        images = self._join([encodings[question] for question in firsts])
        # Places in an image may have positions in two dimensions, by the sizes of the images; words go on from them.
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
        whole.pop("mm_token_type_ids", None)  # it was for the positions
        return whole | {"position_ids": positions, CACHE: cache}

    def alone(self, encodings: Sequence[Encoding], tokenwise: Collection[str]) -> dict[str, Any]:
        """The inputs of ``generate`` where each question is computed by itself."""
        inputs = join(encodings, self.pad_token_id, self.dtype, tokenwise)
        return {**inputs, CACHE: self.cache()} if self.plain else inputs

    def _join(self, encodings: Sequence[Encoding]) -> dict[str, Tensor]:
        left = ("input_ids", "attention_mask", "mm_token_type_ids")
        return join(encodings, self.pad_token_id, self.dtype, left)

    def _agrees(self, encodings: Sequence[Encoding], image_of: list[int], tokenwise: Collection[str]) -> bool:
        """Whether two questions about one image, and one about another, have the same logits in both ways."""
        image = next(number for number in image_of if image_of.count(number) > 1)
        of_it = [place for place, number in enumerate(image_of) if number == image]
        others = [place for place, number in enumerate(image_of) if number != image]
        few = [encodings[place] for place in of_it[:2] + others[:1]]
        trial = copy(self)
        trial.works = True
        shared, alone = (
            self.model.generate(
                **inputs,
                generation_config=GenerationConfig(
                    max_new_tokens=2, output_logits=True, return_dict_in_generate=True, pad_token_id=self.pad_token_id
                ),
            )
            for inputs in (trial.inputs(few, tokenwise) or {}, self._join(few))
        )
        same = agree(alone.logits[0], shared.logits[0], self.dtype)
        # The second token's, too, where the first is the same: by rounding it may be another one.
        rows = alone.sequences[:, -2] == shared.sequences[:, -2]
        if rows.any():
            same = same and agree(alone.logits[1][rows], shared.logits[1][rows], self.dtype)
        if not same:
            warn("the questions about an image are computed one by one: this model's can't share what they begin with")
        return same
