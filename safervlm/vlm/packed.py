"""VLMs that compute packed rows (:mod:`safervlm.vlm.packing`): questions about an image share its tokens.

Scoring packs the questions about an image with their completions, sampled responses included. Generation packs the
questions about an image, whose responses are decoded in parallel over one KV cache that is never copied per question.
Both require a language model with causal attention and rotary positions.

Shapes: B questions of a batch, I different images, R packed rows, Q questions of the longest row, K cached positions of
a row, C completions in total, L tokens of the longest row, V tokens of the vocabulary, H hidden units.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from safervlm.records import Question
from safervlm.vlm.base import Answer, Batch
from safervlm.vlm.cache import growing_cache
from safervlm.vlm.compat import CACHE
from safervlm.vlm.decoding import REQUESTED, DecodedTokens, Prompts, Rows
from safervlm.vlm.layers import evaluated
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.lora import Adapter, active
from safervlm.vlm.packing import Packed, additive, common_beginning, pack, pack_completions, questions_of_rows
from safervlm.vlm.sampling import Sampler, Sampling


class PackedBatch(Batch):
    """Batch of a family that packs rows, made by its collator.

    Args:
        questions: The B questions.
        prompt_ids: Token ids of the B prompts, including image placeholders, without padding.
        pixel_values: (I, 3, height, width) the different images of the batch.
        image_rows: (B,) index of the image of each question.
        packed: The prompts with their completions, one row per image; None if there are no completions to score.
        features: (I, image tokens, H) the encoded images; the VLM computes them on first use.
        samples: See :class:`safervlm.vlm.base.Batch`.
    """

    def __init__(
        self,
        questions: list[Question],
        prompt_ids: list[list[int]],
        pixel_values: Tensor,
        image_rows: Tensor,
        packed: Packed | None = None,
        features: Tensor | None = None,
        samples: list[int] | None = None,
    ) -> None:
        super().__init__(questions, samples)
        self.prompt_ids = prompt_ids
        self.pixel_values, self.image_rows = pixel_values, image_rows
        self.packed, self.features = packed, features

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device; called by Lightning.

        Args:
            device: The target device.
        """
        parts = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor | Packed)}
        return type(self)(**vars(self) | parts)

    def select(self, rows: Tensor, answers: Sequence[Sequence[int]] | None = None) -> Self:
        """Returns a batch of some of the questions, each with its generated response as its only completion.

        Args:
            rows: Indices of the questions to keep.
            answers: Token ids of the response to each of the B questions; None for a batch without completions.
        """
        chosen = rows.tolist()
        pixel_values, image_rows = self.pixel_values, self.image_rows[rows.to(self.image_rows.device)]
        prompts = [self.prompt_ids[row] for row in chosen]
        packed = None
        if answers:
            packed = pack_completions(image_rows.tolist(), prompts, [[answers[row]] for row in chosen])
            packed = packed.to(self.image_rows.device)
        if self.features is None:  # features that are already encoded are kept whole, and shared
            used, image_rows = image_rows.unique(return_inverse=True)
            pixel_values = pixel_values[used]
        return type(self)(
            questions=[self.questions[row] for row in chosen],
            prompt_ids=prompts,
            pixel_values=pixel_values,
            image_rows=image_rows,
            packed=packed,
            features=self.features,
            samples=[self.samples[row] for row in chosen],
        )


class PackedVLM(LocalVLM):
    """Abstract VLM whose language model accepts packed rows."""

    @abstractmethod
    def language_model(self) -> PreTrainedModel:
        """Returns the submodule whose layers LoRA adapts: embeddings in, hidden states out."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encodes images as input embeddings of the language model.

        Args:
            pixel_values: (I, 3, height, width) pixel values.

        Returns:
            (I, image tokens, H) image features.
        """

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """Id of the placeholder token that image features replace."""

    @property
    def image_token_ids(self) -> set[int]:
        """Set of the one placeholder id."""
        return {self.image_token_id}

    def embed(self, input_ids: Tensor, image_rows: Tensor, batch: PackedBatch) -> Tensor:
        """Embeds tokens, and replaces the placeholders of each row by the features of its image.

        Args:
            input_ids: (R, L) token ids.
            image_rows: (R,) index of the image of each row.
            batch: The batch; its images are encoded on first use.

        Returns:
            (R, L, H) embeddings.
        """
        if batch.features is None:
            # LoRA adapts the language layers only: the vision tower needs no gradient.
            with torch.no_grad():
                batch.features = self.encode_images(batch.pixel_values)
        embeddings = self.base.get_input_embeddings()(input_ids)
        features = batch.features[image_rows].to(embeddings.dtype)
        placeholders = input_ids == self.image_token_id
        return embeddings.masked_scatter(placeholders[..., None], features)

    def forward_packed(
        self, packed: Packed, image_rows: Tensor, batch: PackedBatch, cache: DynamicCache | None = None
    ) -> Tensor:
        """Computes the hidden states of packed rows.

        Args:
            packed: The packed rows.
            image_rows: (R,) index of the image of each row.
            batch: The batch with the images.
            cache: KV cache to write to; None writes to no cache.

        Returns:
            (R, L, H) hidden states.
        """
        mask, embeddings = packed.attention_mask(), self.embed(packed.input_ids, image_rows, batch)
        return self.language_model()(
            inputs_embeds=embeddings,
            attention_mask=None if mask is None else additive(mask, embeddings.dtype),
            position_ids=packed.position_ids if mask is not None else None,
            **{CACHE: cache},
            use_cache=cache is not None,
        ).last_hidden_state

    def response_states(self, batch: PackedBatch, adapter: Adapter) -> tuple[Packed, Tensor]:
        """Computes the hidden states that predict the response tokens.

        Args:
            batch: A batch with completions.
            adapter: Which adapter is active.

        Returns:
            The response tokens, and the (N, H) hidden states that predict them, for N response tokens in total.

        Raises:
            ValueError: The batch has no completions.
        """
        packed = batch.packed
        if packed is None:
            raise ValueError("the batch has no completions to score")
        with active(self.base, adapter):
            states = self.forward_packed(packed, batch.image_rows[packed.questions], batch)
        rows = packed.rows[:, None].expand_as(packed.source)
        return packed, states[rows[packed.mask], packed.source[packed.mask]]

    @torch.no_grad()
    def generate(self, batch: PackedBatch, sampling: Sampling, seed: int, adapter: Adapter = "policy") -> list[Answer]:
        """Generates a response to each question of a batch; questions about one image are decoded together.

        Args:
            batch: The questions with their images; completions are ignored.
            sampling: Decoding settings.
            seed: The sampling noise depends on (seed, record id, sample, step, token) and nothing else.
            adapter: Which adapter is active. Without adapters, every choice is the base model.

        Returns:
            For each question its response, or the reason why it has none: its logits were not finite.
        """
        keys = batch.noise_keys(seed)
        # Evaluation mode disables dropout, and allows a cache with gradient checkpointing.
        with evaluated(self), active(self.base, adapter):
            if self.decoding.step == "growing":
                self.record_decoding("growing", REQUESTED)
                decoded = self._decode(batch, sampling, keys)
            else:
                decoded = self.decode(PackedRows(self, batch), keys, sampling, adapter)
        return self.answers(batch.questions, decoded)

    def prefill(self, batch: PackedBatch, rows: Sequence[Sequence[int]]) -> tuple[Packed, Tensor, DynamicCache]:
        """Computes prompts, several in a row.

        Args:
            batch: The questions.
            rows: The questions of each row, all about one image.

        Returns:
            The packed rows, their (R, L, H) hidden states, and the KV cache.
        """
        starts = [common_beginning([batch.prompt_ids[question] for question in row]) for row in rows]
        rests = [[batch.prompt_ids[q][len(start) :] for q in row] for row, start in zip(rows, starts, strict=True)]
        packed = pack(starts, rests).to(batch.image_rows.device)
        cache = growing_cache()
        states = self.forward_packed(packed, batch.image_rows[[row[0] for row in rows]], batch, cache)
        return packed, states, cache

    def step(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Computes the hidden states of a token of each slot.

        Args:
            ids: (R, Q) token ids.
            positions: (R, Q) their positions.
            mask: (R, 1, Q, K) mask that attention adds to its scores.
            cache: The KV cache, which is written to.

        Returns:
            (R, Q, H) hidden states.
        """
        return self.language_model()(
            inputs_embeds=self.base.get_input_embeddings()(ids),
            attention_mask=mask,
            position_ids=positions,
            **{CACHE: cache},
            use_cache=True,
        ).last_hidden_state

    def _decode(self, batch: PackedBatch, sampling: Sampling, keys: list[int]) -> DecodedTokens:
        """Decodes with steps whose tensors grow."""
        rows = questions_of_rows(batch.image_rows.tolist())
        packed, states, cache = self.prefill(batch, rows)

        # State of each question that is still being decoded: row, hidden state, slot and position.
        asked = [question for row in rows for question in row]
        row, states = packed.rows, states[packed.rows, packed.ends]
        slot = packed.segments[row, packed.ends] - 1
        position = packed.position_ids[row, packed.ends]
        # Each step appends one column (slot) per question of a row. A slot attends to the beginning and its own tokens.
        segments = packed.segments
        slots = torch.arange(1, max(map(len, rows)) + 1, device=row.device).expand(len(rows), -1)
        itself = torch.eye(slots.shape[1], dtype=torch.bool, device=row.device)

        answers: list[list[int]] = [[] for _ in batch.questions]
        logprobs: list[list[float]] = [[] for _ in batch.questions]
        bad = [False] * len(answers)
        keys = [keys[question] for question in asked]
        head, sampler = self.base.get_output_embeddings(), Sampler(sampling, self.suppressed, keys, row.device)
        while True:
            tokens = sampler.choose(head(states))
            for question, token, wrong in zip(asked, tokens.tolist(), sampler.bad.tolist(), strict=True):
                answers[question].append(token)
                bad[question] = wrong
            if sampler.logprobs:
                for question, value in zip(asked, sampler.logprobs[-1].tolist(), strict=True):
                    logprobs[question].append(value)
            going = [
                place
                for place, question in enumerate(asked)
                if not bad[question]
                and len(answers[question]) < sampling.max_new_tokens
                and answers[question][-1] not in self.eos_token_ids
            ]
            if not going:
                return DecodedTokens(answers, bad, logprobs if sampler.logprobs else None)
            asked = [asked[place] for place in going]
            sampler.select(going)
            row, slot, position, tokens = row[going], slot[going], position[going] + 1, tokens[going]
            needed = row.unique()
            if 2 * len(needed) <= len(segments):  # otherwise copying the cache costs more than it saves
                cache.batch_select_indices(needed)
                segments, slots, row = segments[needed], slots[: len(needed)], torch.searchsorted(needed, row)

            ids, positions = torch.zeros_like(slots), torch.zeros_like(slots)
            ids[row, slot], positions[row, slot] = tokens, position
            seen = (segments[:, None] == 0) | (segments[:, None] == slots[:, :, None])
            mask = torch.cat([seen, itself.expand(len(seen), -1, -1)], dim=-1)[:, None]
            added = additive(mask, self.base.get_input_embeddings().weight.dtype)
            states = self.step(ids, positions, added, cache)[row, slot]
            segments = torch.cat([segments, slots], dim=1)


class PackedRows(Rows):
    """The questions of a batch, each row about one image.

    Args:
        vlm: The model.
        batch: The questions.
    """

    def __init__(self, vlm: PackedVLM, batch: PackedBatch) -> None:
        self.vlm, self.batch = vlm, batch
        self.questions = questions_of_rows(batch.image_rows.tolist())
        self.dtype = vlm.base.get_input_embeddings().weight.dtype

    def prefill(self, rows: Sequence[int]) -> Prompts:
        """Computes the prompts of some of the rows.

        Args:
            rows: Numbers of the rows.
        """
        packed, states, cache = self.vlm.prefill(self.batch, [self.questions[row] for row in rows])
        slots = torch.arange(1, self.slots + 1, device=states.device)
        segments = packed.segments[:, None]
        row, slot = packed.rows, packed.segments[packed.rows, packed.ends] - 1
        logits = self.vlm.base.get_output_embeddings()(states[row, packed.ends])
        prompts = Prompts(
            layers=[(layer.keys, layer.values) for layer in cache.layers],
            seen=(segments == 0) | (segments == slots[:, None]),
            positions=slots.new_zeros(len(rows), self.slots, 1),
            logits=logits.new_zeros(len(rows), self.slots, logits.shape[-1]),
        )
        prompts.positions[row, slot, 0] = packed.position_ids[row, packed.ends]
        prompts.logits[row, slot] = logits
        return prompts

    def logits(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Computes the (R, Q, V) logits that follow a token of each slot.

        Args:
            tokens: (R, Q) token ids.
            positions: (R, Q, 1) their positions.
            mask: (R, 1, Q, length) mask that attention adds to its scores.
            cache: KV cache that the step writes to and attends to.
        """
        states = self.vlm.step(tokens, positions[..., 0], mask, cache)
        return self.vlm.base.get_output_embeddings()(states)
