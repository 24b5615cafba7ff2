"""Batches processor encodings: pads them, appends completions, and shares common prefixes."""

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

from safervlm.io.boundary import warn
from safervlm.vlm.cache import PreallocatedLayer, growing_cache
from safervlm.vlm.comparing import agree, attempt, equals
from safervlm.vlm.compat import CACHE, accepts_dynamic_cache, position_ids
from safervlm.vlm.packing import common_beginning

Encoding = Mapping[str, Tensor]
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
            and accepts_dynamic_cache(model)
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
            The inputs, or None if each question is computed separately. This is so if no two questions are about one
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
            warn(
                "the questions about an image are computed one by one: this model does not support sharing their "
                "common prefix"
            )
        return same

    def _two_tokens(self, inputs: Mapping[str, Any]) -> Any:
        """Generates the two most probable tokens, with their logits."""
        settings = GenerationConfig(
            max_new_tokens=2, output_logits=True, return_dict_in_generate=True, pad_token_id=self.pad_token_id
        )
        return self.model.generate(**inputs, generation_config=settings)
