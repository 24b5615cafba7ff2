"""Locally loaded vision-language models: weights, LoRA adapters, and log-probabilities of completions.

Shapes: C completions, T tokens of the longest completion, N response tokens in total, V tokens of the vocabulary, H
hidden units.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safervlm.errors import ArgumentError
from safervlm.finite import NotFiniteError, NotFiniteRecordError
from safervlm.hashing import seed_for
from safervlm.io.tables import say
from safervlm.limits import TextLimits
from safervlm.records import THINKING_UNFINISHED, Question
from safervlm.run_folder import RunFolder
from safervlm.vlm.adapters import adapter_fingerprint, adapter_weights, export_adapter, load_adapter
from safervlm.vlm.base import (
    NOT_FINITE,
    VLM,
    Answer,
    Generation,
    Scores,
    Unanswered,
    WordProbabilities,
    replace_not_finite,
)
from safervlm.vlm.decoding import DecodedTokens, Decoder, Decoding, Rows
from safervlm.vlm.graphs import capture_for
from safervlm.vlm.heads import LogitTransform
from safervlm.vlm.layers import evaluated
from safervlm.vlm.lean import lean_lora
from safervlm.vlm.lora import (
    AdaptedLayers,
    Adapter,
    LoRA,
    active,
    adapted_layers,
    add_adapters,
    checkpoint_gradients,
    require_coverage,
)
from safervlm.vlm.noise import NOISE
from safervlm.vlm.odds import probabilities
from safervlm.vlm.sampling import Choice, Sampling, Suppress
from safervlm.vlm.thinking import Thinking
from safervlm.vlm.weights import weights_fingerprint


@dataclass
class Targets:
    """Response tokens of C completions.

    Attributes:
        target: (C, T) token ids; 0 outside the mask.
        mask: (C, T) True at response tokens.
    """

    target: Tensor
    mask: Tensor


class LocalVLM(VLM):
    """Abstract VLM with LoRA adapters; a subclass defines how weights are loaded and how images are represented.

    The constructor is cheap: weights are loaded by :meth:`load`, and the processor on first access of ``collator``.

    Args:
        model: Name on the Hugging Face Hub, or folder, of the model and its processor.
        revision: Branch, tag or commit of a model on the Hub. A commit makes a run reproducible.
        adapter: PEFT folder of the adapter to measure, for example ``runs/ppo/adapter``. None for the base model.
        lora: Settings of the LoRA adapters that training creates.
        dtype: Data type of the base weights. Adapter weights stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass. Takes less memory and about a third more
            time.
        limits: Limits of texts and of the time to render or match them.
        decoding: How the steps of generation are computed.

    Attributes:
        decoded: How the last responses were decoded: the kind of the ``steps`` (``growing``; ``fixed``; ``fixed,
            captured`` as CUDA graphs), and the ``reason`` if a faster kind is not used. Empty before the first.

    Raises:
        ArgumentError: The adapter folder is incomplete, or the model is a path that doesn't exist.
    """

    noise = NOISE

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        adapter: str | None = None,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
        limits: TextLimits = TextLimits(),  # noqa: B008 (frozen)
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
            inside = RunFolder(adapter).adapter
            hint = f"did you mean {inside}?" if inside.is_dir() else "give the PEFT folder that fit exported"
            raise ArgumentError(f"vlm.adapter: no adapter_config.json in {adapter!r}; {hint}")
        if adapter is not None:
            adapter_weights(adapter)
        if model.startswith((".", "/")) and not Path(model).is_dir():
            raise ArgumentError(
                f"vlm.model: no folder {model!r}; paths begin where the command is typed ({Path.cwd()}), and the "
                "pictograms are written by safervlm pictograms"
            )
        self.name, self.revision, self.adapter, self.lora = model, revision, adapter, lora
        self.dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self.gradient_checkpointing, self.limits, self.decoding = gradient_checkpointing, limits, decoding
        self.decoded: dict[str, str] = {}
        self.uncaptured = ""  # why no step of this model can be captured
        self.model: PreTrainedModel | PeftModel | None = None
        self.logit_transform: LogitTransform | None = None  # after the head; a subclass finds it
        self.adapted: AdaptedLayers | None = None  # what training adapts, known once the weights are loaded

    @classmethod
    def loads(cls, config: Mapping[str, Any]) -> bool:
        """Returns whether this class is the one to load a model, if no class is named (:mod:`safervlm.vlm.family`).

        Args:
            config: Content of the model's ``config.json``.
        """
        return False

    @abstractmethod
    def load_base(self) -> PreTrainedModel:
        """Loads the base weights."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    @property
    @abstractmethod
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a response."""

    @abstractmethod
    def response_states(self, batch: Any, adapter: Adapter) -> tuple[Targets, Tensor]:
        """Computes the hidden states that predict the response tokens of a batch.

        Args:
            batch: A batch with completions, made by the VLM's collator.
            adapter: Which adapter is active.

        Returns:
            The response tokens, and the (N, H) hidden states that predict them, in the order of the mask.
        """

    @property
    @abstractmethod
    def image_token_ids(self) -> set[int]:
        """Ids of the placeholder tokens of images."""

    @property
    def thinking(self) -> Thinking:
        """How the model marks its reasoning; by default it has none."""
        return Thinking()

    @property
    def mark_tokens(self) -> dict[int, str]:
        """Special tokens by id that belong to the marks of reasoning, and so may be generated."""
        return {}

    def require_thinking_preserved(self) -> None:
        """Validates, before training on given answers, that they don't train a thinking model not to think.

        Raises:
            ArgumentError: Training on given answers would train the model not to think.
        """

    @cached_property
    def suppressed(self) -> Tensor:
        """Tokens that a response never contains: special tokens except the end tokens, and ids without a text."""
        special = set(self.tokenizer.all_special_ids) | self.image_token_ids
        words = self.words
        never = (special | set(range(len(self.tokenizer), words))) - set(self.eos_token_ids)
        # A tokenizer may have more tokens than the head, for example after fine-tuning; those need no suppression.
        return torch.tensor(sorted(token for token in never if token < words), dtype=torch.long)

    @property
    def words(self) -> int:
        """V, the number of rows of the output head."""
        return int(self.base.get_output_embeddings().out_features)

    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "model": str(Path(self.name)),  # ./folder and folder are the same
            "revision": self.revision,
            "weights": weights_fingerprint(self.name, self.revision),
            "adapter": self.adapter and {"folder": self.adapter, "sha256": adapter_fingerprint(self.adapter)},
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def load(self, train: Sequence[Adapter] = (), seed: int = 0) -> None:
        """Loads the weights and adds the adapters; a second call does nothing.

        Args:
            train: Adapters to create for training; the first must be ``policy``. Empty to measure, with the adapter of
                the settings if there is one.
            seed: Seed of the initial weights of the new adapters.

        Raises:
            ArgumentError: The adapter can't be loaded; ``train`` is given together with an adapter, or doesn't begin
                with ``policy``; ``lora.target_modules`` is not usable with this model; or LoRA would adapt a smaller
                share of the language model than ``lora.min_coverage``.
        """
        if self.model is not None:
            return
        base = self.load_base().requires_grad_(False)
        if line := self.thinking.report():
            say(line)
        if not train:
            self.model = base
            if self.adapter is not None:
                self.model = load_adapter(base, self.adapter, self.describe()["weights"], self.limits.seconds)
            self.eval()
            return
        if self.adapter is not None:
            raise ArgumentError(
                f"vlm.adapter: {self.adapter!r} is given, but training starts from the base model, which is also the "
                "reference; leave it out (to resume a run, or to validate it, name its folder as --run)"
            )
        # Initialised on the CPU, wherever the base is: a seed determines the same adapter on every device.
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(seed_for(seed, "lora"))
            if train[0] != "policy":
                raise ArgumentError(f"train: the first adapter is the policy, got {train[0]!r}")
            self.adapted = adapted_layers(base, self.lora, self.limits.seconds)
            require_coverage(self.adapted, self.lora, self.name)
            model = add_adapters(base, self.lora, self.adapted, train)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        self.model = model
        self.train()  # the base is loaded in eval mode, and Lightning doesn't change modes
        if self.gradient_checkpointing:
            checkpoint_gradients(base)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; layers with running statistics (BatchNorm) stay in evaluation mode, because they are frozen.

        Args:
            mode: True to train, False to evaluate.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.training = False
        return self

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, including any adapter layers.

        Raises:
            RuntimeError: The weights are not loaded.
        """
        if self.model is None:
            raise RuntimeError("the weights are not loaded: call load() first")
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return int(self.base.get_output_embeddings().in_features)

    def save_adapter(self, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
        """Writes the policy adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

        Args:
            folder: Folder to write. An existing adapter in it is replaced.
            origin: Provenance for the adapter's seal: the settings of the training. By default only the settings of
                the VLM.

        Raises:
            ArgumentError: The adapter has NaN or infinite values, or is unchanged since its initialisation.
            TypeError: The VLM was loaded without an adapter.
        """
        if not isinstance(self.model, PeftModel):
            raise TypeError("there is no adapter to save: the VLM was loaded without one")
        export_adapter(self.model, folder, origin or {"vlm": self.describe(), "lora": self.lora.describe()})

    def score(
        self,
        batch: Any,
        adapter: Adapter = "policy",
        sampling: Sampling | None = None,
        entropy: bool = False,
        hidden: bool = False,
    ) -> Scores:
        """Computes the log-probabilities of the completions of a batch.

        Args:
            batch: A batch with completions.
            adapter: Which adapter is active; ``reference`` is the base model.
            sampling: Distribution to score. None for the model's own; otherwise the one that :meth:`generate` samples
                from, with temperature and suppressed tokens. ``top_p`` must be 1, because a cut-off has no gradient.
            entropy: Also compute the entropy of each next-token distribution.
            hidden: Also return the hidden states.

        Returns:
            The scores of the completions, in the order of the questions.

        Raises:
            ArgumentError: ``sampling.top_p`` is below 1.
            NotFiniteError: A log-probability is not finite. Checked only where gradients are disabled.
        """
        if sampling is not None and sampling.top_p < 1:
            raise ArgumentError(f"sampling.top_p: scoring needs 1, got {sampling.top_p}")
        targets, states = self.response_states(batch, adapter)
        with active(self.base, adapter):  # LoRA may adapt the head, too
            logits = self.base.get_output_embeddings()(states).float()
        if self.logit_transform is not None:
            logits = self.logit_transform(logits)
        if sampling is not None:
            logits = Suppress(self.suppressed)(None, logits) / sampling.temperature
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, targets.target[targets.mask][:, None])[:, 0]
        # With gradients, the loss is checked instead, by all processes together.
        if not torch.is_grad_enabled() and not bool(torch.isfinite(chosen).all()):
            raise NotFiniteError(f"vlm: {NOT_FINITE}, the first of them {batch.questions[0].id}")
        scores = Scores(_unflatten(chosen, targets.mask), targets.mask, targets.target)
        if entropy:
            # 0 log 0 = 0, also for suppressed tokens.
            flat = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
            scores.entropy = _unflatten(flat, targets.mask)
        if hidden:
            scores.hidden = _unflatten(states, targets.mask)
        return scores

    @torch.no_grad()
    def first_words(self, batch: Any) -> list[WordProbabilities | Unanswered]:
        """Computes in one pass how likely it is that an answer begins with the word for unsafe, or for safe.

        Args:
            batch: A batch made by the VLM's collator of :func:`safervlm.vlm.odds.with_words`.

        Raises:
            NotFiniteRecordError: A log-probability is not finite.
        """
        try:
            with evaluated(self):
                scores = self.score(batch)
        except NotFiniteError as error:  # of a record, not of the run
            raise NotFiniteRecordError(str(error)) from None
        return probabilities(batch.questions, scores, self.tokenizer.decode)

    def hidden(self, batch: Any, adapter: Adapter) -> Tensor:
        """Computes the hidden states that predict the response tokens, without the output head.

        Args:
            batch: A batch with completions.
            adapter: Which adapter is active.

        Returns:
            (C, T, H) hidden states; 0 outside the mask of response tokens.
        """
        targets, states = self.response_states(batch, adapter)
        return _unflatten(states, targets.mask)

    def answers(self, questions: Sequence[Question], decoded: DecodedTokens) -> list[Answer]:
        """Returns the response to each question, or why it has none: its logits were not finite.

        Args:
            questions: The questions.
            decoded: The tokens of their responses.
        """
        found = [self.generation(tokens) for tokens in decoded.tokens]
        if decoded.logprobs is not None:
            found = [
                replace(answer, token_logprobs=logprobs[: len(answer.token_ids)])
                for answer, logprobs in zip(found, decoded.logprobs, strict=True)
            ]
        return replace_not_finite(questions, found, decoded.bad)

    def decode(self, rows: Rows, keys: Sequence[int], sampling: Sampling, adapter: Adapter) -> DecodedTokens:
        """Decodes questions with steps of fixed shapes.

        Args:
            rows: The questions in rows.
            keys: Key of the noise of each question.
            sampling: Decoding settings.
            adapter: The active adapter.
        """
        device = self.base.get_output_embeddings().weight.device
        choice = Choice(sampling, self.suppressed.to(device), torch.tensor(self.eos_token_ids, device=device))
        capture = capture_for(device) if self.decoding.step == "automatic" and not self.uncaptured else None
        decoder = Decoder(rows, keys, choice, self.decoding.rows, capture)
        with lean_lora(self.base, adapter):
            found = decoder.run()
        self.uncaptured = self.uncaptured or decoder.graphs.reason
        self.record_decoding("fixed" if capture is None or self.uncaptured else "fixed, captured", self.uncaptured)
        return found

    def record_decoding(self, steps: str, reason: str = "") -> None:
        """Records how responses are decoded, for the log and the manifest.

        Args:
            steps: Kind of the steps.
            reason: Why no faster kind is used, or an empty text.
        """
        self.decoded = {"steps": steps} | ({"reason": reason} if reason else {})

    def generation(self, tokens: list[int]) -> Generation:
        """Decodes generated tokens, truncated after the first end token, and separates reasoning from the answer.

        Args:
            tokens: Generated token ids; anything may follow an end token.
        """
        end = next((place for place, token in enumerate(tokens) if token in self.eos_token_ids), None)
        if end is not None:
            tokens = tokens[: end + 1]
        marks = self.mark_tokens
        pieces, begin = [], 0
        for place in [place for place, token in enumerate(tokens) if token in marks]:
            pieces += [self.tokenizer.decode(tokens[begin:place], skip_special_tokens=True), marks[tokens[place]]]
            begin = place + 1
        pieces.append(self.tokenizer.decode(tokens[begin:], skip_special_tokens=True))
        parts = self.thinking.split("".join(pieces))
        answer = parts.answer
        for mark in marks.values():
            answer = answer.replace(mark, "")
        reason = THINKING_UNFINISHED if parts.unfinished else "length" if end is None else "stop"
        return Generation(tokens, answer.strip(), reason, parts.reasoning)


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Scatters (N, ...) values to the N true places of a (C, T) mask: (C, T, ...), 0 elsewhere."""
    index = mask.nonzero(as_tuple=True)
    return flat.new_zeros(*mask.shape, *flat.shape[1:]).index_put(index, flat)
