"""Scoring with any model of transformers: the hidden states that predict completions, in packed rows where possible.

Without sharing there is one row per completion. Packed rows (:mod:`safervlm.vlm.packing`) contain all completions of
the questions about an image. They need a mask per pair of tokens and a position per token, which not every model
accepts. They are used only if

- the model's attention accepts a mask, and its layers keep all positions (as for prefix sharing in generation),
- the tokens have no inputs besides the attention mask and the image token types,
- all placeholders of the image are in the beginning of the row, and
- at the first use, the hidden states of a row equal those of its completions computed separately.

Positions with several coordinates (M-RoPE) are computed for each sequence as if it were alone.

Shapes: C completions, R packed rows, L tokens of the longest row, N response tokens, H hidden units.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safervlm.io.boundary import warn
from safervlm.vlm.comparing import agree, attempt
from safervlm.vlm.compat import accepts_attention_mask, position_ids
from safervlm.vlm.layers import evaluated
from safervlm.vlm.local import Targets
from safervlm.vlm.packing import Packed, additive, pack_completions
from safervlm.vlm.prefix import Encoding, extend, join

# Inputs with a value per token, for which causal attention is known.
TOKENWISE = {"input_ids", "attention_mask", "mm_token_type_ids"}


@dataclass
class EncodedCompletions:
    """Questions with completions.

    Attributes:
        encodings: For each question, the encoding of its prompt up to where the completion begins.
        completions: For each question, the token ids of its completions.
        written: For each question, the values that a token of a completion appends to the inputs (see :func:`extend`).
        images: For each question, the name of its image; questions about different images have different names.
    """

    encodings: list[Encoding]
    completions: list[list[list[int]]]
    written: list[Encoding]
    images: list[str]

    def select(self, questions: Sequence[int]) -> "EncodedCompletions":
        """Returns some of the questions.

        Args:
            questions: Indices of the questions.
        """
        return EncodedCompletions(
            [self.encodings[place] for place in questions],
            [self.completions[place] for place in questions],
            [self.written[place] for place in questions],
            [self.images[place] for place in questions],
        )

    def sequences(self) -> list[dict[str, Tensor]]:
        """Returns the inputs of each prompt followed by a completion."""
        asked = zip(self.encodings, self.completions, self.written, strict=True)
        return [extend(encoding, tokens, written) for encoding, those, written in asked for tokens in those]

    @property
    def tokenwise(self) -> set[str]:
        """Names of the inputs with a value per token."""
        return {"input_ids", *self.written[0]}

    def image_numbers(self) -> list[int]:
        """Returns a number per question; those of two questions are equal if all their inputs except the tokens are."""
        numbers: list[int] = []
        seen: dict[str, list[int]] = {}
        for place, (name, encoding) in enumerate(zip(self.images, self.encodings, strict=True)):
            firsts = seen.setdefault(name, [])
            equal = (first for first in firsts if self._alike(encoding, self.encodings[first]))
            numbers.append(next(equal, place))
            if numbers[-1] == place:
                firsts.append(place)
        return numbers

    def _alike(self, one: Encoding, other: Encoding) -> bool:
        names = one.keys() - self.tokenwise
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in names)


class Scoring:
    """Computes the hidden states that predict completions.

    Attributes:
        last: Output of the head for the first token of each row of the last forward pass, and the logits that the model
            returned for it.

    Args:
        vlm: The model, a :class:`safervlm.vlm.auto.Transformers`.
    """

    def __init__(self, vlm: Any) -> None:
        self.vlm = vlm
        self.works: bool | None = None  # whether rows may be packed; None until this was tested
        self.last: tuple[Tensor, Tensor] | None = None

    def states(self, asked: EncodedCompletions) -> tuple[Targets, Tensor]:
        """Computes the hidden states that predict the tokens of all completions.

        Args:
            asked: Questions with completions.

        Returns:
            The tokens, and the (N, H) hidden states that predict them.
        """
        packed = self._packed(asked)
        return self._alone(asked) if packed is None else self._together(asked, packed)

    def _packed(self, asked: EncodedCompletions) -> Packed | None:
        """Packs the completions; None if they share nothing, or the model does not support it."""
        numbers = asked.image_numbers()
        if len(set(numbers)) == sum(map(len, asked.completions)) or not asked.tokenwise <= TOKENWISE:
            return None
        if self.works is None:
            self.works = self._works(asked, numbers)
        return self._rows(asked, numbers) if self.works else None

    def _rows(self, asked: EncodedCompletions, numbers: Sequence[int]) -> Packed | None:
        """Packs the completions; None if a row would have no image in its beginning, or one after it."""
        prompts = [encoding["input_ids"][0].tolist() for encoding in asked.encodings]
        packed = pack_completions(numbers, prompts, asked.completions)
        placed = torch.isin(packed.input_ids, torch.tensor(sorted(self.vlm.image_token_ids)))
        alone = len(packed.rows) == len(packed.input_ids)
        if alone or (placed & (packed.segments > 0)).any() or not placed.any(-1).all():
            return None
        return packed.to(asked.encodings[0]["input_ids"].device)

    def _together(self, asked: EncodedCompletions, packed: Packed) -> tuple[Targets, Tensor]:
        """Computes packed rows."""
        # Inputs of each sequence in a separate row; a token of a row has those of a sequence that contains it.
        alone = [
            {name: value for name, value in sequence.items() if not value.is_floating_point()}
            for sequence in asked.sequences()
        ]
        each = join(alone, self.vlm.pad_token_id, self.vlm.dtype)
        positions = position_ids(self.vlm.base, each["input_ids"], each)
        place = (packed.sequences, packed.position_ids)
        questions = [asked.encodings[question] for question in packed.questions.tolist()]
        images = join(
            [
                {name: value for name, value in encoding.items() if name not in asked.tokenwise}
                for encoding in questions
            ],
            self.vlm.pad_token_id,
            self.vlm.dtype,
        )
        mask = packed.attention_mask()
        assert mask is not None  # noqa: S101 (something is shared; for the type checker)
        inputs: dict[str, Any] = dict(images)
        for name in asked.tokenwise:
            # A prompt may begin with the image: padding with its first token would add a placeholder.
            filler = self.vlm.pad_token_id if name == "input_ids" else 0
            inputs[name] = each[name][place].masked_fill(packed.segments < 0, filler)
        inputs |= {"attention_mask": additive(mask, self.vlm.dtype), "position_ids": positions[..., *place]}
        states = self._forward(inputs)
        rows = packed.rows[:, None].expand_as(packed.source)
        return packed, states[rows[packed.mask], packed.source[packed.mask]]

    def _alone(self, asked: EncodedCompletions) -> tuple[Targets, Tensor]:
        """Computes a row per completion."""
        tokens = [tokens for those in asked.completions for tokens in those]
        device = asked.encodings[0]["input_ids"].device
        target = pad_sequence([torch.tensor(each) for each in tokens], batch_first=True).to(device)
        lengths = torch.tensor([len(each) for each in tokens], device=device)
        mask = torch.arange(target.shape[1], device=device) < lengths[:, None]
        sequences = asked.sequences()
        together = [[sequence] for sequence in sequences] if self.vlm.one_by_one else [sequences]
        states = [row for rows in together for row in self._forward(join(rows, self.vlm.pad_token_id, self.vlm.dtype))]
        ends = [sequence["input_ids"].shape[1] - 1 for sequence in sequences]
        sources = zip(states, ends, tokens, strict=True)
        return Targets(target, mask), torch.cat([row[end - len(each) : end] for row, end, each in sources])

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        """Returns the hidden states before the head."""
        kept: list[Tensor] = []
        bare: list[Tensor] = []

        def keep(head: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
            kept.append(states[0])
            return (states[0][:, :1],)  # saves the model's own head from computing all logits

        def keep_output(head: nn.Module, states: Any, output: Tensor) -> None:
            bare.append(output.detach().clone())  # a model may change it in place

        head = self.vlm.base.get_output_embeddings()
        with head.register_forward_pre_hook(keep), head.register_forward_hook(keep_output):
            logits = self.vlm.base(**inputs, use_cache=False).logits
        self.last = (bare[-1], logits.detach())
        return kept[-1]

    @torch.no_grad()
    def _works(self, asked: EncodedCompletions, numbers: Sequence[int]) -> bool | None:
        """Returns whether the completions about an image have the same states in packed rows and in separate rows.

        Returns None if these questions are not sufficient to decide it.
        """
        if self.vlm.one_by_one or not self.vlm.sharing.plain or not accepts_attention_mask(self.vlm.base):
            return False
        completions = Counter(number for number, those in zip(numbers, asked.completions, strict=True) for _ in those)
        image = completions.most_common(1)[0][0]
        trial = asked.select([place for place, number in enumerate(numbers) if number == image])
        packed = self._rows(trial, [image] * len(trial.images))
        if packed is None:
            return None
        with evaluated(self.vlm.base), torch.autocast(packed.input_ids.device.type, enabled=False):
            _, alone = self._alone(trial)
            # The model's code may accept no mask or no positions per token.
            together = attempt(lambda: self._together(trial, packed)[1])
            same = isinstance(together, Tensor) and agree(alone, together, self.vlm.dtype)
        if not same:
            warn("completions are scored one per row: this model does not support sharing their image and prompt")
        return same
