"""Abstract interface of vision-language models (VLMs).

Measurement needs :class:`VLM`, which generates responses. Training needs :class:`safervlm.vlm.local.LocalVLM`, whose
weights are loaded in this process.

Shapes: B questions of a batch, C completions in all, T tokens of the longest completion, V tokens of the vocabulary, H
hidden units.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from safervlm.errors import ArgumentError, RecordError
from safervlm.finite import NotFiniteRecordError
from safervlm.io.texts import tokenizable
from safervlm.records import THINKING_UNFINISHED, Example, Question
from safervlm.vlm.lora import Adapter
from safervlm.vlm.noise import noise_key
from safervlm.vlm.sampling import Sampling

CHARACTERS = 64  # upper bound on the mean number of characters per token; natural text stays below it


def tokenizable_example(example: Example, max_length: int) -> Example:
    """Replaces unpaired surrogates in the question and the completions of an example; its id is kept.

    Args:
        example: The example as the dataset provides it.
        max_length: Number of tokens that the model accepts.

    Returns:
        A copy of the example whose texts a tokenizer accepts.

    Raises:
        RecordError: A text has more than :data:`CHARACTERS` characters per accepted token. It can't fit, and tokenising
            it could take minutes.
    """
    for text in (example.question.prompt, *example.completions):
        if len(text) > CHARACTERS * max_length:
            raise RecordError(
                f"{example.question.id}: a text of {len(text)} characters, the model takes {max_length} tokens; "
                "shorten the question or its completion"
            )
    question = replace(example.question, prompt=tokenizable(example.question.prompt))
    return replace(example, question=question, completions=tuple(map(tokenizable, example.completions)))


class Batch(ABC):
    """Questions of a batch with the tensors that a model family needs; made by the family's collator.

    It is deliberately not a dataclass: where Lightning converts a batch (DeepSpeed, true half precision), it would
    descend into a dataclass, down to the questions, which are frozen. The VLM converts the tensors itself.

    Args:
        questions: The B questions.
        samples: For each question, the number of its sample, which is part of its noise key; by default 0.
    """

    def __init__(self, questions: list[Question], samples: list[int] | None = None) -> None:
        self.questions = questions
        self.samples = samples or [0] * len(questions)

    def __len__(self) -> int:
        return len(self.questions)

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device; called by Lightning.

        Args:
            device: The target device.
        """
        return self

    @property
    def image_names(self) -> list[str]:
        """For each question, the path of its image, or its own id if it has none."""
        return [question.image_path or question.id for question in self.questions]

    def noise_keys(self, seed: int) -> list[int]:
        """Returns the key of each question's sampling noise: (seed, record id, number of the sample).

        Args:
            seed: The seed of the sampling.
        """
        pairs = zip(self.questions, self.samples, strict=True)
        return [noise_key(seed, question.id, sample) for question, sample in pairs]

    def repeat(self, number: int) -> Self:
        """Returns a batch that asks each question several times in succession; equal images are kept once.

        Args:
            number: Number of samples of each question.
        """
        if number == 1:
            return self
        repeated = self.select(torch.arange(len(self)).repeat_interleave(number))
        repeated.samples = list(range(number)) * len(self)
        return repeated

    @abstractmethod
    def select(self, rows: Tensor, answers: Sequence[Sequence[int]] | None = None) -> Self:
        """Returns a batch of some of the questions, each with its generated response as its only completion.

        Args:
            rows: Indices of the questions to keep, in the order of the new batch; one may occur several times.
            answers: Token ids of the response to each of the B questions; None for a batch without completions.
        """


@dataclass
class Scores:
    """Per-token scores of C completions, returned by :meth:`safervlm.vlm.local.LocalVLM.score`.

    Attributes:
        logprobs: (C, T) log-probability of each response token, in nats; 0 outside the mask.
        mask: (C, T) True at response tokens.
        target: (C, T) ids of the response tokens; 0 outside the mask.
        entropy: (C, T) entropy of the next-token distribution, in nats; None unless requested.
        hidden: (C, T, H) hidden states that predict the tokens; None unless requested.
    """

    logprobs: Tensor
    mask: Tensor
    target: Tensor
    entropy: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Generation:
    """A generated response.

    Attributes:
        token_ids: Generated tokens, including the end token. For a server, only the length is meaningful, and 0 stands
            for an unknown length.
        text: Decoded answer without special tokens; without the reasoning of a thinking model.
        finish_reason: ``stop`` if the VLM ended the response, ``length`` if the token limit did, ``refusal`` if a
            server marks the text as a refusal, ``content_filter`` if the server's filter cut the response (often to an
            empty text), ``thinking unfinished`` if it ended inside its reasoning, without an answer. Any other value is
            the server's own value for a response that the VLM ended.
        reasoning: Reasoning of a thinking model before its answer; empty for none.
        token_logprobs: Log-probability of each token when it was sampled; None unless the sampling records them
            (:class:`safervlm.vlm.sampling.RecordedSampling`).
    """

    token_ids: Sequence[int]
    text: str
    finish_reason: str
    reasoning: str = ""
    token_logprobs: Sequence[float] | None = None

    @property
    def answered(self) -> bool:
        """Whether there is an answer; False for unfinished thinking."""
        return self.finish_reason != THINKING_UNFINISHED


@dataclass(frozen=True)
class WordProbabilities:
    """Log-probabilities, in nats, that an answer begins with the word that means unsafe, or with the one for safe.

    Attributes:
        unsafe: Log-probability of the word that means unsafe.
        safe: Log-probability of the word that means safe.
        bound: Whether one of them is an upper bound.
    """

    unsafe: float
    safe: float
    bound: bool = False


@dataclass(frozen=True)
class Unanswered:
    """A question without a response.

    Attributes:
        reason: Why there is none, in one line.
    """

    reason: str


@dataclass(frozen=True)
class UnansweredNotFinite(Unanswered):
    """A question without a response because the model's logits were not finite."""


Answer = Generation | Unanswered


NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite); try vlm.dtype float32, or check the image and the question"
)


def replace_not_finite(
    questions: Sequence[Question], generations: Sequence[Generation], bad: Sequence[bool]
) -> list[Answer]:
    """Replaces the responses whose logits were not finite.

    Args:
        questions: The B questions.
        generations: The B responses.
        bad: For each question, whether NaN or infinite logits occurred.

    Returns:
        The responses; an :class:`UnansweredNotFinite` in place of each replaced response.
    """
    return [
        UnansweredNotFinite(f"{question.id}: {NOT_FINITE}") if wrong else generation
        for question, generation, wrong in zip(questions, generations, bad, strict=True)
    ]


def require_responses(answers: Sequence[Answer]) -> list[Generation]:
    """Returns the responses of a batch, for training, which can't proceed if one is missing.

    Args:
        answers: Results of :meth:`VLM.generate`.

    Raises:
        RecordError: A question has no response; a :class:`NotFiniteRecordError` if its logits were not finite.
    """
    for answer in answers:
        if isinstance(answer, UnansweredNotFinite):
            raise NotFiniteRecordError(answer.reason)
        if isinstance(answer, Unanswered):
            raise RecordError(answer.reason)
    return [answer for answer in answers if isinstance(answer, Generation)]


Collator = Callable[[Sequence[Example]], Any]


class VLM(nn.Module, ABC):
    """Abstract base class of vision-language models that answer questions about images.

    Attributes:
        noise: Version of the sampling noise, a setting of the runs that sample; None where another program samples.
    """

    noise: ClassVar[int | None] = None

    @property
    @abstractmethod
    def collator(self) -> Collator:
        """Callable that makes a batch of examples; picklable, and without weights."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response, as plain JSON values."""

    @abstractmethod
    def load(self) -> None:
        """Prepares the VLM for generation; a second call does nothing."""

    @abstractmethod
    def generate(self, batch: Any, sampling: Sampling, seed: int, adapter: Adapter = "policy") -> list[Answer]:
        """Generates a response to each question of a batch.

        Args:
            batch: A batch made by :attr:`collator`; completions, if any, are ignored.
            sampling: Decoding settings.
            seed: The sampling noise depends on (seed, record id, sample, step, token) and nothing else.
            adapter: Which adapter is active. Without adapters, every choice is the base model.

        Returns:
            For each of the B questions, in order, its response, or the reason why it has none.
        """

    def first_words(self, batch: Any) -> list[WordProbabilities | Unanswered]:
        """Computes how likely it is that an answer begins with the word for unsafe, or for safe.

        Models without log-probabilities don't override this method.

        Args:
            batch: A batch made by :attr:`collator` of :func:`safervlm.vlm.odds.with_words`.

        Returns:
            For each of the B questions, in order, the log-probabilities, or the reason why there are none.

        Raises:
            ArgumentError: The model has no log-probabilities.
        """
        raise ArgumentError(f"model.odds: {type(self).__name__} has no log-probabilities; omit it")
