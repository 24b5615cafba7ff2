"""Reading and writing of records; files are complete or absent."""

from pathlib import Path

import pytest

from safervlm.errors import RecordError
from safervlm.hashing import fingerprint, fingerprint_of_files, seed_for
from safervlm.io.files import write_atomically
from safervlm.records import Question, Response, Verdict, read_jsonl, record_id, write_jsonl

QUESTION = Question(
    id=record_id("UnsafeConcepts", "images/17.png", "alignment", 3),
    dataset="UnsafeConcepts",
    image="images/17.png",
    image_path="/data/images/17.png",
    capability="alignment",
    prompt_number=3,
    prompt="Is it?",
    category="Hate",
    concept="knife",
    answer="Unsafe",
)


def test_question_id_has_the_form_dataset_image_capability_number() -> None:
    assert QUESTION.id == "UnsafeConcepts/images/17.png/alignment/3"


def test_responses_and_verdicts_are_unchanged_after_a_jsonl_round_trip(tmp_path: Path) -> None:
    response = Response(QUESTION, "No \u2013 «nicht» \u2028 safe\n", "stop", 7)
    verdict = Verdict(QUESTION.id, "Unsafe", {"Safe": 0.1, "Unsafe": 0.9}, "f" * 16)
    write_jsonl(tmp_path / "r.jsonl", [response.to_dict()])
    write_jsonl(tmp_path / "v.jsonl", [verdict.to_dict()])
    assert [Response.from_dict(record) for record in read_jsonl(tmp_path / "r.jsonl")] == [response]
    assert [Verdict.from_dict(record) for record in read_jsonl(tmp_path / "v.jsonl")] == [verdict]


@pytest.mark.parametrize("line", ['{"id": 1', "[1, 2]"])
def test_error_names_the_file_and_line_of_an_invalid_jsonl_record(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.jsonl").write_text('{"id": "a"}\n\n' + line + "\n")
    with pytest.raises(RecordError, match=r"r\.jsonl, line 3"):
        list(read_jsonl(tmp_path / "r.jsonl"))


def test_interrupted_atomic_write_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("before"))

    def dies(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, dies)
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_fingerprints_and_seeds_distinguish_parts(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"ab")
    assert fingerprint(file) == fingerprint("ab") == fingerprint(b"ab")
    other = tmp_path / "other"
    other.write_text("c")
    assert fingerprint_of_files([file, other, file]) == fingerprint(file, other, file) == fingerprint("ab", "c", "ab")
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("abc")}) == 3
    assert len({seed_for(0, "a"), seed_for(1, "a"), seed_for(0, "b"), seed_for("0a")}) == 4
    assert 0 <= seed_for("x") < 2**63
