"""Promise 3, measuring: an error of one question is recorded as its failure, and the others get responses."""

import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.record_writer import RecordWriter
from safervlm.cli.main import main
from safervlm.errors import ArgumentError, RecordError, UserError
from safervlm.measure import FaultTolerantCollator, Measure
from safervlm.records import Example, Failure, Question, Response, read_jsonl
from safervlm.vlm.base import Answer, Generation, Unanswered

PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})  # as of a Rust library

ERRORS = [
    MemoryError(),
    OverflowError("cannot fit 'int' into an index-sized integer"),
    struct.error("unpack requires a buffer of 4 bytes"),
    PanicException("index out of bounds: the len is 3\nnote: run with RUST_BACKTRACE=1"),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"),
    ZeroDivisionError("division by zero"),
    RuntimeError("The size of tensor a (3) must match\nthe size of tensor b (4)"),
    AssertionError(),
    OSError(28, "No space left on device"),
    RecordError("x: the image can't be read"),
    IndexError("x" * 5000),
]
ENDS = [KeyboardInterrupt(), SystemExit(1), SIGTERMException(), ArgumentError("vlm.addresses: a list, got 1")]


@dataclass
class Batch:
    """The batch of the collator below: the questions."""

    questions: list[Question]

    def __len__(self) -> int:
        return len(self.questions)

    def select(self, rows) -> "Batch":
        return Batch([self.questions[int(row)] for row in rows])


class Faulty:
    """A VLM whose collator or generation raises an error if the batch contains certain questions.

    Args:
        error: the error to raise.
        bad: the ids of the questions that raise the error.
        together: batches with more questions than this raise it, too.
    """

    def __init__(self, error: BaseException, bad: set[str], together: int = 1000) -> None:
        self.error, self.bad, self.together = error, bad, together
        self.asked: list[int] = []

    def collate(self, examples) -> Batch:
        self._raise([example.question.id for example in examples])
        return Batch([example.question for example in examples])

    def generate(self, batch, sampling, seed) -> list[Generation]:
        self.asked.append(len(batch))
        self._raise([question.id for question in batch.questions])
        return [Generation([1], question.id, "stop") for question in batch.questions]

    def _raise(self, ids: list[str]) -> None:
        if self.bad & set(ids) or len(ids) > self.together:
            raise self.error


def measure_with(faulty: Faulty, in_collator: bool, **settings: int) -> Measure:
    measure = Measure.__new__(Measure)
    Measure.__init__(measure, vlm=None, **settings)  # type: ignore[arg-type]
    measure.vlm = faulty  # type: ignore[assignment]
    faulty.collator = faulty.collate if in_collator else lambda examples: Batch([each.question for each in examples])  # type: ignore[attr-defined]
    return measure


@pytest.mark.parametrize("in_collator", [True, False], ids=["collator", "generate"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_one_question_fails_and_the_others_are_answered(
    error: BaseException, in_collator: bool, make_questions: Callable[[int], list[Question]]
) -> None:
    questions = make_questions(7)
    bad = {questions[2].id, questions[5].id}
    measure = measure_with(Faulty(error, bad), in_collator)
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    failed = [record for record in records if isinstance(record, Failure)]
    assert {record.id for record in failed} == bad
    assert {record.id: record.response for record in records if isinstance(record, Response)} == {
        question.id: question.id for question in questions if question.id not in bad
    }
    for record in failed:
        assert record.reason
        assert len(record.reason.splitlines()) == 1
        assert len(record.reason) < 600
        assert type(error).__name__ in record.reason or isinstance(error, RecordError)


@pytest.mark.parametrize("in_collator", [True, False], ids=["collator", "generate"])
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_errors_that_concern_the_whole_run_end_it(
    error: BaseException, in_collator: bool, make_questions: Callable[[int], list[Question]]
) -> None:
    questions = make_questions(4)
    measure = measure_with(Faulty(error, {questions[1].id}), in_collator)
    with pytest.raises(type(error)):
        measure.predict_step(measure.collator([Example(question) for question in questions]), 0)


def test_batch_that_fails_only_as_a_whole_is_split_in_halves(make_questions) -> None:
    examples = [Example(question) for question in make_questions(8)]
    collator = FaultTolerantCollator(Faulty(MemoryError(), set(), together=3).collate)
    asked = collator(examples)
    assert [len(batch) for batch in asked.batches] == [2, 2, 2, 2]
    assert asked.failed == []
    measure = measure_with(Faulty(MemoryError(), set(), together=3), in_collator=True)
    records = measure.predict_step(asked, 0)
    assert [record.id for record in records] == [example.question.id for example in examples]
    assert all(isinstance(record, Response) for record in records)


@pytest.mark.parametrize("most", [1, 3, 20])
def test_too_many_failures_in_a_row_stop_the_run(most: int, make_questions) -> None:
    questions = make_questions(30)
    faulty = Faulty(ZeroDivisionError("division by zero"), {question.id for question in questions})
    measure = measure_with(faulty, in_collator=False, failures_in_a_row=most)
    with pytest.raises(UserError, match=rf"model\.failures_in_a_row: {most} questions in a row .*ZeroDivisionError"):
        measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert faulty.asked.count(1) == most


def test_response_resets_the_count_of_failures_in_a_row(make_questions) -> None:
    questions = make_questions(12)
    bad = {question.id for index, question in enumerate(questions) if index % 3}
    measure = measure_with(Faulty(ValueError("no"), bad), in_collator=False, failures_in_a_row=3)
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert {record.id for record in records if isinstance(record, Failure)} == bad


@pytest.mark.parametrize("answers", [True, False])
def test_responses_among_unanswered_questions_reset_the_failure_count(answers: bool, make_questions) -> None:
    """Responses of a server among failures show that not every question fails."""
    questions = make_questions(6)
    faulty = Faulty(ValueError("no"), {questions[number].id for number in (0, 1, 4, 5)})
    measure = measure_with(faulty, in_collator=False, failures_in_a_row=3)
    plain = faulty.generate

    def generate(batch: Batch, sampling, seed) -> list[Answer]:
        generations = plain(batch, sampling, seed)
        if len(batch) == 1:
            return generations
        return [Unanswered("busy"), generations[1] if answers else Unanswered("busy")]

    faulty.generate = generate  # type: ignore[method-assign]

    def step(start: int) -> list[Response | Failure]:
        return measure.predict_step(measure.collator([Example(each) for each in questions[start : start + 2]]), 0)

    assert [type(record) for start in (0, 2) for record in step(start)] == [
        *(Failure, Failure, Failure),
        Response if answers else Failure,
    ]
    if answers:
        assert [type(record) for record in step(4)] == [Failure, Failure]
    else:
        with pytest.raises(UserError, match="3 questions in a row"):
            step(4)


def test_one_question_that_a_vlm_rejects_is_recorded(make_questions) -> None:
    questions = make_questions(3)
    measure = measure_with(Faulty(RecordError("the server is gone"), {questions[1].id}), in_collator=False)
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert {record.id: type(record) for record in records} == {
        question.id: Failure if question is questions[1] else Response for question in questions
    }


@pytest.mark.parametrize("most", [0, -1])
def test_failures_in_a_row_below_one_is_rejected(most: int) -> None:
    with pytest.raises(ArgumentError, match=rf"model\.failures_in_a_row: at least 1, got {most}"):
        measure_with(Faulty(ValueError(), set()), in_collator=False, failures_in_a_row=most)


def test_a_response_that_cannot_be_written_fails_alone(make_questions, tmp_path: Path) -> None:
    good, bad = make_questions(2)
    state = {"default_root_dir": tmp_path, "global_rank": 0, "is_global_zero": True, "received_sigterm": False}
    trainer = type("Trainer", (), state)()
    writer = RecordWriter()
    writer.on_predict_start(trainer, None)  # type: ignore[arg-type]
    outputs = [Response(bad, "fine", "stop", {1, 2}), Response(good, "fine", "stop", 2)]  # type: ignore[arg-type]
    writer.on_predict_batch_end(trainer, None, outputs, None, 0)  # type: ignore[arg-type]
    (shard,) = (tmp_path / "shards" / "responses").iterdir()
    assert shard.read_text(encoding="utf-8").count("\n") == 1
    assert [failure.id for failure in writer._files[0].failed] == [bad.id]
    assert "can't be written as JSON" in writer._files[0].failed[0].reason


def test_missing_image_fails_only_its_own_questions(
    measuring_line: Callable[[Path, Path], list[str]],
    tiny_sets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "unsafe"
    shutil.copytree(tiny_sets / "unsafe", folder)
    line = measuring_line(tmp_path / "run", folder)
    main(measuring_line(tmp_path / "whole", folder))
    asked = [record["image_path"] for record in read_jsonl(tmp_path / "whole" / "responses.jsonl")]
    image = Path(asked[0])
    image.rename(tmp_path / "moved.png")
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 3
    failed = list(read_jsonl(tmp_path / "run" / "responses-failed.jsonl"))
    assert [record["image_path"] for record in failed] == [str(image)] * asked.count(str(image))
    assert all("is missing: add the file" in record["reason"] for record in failed)
    assert "Traceback" not in capfd.readouterr().err
    (tmp_path / "moved.png").rename(image)
    main(line)  # asks those alone
    assert (tmp_path / "run" / "responses.jsonl").read_bytes() == (tmp_path / "whole" / "responses.jsonl").read_bytes()
    assert not (tmp_path / "run" / "responses-failed.jsonl").exists()
    shutil.rmtree(folder / "images")  # then the folder is not that of the dataset
    with pytest.raises(SystemExit) as end:
        main(measuring_line(tmp_path / "another", folder))
    assert end.value.code == 2
    assert "images are missing, for example" in capfd.readouterr().err
