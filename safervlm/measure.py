"""Measurement of a VLM: a Lightning module whose predict step generates responses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import lightning as L
import torch

from safervlm.errors import ArgumentError, UserError
from safervlm.failures import in_halves, reason_of
from safervlm.io.tables import say
from safervlm.ranges import in_range
from safervlm.records import Example, Failure, Question, Response
from safervlm.vlm.base import VLM, Answer, Collator, Generation, Unanswered
from safervlm.vlm.sampling import Sampling


@dataclass
class QuestionBatch:
    """A batch of questions, without those that could not be collated.

    Attributes:
        batches: Batches made by the VLM's collator: usually one; several if the questions can't be collated together;
            none if no question remains.
        failed: Questions that could not be collated, with their reasons.
    """

    batches: list[Any]
    failed: list[Failure]

    def to(self, device: torch.device) -> Self:
        """Returns a copy with its batches on another device; called by Lightning.

        Args:
            device: Target device.
        """
        return type(self)([batch.to(device) for batch in self.batches], self.failed)


@dataclass
class FaultTolerantCollator:
    """Fault-tolerant collator: records the questions that the VLM's collator can't process, so that none ends a run.

    Attributes:
        collator: Collator of the VLM.
    """

    collator: Collator

    def __call__(self, examples: Sequence[Example]) -> QuestionBatch:
        """Collates the examples together; if that raises, one by one, to isolate the failing ones."""
        try:
            return QuestionBatch([self.collator(examples)], [])
        except BaseException as error:
            reason_of(error)
        good, failed = [], []
        for example in examples:
            try:
                self.collator([example])
                good.append(example)
            except BaseException as error:
                failed.append(Failure(example.question, reason_of(error)))
        # Examples that can be collated one by one may still exceed the memory together.
        batches, more = in_halves(good, self.collator)
        return QuestionBatch(batches, failed + [Failure(example.question, reason) for example, reason in more])


class Measure(L.LightningModule):
    """Generates a VLM's responses to the questions of the data.

    Args:
        vlm: Model to measure, with or without an adapter.
        sampling: Sampling settings of the responses. The default is that of the published measurement.
        seed: Seed of the sampling. The noise of a response depends only on (seed, record id, step, token): in float32,
            neither batch size nor order nor number of processes changes a response.
        failures_in_a_row: Number of consecutive questions with unexpected exceptions after which the run stops. Each
            such question is recorded as failed; after so many without a response in between, the questions are not the
            cause. Questions that the VLM itself leaves unanswered (no finite logits, rejected by a server) or that
            don't fit into memory neither count nor reset the count.

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
        self.largest: int | None = None  # batch size used after a larger batch ran out of memory

    @property
    def collator(self) -> FaultTolerantCollator:
        """Collator of the batches; the command line passes it to the data module."""
        return FaultTolerantCollator(self.vlm.collator)

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the responses, for the manifest."""
        noise = {} if self.sampling.temperature == 0 or self.vlm.noise is None else {"noise": self.vlm.noise}
        return {"vlm": self.vlm.describe(), "sampling": asdict(self.sampling), "seed": self.seed} | noise

    def setup(self, stage: str) -> None:
        """Rejects repetitions of the questions whose responses would all be the same.

        Raises:
            ArgumentError: The data repeats its questions, and decoding is greedy.
        """
        data = getattr(self._trainer, "datamodule", None)
        repeats = max(getattr(each, "repeats", 1) for each in (data, *getattr(data, "sets", {}).values()))
        if repeats > 1 and self.sampling.temperature == 0:
            raise ArgumentError(
                f"data.repeats: {repeats} responses to a question would be the same with sampling.temperature 0: set a "
                "temperature above 0, or data.repeats to 1"
            )

    def configure_model(self) -> None:
        """Loads the weights, unless no question remains to be asked."""
        data = getattr(self._trainer, "datamodule", None)  # None if the trainer was given a data loader only
        if data is None or data.remaining():
            self.vlm.load()

    def predict_step(self, asked: QuestionBatch, batch_idx: int) -> list[Response | Failure]:
        """Returns one response per question, or a failure with its reason."""
        records: list[Response | Failure] = [*asked.failed]
        for batch in asked.batches:
            records += map(self.record, batch.questions, self.answer(batch))
        return records

    def answer(self, batch: Any) -> list[Answer]:
        """Generates the responses of a batch; splits it in halves if it exceeds the memory or raises an exception.

        Args:
            batch: Batch made by the VLM's collator, with ``len`` and ``select``.

        Returns:
            For each question, in order, the generation, or the reason why there is none.

        Raises:
            UserError: ``failures_in_a_row`` consecutive questions raised exceptions.
        """
        if self.largest is not None and len(batch) > self.largest:
            return self._in_parts(batch, self.largest)
        try:
            answers = self.vlm.generate(batch, self.sampling, self.seed)
        except torch.OutOfMemoryError as error:
            reason, full = f"{str(error).split('. ')[0]}: this question alone doesn't fit into memory", True
        except BaseException as error:
            reason, full = reason_of(error), False
        else:
            if any(isinstance(answer, Generation) for answer in answers):
                self._in_a_row = 0
            return answers
        # Memory held by the failed attempt is released only after the except block.
        if full and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            self._in_a_row += not full
            if self._in_a_row >= self.failures_in_a_row:
                raise UserError(
                    f"model.failures_in_a_row: {self._in_a_row} questions in a row raised an exception, the last one "
                    f"{reason}; correct the cause, then the same command asks them again"
                )
            return [Unanswered(reason)]
        half = len(batch) // 2
        if full:
            self.largest = half
            say(f"out of memory with {len(batch)} questions at once: continuing with {half}")
        return self._in_parts(batch, half)

    def _in_parts(self, batch: Any, size: int) -> list[Answer]:
        rows = torch.arange(len(batch)).split(size)
        return [answer for part in rows for answer in self.answer(batch.select(part))]

    @staticmethod
    def record(question: Question, answer: Answer) -> Response | Failure:
        """Converts the result of a question to its record.

        Args:
            question: Question that was asked.
            answer: Generation of the VLM, or the reason why there is none.
        """
        if isinstance(answer, Unanswered):
            return Failure(question, answer.reason)
        return Response(question, answer.text, answer.finish_reason, len(answer.token_ids), answer.reasoning)
