"""The table of ``safervlm measure``: the progress of a run, read from its records."""

from pathlib import Path

import pytest

from safervlm.cli.measure import progress_of
from safervlm.errors import RecordError
from safervlm.records import THINKING_UNFINISHED, Failure, Question, Response, write_jsonl
from safervlm.run_folder import RunFolder


def question(name: str) -> Question:
    return Question(name, "Own", "1.png", "1.png", "alignment", 0, "Safe?", "Own", "", "Safe")


def test_responses_and_failures_with_any_id_are_counted(tmp_path: Path) -> None:
    files = RunFolder(tmp_path)
    write_jsonl(files.responses, [Response(question(name), "Yes.", "stop", 2).to_dict() for name in ("a", "b/c")])
    write_jsonl(files.failed, [Failure(question(name), "no reason").to_dict() for name in ("x", "")])
    assert progress_of(tmp_path)["alignment"] == "partial, 2 (2 have no response)"


def test_unfinished_thinking_is_counted(tmp_path: Path) -> None:
    ends = ("stop", THINKING_UNFINISHED, THINKING_UNFINISHED)
    responses = [Response(question(str(number)), "", end, 2).to_dict() for number, end in enumerate(ends)]
    write_jsonl(RunFolder(tmp_path).responses, responses)
    assert progress_of(tmp_path)["alignment"] == "complete, 3; thinking unfinished: 2"


@pytest.mark.parametrize("name", ["responses.jsonl", "responses-failed.jsonl"])
def test_a_damaged_record_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"id": "a"}\n')
    with pytest.raises(RecordError, match=f"{name}, line 1 .a.: .* is missing"):
        progress_of(tmp_path)
