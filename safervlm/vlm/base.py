"""The whole surface that objectives and measurement see of a vision-language model.

Everything that trains asks the same thing: how likely are these completions of this prompt? :meth:`VLM.score` answers
it once for all of them: the image is encoded once, the prompt is computed once for all its completions, and the head
runs on response positions alone.

Shapes: B questions of a batch, I different images, C completions in all, T tokens of the longest completion, L tokens
of the longest packed row, V words of the vocabulary, H hidden units.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.utils.hub import cached_file, extract_commit_hash

from safervlm.records import Example, Question, fingerprint, seed_for
from safervlm.vlm.lora import Adapter, LoRA, active, checkpoint_gradients


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the defaults are the published measurement's.

    Args:
        temperature: the logits are divided by it; 0 takes the most probable token (greedy).
        top_p: draws from the smallest set of tokens whose probabilities sum to at least this (arXiv:1904.09751).
        max_new_tokens: an answer that has not ended after so many tokens is cut.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuses values that draw nothing."""
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature: 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens: at least 1, got {self.max_new_tokens}")


@dataclass
class Packed:
    """Prompts with their completions, a row a prompt: ``prompt | completion 1 | completion 2 | padding``.

    Attributes:
        input_ids: (B, L) tokens, padded on the right.
        segments: (B, L) 0 for the prompt, k for its k-th completion, -1 for padding.
        position_ids: (B, L) each completion's positions go on from the prompt's end, as if it stood alone.
        rows: (C,) the row of each completion; a row's completions stand one after the other.
        source: (C, T) the position in the row whose hidden state predicts each response token.
        target: (C, T) the response tokens, 0 where there is none.
        mask: (C, T) True at response tokens.
    """

    input_ids: Tensor
    segments: Tensor
    position_ids: Tensor
    rows: Tensor
    source: Tensor
    target: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})

    def attention_mask(self) -> Tensor | None:
        """(B, 1, L, L), True where a query may see a key: the prompt and its own completion, up to itself.

        None where each row holds one completion: the padding comes last, so causal attention alone is right, and the
        fastest kernels take no mask.
        """
        if len(self.rows) == len(self.input_ids):
            return None
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        length = self.input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        # Padding sees itself: attention over nothing would be NaN.
        allowed = causal & ((key == 0) | (key == query))
        return (allowed | torch.eye(length, dtype=torch.bool, device=query.device))[:, None]


class Batch:
    """What a collator makes of examples.

    No dataclass: where Lightning converts a batch (DeepSpeed, or a true half precision) it would go into one, down to
    the questions, which are frozen. The VLM converts what it reads.

    Args:
        questions: the B questions.
        prompt_ids: the B prompts' tokens, image placeholders included, unpadded.
        pixel_values: (I, 3, height, width) the different images of the batch.
        image_rows: (B,) the image of each question.
        packed: the prompts with their completions; None where there is nothing to score.
        features: (I, image tokens, H) the encoded images, filled by the VLM when it first needs them.
    """

    def __init__(
        self,
        questions: list[Question],
        prompt_ids: list[list[int]],
        pixel_values: Tensor,
        image_rows: Tensor,
        packed: Packed | None = None,
        features: Tensor | None = None,
    ) -> None:
        self.questions, self.prompt_ids = questions, prompt_ids
        self.pixel_values, self.image_rows = pixel_values, image_rows
        self.packed, self.features = packed, features

    def __len__(self) -> int:
        return len(self.questions)

    def to(self, device: torch.device) -> Self:
        """The same on another device; Lightning calls it."""
        parts = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor | Packed)}
        return type(self)(**vars(self) | parts)

    def select(self, rows: Tensor, answers: Sequence[Sequence[int]]) -> "Batch":
        """Some of the questions, each with its generated answer as its one completion.

        Args:
            rows: the numbers of the questions.
            answers: the tokens of the answer to each of the B questions.
        """
        chosen = rows.tolist()
        prompts = [self.prompt_ids[row] for row in chosen]
        return Batch(
            questions=[self.questions[row] for row in chosen],
            prompt_ids=prompts,
            pixel_values=self.pixel_values,
            image_rows=self.image_rows[rows.to(self.image_rows.device)],
            packed=pack(prompts, [[answers[row]] for row in chosen]).to(self.image_rows.device),
            features=self.features,
        )


@dataclass
class Scores:
    """What :meth:`VLM.score` says of C completions, at response positions only.

    Attributes:
        logprobs: (C, T) log-probability of each response token, 0 where there is none.
        mask: (C, T) True at response tokens.
        entropy: (C, T) of the next-token distribution, in nats; None unless asked for.
        hidden: (C, T, H) the hidden states that predict the tokens; None unless asked for.
    """

    logprobs: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Generation:
    """An answer as it was generated.

    Attributes:
        token_ids: the generated tokens, the end token included.
        text: without special tokens.
        finish_reason: ``stop`` when the VLM ended the answer, ``length`` when the limit did.
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]


Collator = Callable[[Sequence[Example]], Batch]


def pack(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> Packed:
    """Packs each prompt with its completions into one row.

    Args:
        prompts: B prompts' tokens.
        completions: for each of the B prompts, the tokens of its completions (at least one, none of them empty).
    """
    ids, segments, positions, rows, source, target = [], [], [], [], [], []
    for row, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
        row_ids, row_segments, row_positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
        for number, answer in enumerate(answers, 1):
            start = len(row_ids)
            # The prompt's last token predicts the first response token; each response token predicts the next.
            source.append(torch.tensor([len(prompt) - 1, *range(start, start + len(answer) - 1)]))
            target.append(torch.tensor(answer))
            rows.append(row)
            row_ids += answer
            row_segments += [number] * len(answer)
            row_positions += range(len(prompt), len(prompt) + len(answer))
        ids.append(torch.tensor(row_ids))
        segments.append(torch.tensor(row_segments))
        positions.append(torch.tensor(row_positions))
    lengths = torch.tensor([len(answer) for answer in target])
    return Packed(
        input_ids=pad_sequence(ids, batch_first=True),
        segments=pad_sequence(segments, batch_first=True, padding_value=-1),
        position_ids=pad_sequence(positions, batch_first=True),
        rows=torch.tensor(rows),
        source=pad_sequence(source, batch_first=True),
        target=pad_sequence(target, batch_first=True),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
    )


class KeyedNoise:
    """Turns argmax into sampling: adds Gumbel noise drawn from (seed, record id), one draw a step.

    ``argmax(logits + Gumbel noise)`` is a draw from ``softmax(logits)``. Each record has its own generator: what is
    drawn for it depends neither on its neighbours nor on the batch, the order or the number of processes. The noise is
    drawn on the CPU, so that it doesn't depend on the device either.

    Args:
        seeds: one a row of the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Adds the next step's noise to (B, V) scores."""
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64) for generator in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform))
        return scores + gumbel.to(scores.device, torch.float32)


class Suppress:
    """Makes tokens impossible.

    Args:
        token_ids: the tokens that an answer must not contain.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids = token_ids

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Sets their scores, in the last dimension, to minus infinity."""
        return scores.float().index_fill(-1, self.token_ids.to(scores.device), -torch.inf)


class VLM(nn.Module, ABC):
    """A vision-language model with LoRA adapters; a family fills in how it is loaded and how it sees an image.

    Building one costs nothing: the weights are read by :meth:`load`, the processor by the first use of ``collator``.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model and its processor.
        revision: branch, tag or commit of a model on the Hub; a commit makes a run repeatable.
        adapter: PEFT folder of the adapter to measure with, for example ``runs/ppo/adapter``; none for the base model.
        lora: the adapter that training makes.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        adapter: str | None = None,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
            raise ValueError(f"adapter: no adapter_config.json in {adapter!r}; give the PEFT folder that fit exported")
        self.name, self.revision, self.adapter, self.lora = model, revision, adapter, lora
        self.dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self.gradient_checkpointing = gradient_checkpointing
        self.model: PreTrainedModel | PeftModel | None = None

    @property
    @abstractmethod
    def collator(self) -> Collator:
        """Makes a :class:`Batch` of examples; holds the processor and settings, none of the weights."""

    @abstractmethod
    def load_base(self) -> PreTrainedModel:
        """Reads the base weights."""

    @abstractmethod
    def language_model(self) -> PreTrainedModel:
        """The part whose layers LoRA adapts: embeddings in, hidden states out."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, height, width) -> (I, image tokens, H): the images as the language model sees them."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The placeholder that an image's features replace."""

    @property
    @abstractmethod
    def eos_token_id(self) -> int:
        """The token that ends an answer."""

    @property
    @abstractmethod
    def suppressed(self) -> Tensor:
        """Tokens that an answer never contains: special ones and those without a text."""

    @abstractmethod
    def decode(self, token_ids: list[int]) -> str:
        """The text of generated tokens."""

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "model": self.name,
            "revision": self.revision,
            "weights": weights_fingerprint(self.name, self.revision),
            "adapter": self.adapter and {"folder": self.adapter, "sha256": adapter_fingerprint(self.adapter)},
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def load(self, train: Sequence[Adapter] = (), seed: int = 0) -> None:
        """Reads the weights and adds the adapters; a second call does nothing.

        Args:
            train: the adapters to train, new ones; none to measure with the ``adapter`` of the settings.
            seed: the new adapters' first weights are drawn from it.
        """
        if self.model is not None:
            return
        base = self.load_base().requires_grad_(False)
        if not train:
            self.model = base if self.adapter is None else load_adapter(base, self.adapter)
            self.eval()
            return
        if self.adapter is not None:
            raise ValueError(
                f"vlm.adapter: {self.adapter!r} is given, but training starts from the base model, which is also the "
                "reference; leave it out"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed_for(seed, "lora"))
            policy, *others = train
            if policy != "policy":
                raise ValueError(f"train: the first adapter is the policy, got {policy!r}")
            model = get_peft_model(base, self.lora.to_peft())
            for other in others:
                model.add_adapter(other, self.lora.to_peft())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        self.model = model
        self.train()  # the base comes in eval mode, and Lightning leaves modes as they are
        if self.gradient_checkpointing:
            checkpoint_gradients(self.language_model())

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, with whatever adapters stand in its layers."""
        if self.model is None:
            raise RuntimeError("the weights are not loaded: call load() first")
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def save_adapter(self, folder: Path) -> None:
        """Writes the policy as a PEFT folder that ``PeftModel.from_pretrained`` loads."""
        if not isinstance(self.model, PeftModel):
            raise TypeError("there is no adapter to save: the VLM was loaded without one")
        self.model.save_pretrained(str(folder), selected_adapters=["default"], safe_serialization=True)

    def embed(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """(B, L) tokens -> (B, L, H) embeddings, each image's features in the place of its placeholders."""
        if batch.features is None:
            # LoRA is on the language layers alone: no gradient flows into the vision tower.
            with torch.no_grad():
                batch.features = self.encode_images(batch.pixel_values)
        embeddings = self.base.get_input_embeddings()(input_ids)
        features = batch.features[batch.image_rows].to(embeddings.dtype)
        placeholders = input_ids == self.image_token_id
        return embeddings.masked_scatter(placeholders[..., None], features)

    def score(
        self,
        batch: Batch,
        adapter: Adapter = "policy",
        sampling: Sampling | None = None,
        entropy: bool = False,
        hidden: bool = False,
    ) -> Scores:
        """How likely the completions of a batch are.

        Args:
            batch: with completions.
            adapter: which weights answer; ``reference`` is the base model.
            sampling: None for the model's own distribution; with it, the one that :meth:`generate` draws from (the
                temperature, and what it suppresses; top_p has to be 1, a cut-off has no gradient).
            entropy: also give the entropies.
            hidden: also give the hidden states.
        """
        if sampling is not None and sampling.top_p < 1:
            raise ValueError(f"sampling.top_p: scoring needs 1, got {sampling.top_p}")
        packed, states = self._response_states(batch, adapter)
        logits = self.base.get_output_embeddings()(states).float()
        if sampling is not None:
            logits = Suppress(self.suppressed)(None, logits) / sampling.temperature
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, packed.target[packed.mask][:, None])[:, 0]
        scores = Scores(_unflatten(chosen, packed.mask), packed.mask)
        if entropy:
            # 0 log 0 is 0, also for suppressed tokens.
            flat = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
            scores.entropy = _unflatten(flat, packed.mask)
        if hidden:
            scores.hidden = _unflatten(states, packed.mask)
        return scores

    def hidden(self, batch: Batch, adapter: Adapter) -> Tensor:
        """(C, T, H) the hidden states that predict the response tokens, 0 where there is none; no head is run."""
        packed, states = self._response_states(batch, adapter)
        return _unflatten(states, packed.mask)

    def _response_states(self, batch: Batch, adapter: Adapter) -> tuple[Packed, Tensor]:
        """(N, H) the hidden states that predict the N response tokens of the batch."""
        packed = batch.packed
        if packed is None:
            raise ValueError("the batch has no completions to score")
        mask = packed.attention_mask()
        with active(self.base, adapter):
            states = self.language_model()(
                inputs_embeds=self.embed(packed.input_ids, batch),
                attention_mask=mask,
                position_ids=packed.position_ids if mask is not None else None,
                use_cache=False,
            ).last_hidden_state
        rows = packed.rows[:, None].expand_as(packed.source)
        return packed, states[rows[packed.mask], packed.source[packed.mask]]

    @torch.no_grad()
    def generate(self, batch: Batch, sampling: Sampling, seed: int, adapter: Adapter = "policy") -> list[Generation]:
        """Answers the questions of a batch.

        Args:
            batch: its completions, if any, are not looked at.
            sampling: how to draw.
            seed: the noise of a record's answer is drawn from (seed, record id, step) and nothing else.
            adapter: which weights answer; without adapters every choice is the base model.
        """
        length = max(map(len, batch.prompt_ids))
        # Padded on the left: the answers start at one column. A padded position is masked, whatever stands there.
        device = batch.image_rows.device
        ids = torch.full((len(batch), length), self.eos_token_id)
        mask = torch.zeros(len(batch), length, dtype=torch.long)
        for row, prompt in enumerate(batch.prompt_ids):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        processors = LogitsProcessorList([Suppress(self.suppressed)])
        if sampling.temperature > 0:
            processors += [
                TemperatureLogitsWarper(sampling.temperature),
                TopPLogitsWarper(sampling.top_p),
                KeyedNoise([seed_for(seed, question.id) for question in batch.questions]),
            ]
        training = self.training
        self.eval()  # no dropout, and a cache also where gradients are checkpointed
        with active(self.base, adapter):
            generated = self.base.generate(
                inputs_embeds=self.embed(ids, batch),
                attention_mask=mask,
                logits_processor=processors,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=self.eos_token_id,
                    pad_token_id=self.eos_token_id,
                ),
            ).tolist()
        self.train(training)
        return [self._generation(tokens) for tokens in generated]

    def _generation(self, tokens: list[int]) -> Generation:
        stopped = self.eos_token_id in tokens
        if stopped:
            tokens = tokens[: tokens.index(self.eos_token_id) + 1]
        return Generation(tokens, self.decode(tokens), "stop" if stopped else "length")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Says in one line that a model can't be read, and what to do; the library says it in a page."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"vlm.model: {name!r} can't be read ({str(error).strip().splitlines()[0]}); give a folder that "
            "save_pretrained wrote, or a name on the Hugging Face Hub (`hf auth login` for a gated model)"
        ) from error


def weights_fingerprint(name: str, revision: str | None) -> str | None:
    """What tells a model's weights from others under the same name.

    Args:
        name: a folder, whose configuration and weights are hashed, or a name on the Hub, whose commit is given.
        revision: on the Hub.
    """
    folder = Path(name)
    if folder.is_dir():
        return fingerprint(folder / "config.json", *sorted(folder.glob("*.safetensors")))
    with reading(name):
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def adapter_fingerprint(folder: str) -> str:
    """The fingerprint of an adapter's weights and configuration."""
    return fingerprint(*(Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")))


def load_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """The model with the adapter of a PEFT folder.

    Raises:
        ValueError: the adapter's keys don't fit the model; PEFT would load it without effect and only warn.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        model = PeftModel.from_pretrained(base, folder)
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        wrong = set(file.keys()) ^ set(get_peft_model_state_dict(model))
    if wrong:
        raise ValueError(
            f"adapter: {folder!r} was not made for {base.config.name_or_path!r}: {len(wrong)} weights don't fit, "
            f"for example {min(wrong)}; give the base model that it was trained on"
        )
    return model


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """(N, ...) values at the N true places of a (C, T) mask -> (C, T, ...), 0 elsewhere."""
    index = mask.nonzero(as_tuple=True)
    return flat.new_zeros(*mask.shape, *flat.shape[1:]).index_put(index, flat)
