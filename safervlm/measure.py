"""Measuring a VLM: a predict loop whose step generates."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import lightning as L
import torch

from safervlm.errors import RecordError
from safervlm.records import Example, Failure, Question, Response
from safervlm.vlm.base import VLM, Collator, Generation, Unanswered
from safervlm.vlm.sampling import Sampling


@dataclass
class Asked:
    """A batch of questions, without those that can't be asked.

    Attributes:
        batch: what the VLM's collator made of the others; None if there are none.
        failed: those that can't be asked, and why.
    """

    batch: Any
    failed: list[Failure]

    def to(self, device: torch.device) -> Self:
        """The same on another device; Lightning calls it."""
        return type(self)(None if self.batch is None else self.batch.to(device), self.failed)


@dataclass
class AskCollator:
    """Sets the questions aside that a VLM's collator refuses: one of them must not end a run.

    Attributes:
        collator: the VLM's.
    """

    collator: Collator

    def __call__(self, examples: Sequence[Example]) -> Asked:
        """Collates them together, and one by one where that fails, to find the one to blame."""
        try:
            return Asked(self.collator(examples), [])
        except RecordError:
            good, failed = [], []
            for example in examples:
                try:
                    self.collator([example])
                    good.append(example)
                except RecordError as error:
                    failed.append(Failure(example.question, str(error)))
            return Asked(self.collator(good) if good else None, failed)


class Measure(L.LightningModule):
    """Asks a VLM the questions of the data and gives its answers.

    Args:
        vlm: the model to measure, with or without an adapter.
        sampling: how answers are drawn; the default is the published measurement's.
        seed: an answer's randomness is drawn from (seed, record id, step): neither the batch, the order nor the number
            of processes changes an answer in float32.
    """

    def __init__(self, vlm: VLM, sampling: Sampling = Sampling(), seed: int = 0) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.vlm, self.sampling, self.seed = vlm, sampling, seed
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
        if asked.batch is None:
            return [*asked.failed]
        answers = self.answer(asked.batch)
        return [*asked.failed, *map(self.record, asked.batch.questions, answers)]

    def answer(self, batch: Any) -> list[Generation | str]:
        """Generates, in halves where the whole doesn't fit into memory; a text says why there is no answer."""
        if self.largest is None or len(batch) <= self.largest:
            try:
                return [*self.vlm.generate(batch, self.sampling, self.seed)]
            except Unanswered as error:
                return error.answers
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            # Only here is what the failed attempt held free again.
            torch.cuda.empty_cache()
            if len(batch) == 1:
                return [f"{reason}: this question alone doesn't fit into memory"]
            self.largest = len(batch) // 2
            print(f"out of memory with {len(batch)} questions at once: going on with {self.largest}")
        rows = torch.arange(len(batch)).split(self.largest)
        return [answer for part in rows for answer in self.answer(batch.select(part))]

    @staticmethod
    def record(question: Question, answer: Generation | str) -> Response | Failure:
        """What is written down of an answer."""
        if isinstance(answer, str):
            return Failure(question, answer)
        return Response(question, answer.text, answer.finish_reason, len(answer.token_ids))
