"""Measurement of a VLM: a Lightning module whose predict step generates responses."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor

from safervlm.data.module import SaferData
from safervlm.errors import ArgumentError, UserError
from safervlm.failures import in_halves, reason_of
from safervlm.io.tables import say
from safervlm.ranges import in_range
from safervlm.records import Example, Failure, Question, Response
from safervlm.run_folder import RunFolder
from safervlm.vlm.base import VLM, Answer, Collator, Unanswered, WordProbabilities
from safervlm.vlm.odds import Odds, OddsFailure, has_odds, with_words
from safervlm.vlm.sampling import Sampling

RESPONSES, ODDS = RunFolder("").responses.name, RunFolder("").odds.name


@dataclass
class QuestionBatch:
    """A batch of questions, without those that could not be collated.

    Attributes:
        batches: Batches made by the VLM's collator: usually one; several if the questions can't be collated together;
            none if no question remains.
        failed: Questions that could not be collated, with their reasons.
        odds: The questions with the words whose odds are stored; None if none are.
    """

    batches: list[Any]
    failed: list[Failure]
    odds: "QuestionBatch | None" = None

    def to(self, device: torch.device) -> Self:
        """Returns a copy with its batches on another device; called by Lightning.

        Args:
            device: Target device.
        """
        odds = self.odds and self.odds.to(device)
        return type(self)([batch.to(device) for batch in self.batches], self.failed, odds)


@dataclass
class FaultTolerantCollator:
    """Fault-tolerant collator: records the questions that the VLM's collator can't process, so that none ends a run.

    Attributes:
        collator: Collator of the VLM.
        odds: Whether the odds of the answers are stored.
        done: Ids of the questions that already have a record, by file.
    """

    collator: Collator
    odds: bool = False
    done: dict[str, Collection[str]] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example]) -> QuestionBatch:
        """Collates the examples that have no response, and those without odds that can have some."""
        answered, scored = (self.done.get(file, ()) for file in (RESPONSES, ODDS))
        batch = self.tolerant([example for example in examples if example.question.id not in answered])
        if self.odds:
            left = [each.question for each in examples if has_odds(each.question) and each.question.id not in scored]
            batch.odds = self.tolerant([with_words(question) for question in left])
        return batch

    def tolerant(self, examples: Sequence[Example]) -> QuestionBatch:
        """Collates the examples together; if that raises, one by one, to isolate the failing ones.

        Args:
            examples: The examples; may be empty.

        Returns:
            The batch, with the questions that could not be collated.
        """
        if not examples:
            return QuestionBatch([], [])
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


@dataclass
class FaultTolerantStep:
    """Computes a result for each question of a batch; splits a batch that exceeds the memory or raises an exception.

    Args:
        compute: Computes the results of a batch.
        select: Returns a batch of some rows of a batch.
        failures_in_a_row: Number of consecutive questions with exceptions after which the run stops.
        remedy: What to do then.
    """

    compute: Callable[[Any], Sequence[Any]]
    select: Callable[[Any, Tensor], Any]
    failures_in_a_row: int
    remedy: str = "correct the cause"
    _in_a_row: int = 0
    _largest: int | None = None  # batch size used after a larger batch ran out of memory

    def __call__(self, batch: Any) -> list[Any]:
        """Computes the results of a batch.

        Args:
            batch: Batch made by the VLM's collator, with ``len``.

        Returns:
            For each question, in order, the result, or the reason why there is none.

        Raises:
            UserError: ``failures_in_a_row`` consecutive questions raised exceptions.
        """
        if self._largest is not None and len(batch) > self._largest:
            return self._in_parts(batch, self._largest)
        try:
            answers = list(self.compute(batch))
        except torch.OutOfMemoryError as error:
            reason, full = f"{str(error).split('. ')[0]}: this question alone doesn't fit into memory", True
        except BaseException as error:
            reason, full = reason_of(error), False
        else:
            if not all(isinstance(answer, Unanswered) for answer in answers):
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
                    f"{reason}; {self.remedy}, then the same command asks them again"
                )
            return [Unanswered(reason)]
        half = len(batch) // 2
        if full:
            self._largest = half
            say(f"out of memory with {len(batch)} questions at once: continuing with {half}")
        return self._in_parts(batch, half)

    def _in_parts(self, batch: Any, size: int) -> list[Any]:
        rows = torch.arange(len(batch)).split(size)
        return [answer for part in rows for answer in self(self.select(batch, part))]


@dataclass(frozen=True)
class FurtherFile:
    """A file of further records, in addition to the responses.

    Attributes:
        file: Its name in the run folder.
        kinds: Classes of its records and failures.
        applies: Whether a question has such a record.
    """

    file: str
    kinds: tuple[type, ...]
    applies: Callable[[Question], bool]


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
        odds: Also store, in ``odds.jsonl``, the log-odds of the word that means unsafe against the one that means safe
            at the beginning of each answer to an alignment question. They don't change the responses, and may be added
            to a finished run.

    Raises:
        ArgumentError: ``failures_in_a_row`` is less than 1, or ``odds`` are requested of a model without
            log-probabilities.
    """

    def __init__(
        self,
        vlm: VLM,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        failures_in_a_row: int = 20,
        odds: bool = False,
    ) -> None:
        super().__init__()
        in_range("model", least=1, failures_in_a_row=failures_in_a_row)
        if odds and type(vlm).first_words is VLM.first_words:
            raise ArgumentError(f"model.odds: {type(vlm).__name__} has no log-probabilities; omit it")
        self.vlm, self.sampling, self.seed, self.odds = vlm, sampling, seed, odds
        self.answer = FaultTolerantStep(self._generate, self._select, failures_in_a_row)
        remedy = "omit model.odds or correct the cause"
        self.odds_of = FaultTolerantStep(self._first_words, self._select_with_words, failures_in_a_row, remedy)

    @cached_property
    def collator(self) -> FaultTolerantCollator:
        """Collator of the batches; the command line passes it to the data module."""
        return FaultTolerantCollator(self.vlm.collator, self.odds)

    @property
    def further_files(self) -> tuple[FurtherFile, ...]:
        """Files that the RecordWriter writes in addition to the responses."""
        return (FurtherFile(ODDS, (Odds, OddsFailure), has_odds),) if self.odds else ()

    def skip(self, done: Mapping[str, Collection[str]]) -> None:
        """Excludes questions that already have a record; called by the RecordWriter.

        Args:
            done: Ids of these questions, by file.
        """
        self.collator.done = dict(done)

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the responses, for the manifest; the odds don't change them."""
        noise = {} if self.sampling.temperature == 0 or self.vlm.noise is None else {"noise": self.vlm.noise}
        return {"vlm": self.vlm.describe(), "sampling": asdict(self.sampling), "seed": self.seed} | noise

    def setup(self, stage: str) -> None:
        """Rejects repetitions of the questions whose responses would all be the same.

        Raises:
            ArgumentError: The data repeats its questions, and decoding is greedy.
        """
        data = getattr(self._trainer, "datamodule", None)
        repeats = data.most_repeats() if isinstance(data, SaferData) else 1
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

    def predict_step(self, asked: QuestionBatch, batch_idx: int) -> list[Response | Failure | Odds]:
        """Returns one response per question, or a failure with its reason; then the odds, or failures of them."""
        records: list[Response | Failure | Odds] = [*asked.failed]
        for batch in asked.batches:
            records += map(self.record, batch.questions, self.answer(batch))
        if asked.odds is not None:
            records += [OddsFailure(failure.question, failure.reason) for failure in asked.odds.failed]
            for batch in asked.odds.batches:
                records += map(self.odds_record, batch.questions, self.odds_of(batch))
        return records

    def _generate(self, batch: Any) -> list[Answer]:
        return self.vlm.generate(batch, self.sampling, self.seed)

    def _first_words(self, batch: Any) -> list[WordProbabilities | Unanswered]:
        return self.vlm.first_words(batch)

    @staticmethod
    def _select(batch: Any, rows: Tensor) -> Any:
        return batch.select(rows)

    def _select_with_words(self, batch: Any, rows: Tensor) -> Any:
        """Collates some questions again: a batch loses its completions when it selects rows."""
        return self.vlm.collator([with_words(batch.questions[row]) for row in rows.tolist()]).to(self.device)

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

    @staticmethod
    def odds_record(question: Question, found: WordProbabilities | Unanswered) -> Odds | OddsFailure:
        """Converts the log-probabilities of a question's words to its record.

        Args:
            question: Question whose words were scored.
            found: Log-probabilities, or the reason why there are none.
        """
        return OddsFailure(question, found.reason) if isinstance(found, Unanswered) else Odds.of(question, found)
