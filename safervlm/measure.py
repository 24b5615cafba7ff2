"""Measuring a VLM: a predict loop whose step generates."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import lightning as L
import torch

from safervlm.errors import UserError
from safervlm.failures import in_halves, reason_of
from safervlm.io.tables import say
from safervlm.ranges import in_range
from safervlm.records import Example, Failure, Question, Response
from safervlm.vlm.base import VLM, Collator, Generation, Unanswered
from safervlm.vlm.sampling import Sampling


@dataclass
class Asked:
    """A batch of questions, without those that can't be asked.

    Attributes:
        batches: what the VLM's collator made of the others; mostly one, several where they can't be collated together,
            none where no question is left.
        failed: the questions that can't be asked, and why.
    """

    batches: list[Any]
    failed: list[Failure]

    def to(self, device: torch.device) -> Self:
        """The same on another device; Lightning calls it."""
        return type(self)([batch.to(device) for batch in self.batches], self.failed)


@dataclass
class AskCollator:
    """Sets aside the questions for which a VLM's collator raises an exception: one of them must not end a run.

    Attributes:
        collator: the VLM's.
    """

    collator: Collator

    def __call__(self, examples: Sequence[Example]) -> Asked:
        """Collates them together, and one by one where that fails, to find the one to blame."""
        try:
            return Asked([self.collator(examples)], [])
        except BaseException as error:
            reason_of(error)
        good, failed = [], []
        for example in examples:
            try:
                self.collator([example])
                good.append(example)
            except BaseException as error:
                failed.append(Failure(example.question, reason_of(error)))
        # What can be collated one by one need not fit into memory together.
        batches, more = in_halves(good, self.collator)
        return Asked(batches, failed + [Failure(example.question, reason) for example, reason in more])


class Measure(L.LightningModule):
    """Asks a VLM the questions of the data and gives its answers.

    Args:
        vlm: the model to measure, with or without an adapter.
        sampling: how answers are drawn; the default is the published measurement's.
        seed: an answer's randomness is drawn from (seed, record id, step): neither the batch, the order nor the number
            of processes changes an answer in float32.
        failures_in_a_row: A question that raises an unexpected exception is recorded as failed. After so many of them
            without an answer in between the run stops, as its questions are not to blame. A question that the VLM
            itself leaves unanswered (no finite logits, a server that doesn't take it) or that doesn't fit into memory
            neither counts nor ends the count.

    Raises:
        ArgumentError: ``failures_in_a_row`` is less than 1.
    """

    def __init__(
        self,
        vlm: VLM,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        failures_in_a_row: int = 20,
    ) -> None:
        super().__init__()
        in_range("model", least=1, failures_in_a_row=failures_in_a_row)
        self.vlm, self.sampling, self.seed, self.failures_in_a_row = vlm, sampling, seed, failures_in_a_row
        self._in_a_row = 0
        self.largest: int | None = None  # batch that fits into memory, once a larger one didn't

    @property
    def collator(self) -> AskCollator:
        """Makes the batches; the CLI hands it to the data."""
        return AskCollator(self.vlm.collator)

    def describe(self) -> dict[str, Any]:
        """What decides an answer."""
        return {"vlm": self.vlm.describe(), "sampling": asdict(self.sampling), "seed": self.seed}

    def configure_model(self) -> None:
        """Reads the weights, if there is anything left to ask."""
        data = getattr(self._trainer, "datamodule", None)  # none where a loader alone is asked
        if data is None or data.remaining():
            self.vlm.load()

    def predict_step(self, asked: Asked, batch_idx: int) -> list[Response | Failure]:
        """One answer a question, or the reason why there is none."""
        records: list[Response | Failure] = [*asked.failed]
        for batch in asked.batches:
            records += map(self.record, batch.questions, self.answer(batch))
        return records

    def answer(self, batch: Any) -> list[Generation | str]:
        """Generates; in halves where the whole doesn't fit into memory or raises an exception.

        Returns:
            One a question: the answer, or a line that says why there is none.

        Raises:
            UserError: ``failures_in_a_row`` questions raised exceptions, with no answer in between.
        """
        if self.largest is not None and len(batch) > self.largest:
            return self._in_parts(batch, self.largest)
        try:
            answers: list[Generation | str] = [*self.vlm.generate(batch, self.sampling, self.seed)]
        except torch.OutOfMemoryError as error:
            reason, full = f"{str(error).split('. ')[0]}: this question alone doesn't fit into memory", True
        except BaseException as error:
            if isinstance(error, Unanswered) and len(error.answers) == len(batch):
                if any(isinstance(answer, Generation) for answer in error.answers):
                    self._in_a_row = 0
                return error.answers
            reason, full = reason_of(error), False
        else:
            self._in_a_row = 0
            return answers
        # Only here is what the failed attempt held free again.
        if full and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            self._in_a_row += not full
            if self._in_a_row >= self.failures_in_a_row:
                raise UserError(
                    f"model.failures_in_a_row: {self._in_a_row} questions in a row raised an exception, the last one "
                    f"{reason}; correct the cause, then the same command asks them again"
                )
            return [reason]
        half = len(batch) // 2
        if full:
            self.largest = half
            say(f"out of memory with {len(batch)} questions at once: going on with {half}")
        return self._in_parts(batch, half)

    def _in_parts(self, batch: Any, size: int) -> list[Generation | str]:
        rows = torch.arange(len(batch)).split(size)
        return [answer for part in rows for answer in self.answer(batch.select(part))]

    @staticmethod
    def record(question: Question, answer: Generation | str) -> Response | Failure:
        """What is written down of an answer."""
        if isinstance(answer, str):
            return Failure(question, answer)
        return Response(question, answer.text, answer.finish_reason, len(answer.token_ids))
