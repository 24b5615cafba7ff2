"""The surface that measurement and objectives see of a vision-language model.

Measuring needs :class:`VLM`, which answers; training needs :class:`safervlm.vlm.local.LocalVLM`, whose weights are
here.

Shapes: B questions of a batch, C completions in all, T tokens of the longest completion, V words of the vocabulary, H
hidden units.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from safervlm.errors import RecordError
from safervlm.io.texts import tokenizable
from safervlm.records import Example, Question
from safervlm.vlm.lora import Adapter
from safervlm.vlm.sampling import Sampling

CHARACTERS = 64  # of a token, on average over a text: more than in any text that people read


def tokenizable_example(example: Example, max_length: int) -> Example:
    """Replaces halves of surrogate pairs in the question and the completions of an example; its id stays.

    Args:
        example: as the dataset has it.
        max_length: tokens that the model takes.

    Returns:
        The example as a tokenizer takes it.

    Raises:
        RecordError: a text is so long that it can't fit, which is known without the minutes of tokenising it.
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
    """What a collator makes of examples: the questions, and the tensors that a family needs.

    No dataclass: where Lightning converts a batch (DeepSpeed, or a true half precision) it would go into one, down to
    the questions, which are frozen. The VLM converts what it reads.

    Args:
        questions: the B questions.
    """

    def __init__(self, questions: list[Question]) -> None:
        self.questions = questions

    def __len__(self) -> int:
        return len(self.questions)

    def to(self, device: torch.device) -> Self:
        """The same on another device; Lightning calls it."""
        return self

    @abstractmethod
    def select(self, rows: Tensor, answers: Sequence[Sequence[int]] | None = None) -> Self:
        """Some of the questions, each with its generated answer as its one completion.

        Args:
            rows: the numbers of the questions.
            answers: the tokens of the answer to each of the B questions; none to generate.
        """


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
        token_ids: the generated tokens, the end token included; a server tells only how many there are, and 0 stands
            for a number that is not known.
        text: without special tokens.
        finish_reason: ``stop`` when the VLM ended the answer, ``length`` when the limit did; ``refusal`` when a server
            marks the text as one, ``content_filter`` when its filter cut the answer, mostly to nothing. Any other is a
            server's own word for an answer that ended by itself.
    """

    token_ids: Sequence[int]
    text: str
    finish_reason: str


class Unanswered(RecordError):  # noqa: N818 (what happened, not what is wrong)
    """A question got no answer; of a whole batch, it comes when all others have theirs.

    Attributes:
        answers: one a question of the batch, in its order: the answer, or a line that says why there is none.
    """

    def __init__(self, reason: str, answers: Sequence[Generation | str] = ()) -> None:
        super().__init__(reason)
        self.answers = list(answers)


NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite); try vlm.dtype float32, or look at the image and the question"
)


def answered(questions: Sequence[Question], generations: Sequence[Generation], bad: Sequence[bool]) -> list[Generation]:
    """The answers of a batch, if the logits of all of them were finite.

    Args:
        questions: the B questions.
        generations: the B answers.
        bad: of each question, whether a logit was NaN or infinite.

    Raises:
        Unanswered: some weren't; it holds the other answers.
    """
    if not any(bad):
        return list(generations)
    answers: list[Generation | str] = [
        f"{question.id}: {NOT_FINITE}" if wrong else generation
        for question, generation, wrong in zip(questions, generations, bad, strict=True)
    ]
    raise Unanswered(next(answer for answer in answers if isinstance(answer, str)), answers)


Collator = Callable[[Sequence[Example]], Any]


class VLM(nn.Module, ABC):
    """A vision-language model that answers questions about images."""

    @property
    @abstractmethod
    def collator(self) -> Collator:
        """Makes a batch of examples; picklable, and holds no weights."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer, as plain JSON values."""

    @abstractmethod
    def load(self) -> None:
        """Gets ready to answer; a second call does nothing."""

    @abstractmethod
    def generate(self, batch: Any, sampling: Sampling, seed: int, adapter: Adapter = "policy") -> list[Generation]:
        """Answers the questions of a batch.

        Args:
            batch: its completions, if any, are not looked at.
            sampling: how to draw.
            seed: the noise of a record's answer is drawn from (seed, record id, step) and nothing else.
            adapter: which weights answer; without adapters every choice is the base model.
        """
