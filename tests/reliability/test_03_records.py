"""Promise 3, records: every text is unchanged after writing and reading, and invalid records are reported."""

import json
import random
from pathlib import Path

import pytest

from safervlm.errors import RecordError
from safervlm.hashing import fingerprint, seed_for
from safervlm.records import (
    Failure,
    Question,
    Response,
    Verdict,
    read_jsonl,
    read_records,
    read_torn_jsonl,
    to_line,
    write_jsonl,
)

TEXTS = [
    "\ud83d",
    "cut \udfff.",
    "a\ud800\ud800b",
    "\x00\x07\x1b[2J",
    "\u2028\u2029\x85",
    "é e\u0301",
    "<b>=1+1",
    "\\ud83d",
    "",
]


def question(prompt: str) -> Question:
    return Question("S/a.png/alignment/0", "S", "a.png", "a.png", "alignment", 0, prompt, "Hate", "knife", "Unsafe")


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_unchanged_after_a_jsonl_round_trip(tmp_path: Path, text: str) -> None:
    response = Response(question(text), text, "stop", 1)
    write_jsonl(tmp_path / "r.jsonl", [response.to_dict()])
    assert read_records(tmp_path / "r.jsonl", Response) == [response]
    assert read_torn_jsonl(tmp_path / "r.jsonl") == [response.to_dict()]
    (tmp_path / "r.jsonl").read_bytes().decode("utf-8")  # strict JSON, which any tool can read
    assert fingerprint(text) != fingerprint(text + "x")
    assert seed_for(text) != seed_for(text + "x")


def test_random_texts_are_unchanged_after_a_jsonl_round_trip(tmp_path: Path) -> None:
    """Characters of all planes and halves; only a high half followed by a low one may become one character."""
    generator = random.Random(5)
    records = [{"t": "".join(chr(generator.choice([generator.randrange(0x300), generator.randrange(0xD700, 0xDC00)]))
                             for _ in range(20))} for _ in range(300)]  # fmt: skip
    write_jsonl(tmp_path / "r.jsonl", records)
    assert list(read_jsonl(tmp_path / "r.jsonl")) == records


def test_ordinary_records_are_serialised_like_json_dumps() -> None:
    record = {"a": 'é\u2028😀\\"', "b": [1, 0.1, None, True], "c": {"d": ""}}
    assert to_line(record) == json.dumps(record, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_not_written(tmp_path: Path, number: float) -> None:
    with pytest.raises(RecordError, match=r"^S/1: can't be written as JSON"):
        write_jsonl(tmp_path / "r.jsonl", [{"id": "S/1", "probabilities": {"Safe": number}}])
    assert list(tmp_path.iterdir()) == []


RESPONSE = Response(question("Is it?"), "No.", "stop", 2).to_dict()
FAILURE = Failure(question("Is it?"), "damaged").to_dict()
VERDICT = Verdict("S/a.png/alignment/0", "Safe", {"Safe": 1.0}, "f" * 16).to_dict()
EDITED = {
    "response: missing": (Response, RESPONSE, {"response": ...}, "the field 'response' is missing"),
    "response: number": (Response, RESPONSE, {"response": 3}, "'response' must be a text, got 3"),
    "response: null": (Response, RESPONSE, {"response": None}, "'response' must be a text, got None"),
    "response: tokens as text": (Response, RESPONSE, {"tokens": "2"}, "'tokens' must be an integer, got '2'"),
    "response: tokens true": (Response, RESPONSE, {"tokens": True}, "'tokens' must be an integer, got True"),
    "response: tokens below 0": (Response, RESPONSE, {"tokens": -1}, "'tokens' must be an integer from 0 to"),
    "response: a number of 31 digits": (Response, RESPONSE, {"prompt_number": 10**30}, "'prompt_number' must be an"),
    "response: no prompt": (Response, RESPONSE, {"prompt": ...}, "'prompt' is missing"),
    "response: id a list": (Response, RESPONSE, {"id": [1]}, "'id' must be a text"),
    "response: another capability": (Response, RESPONSE, {"capability": "alignmnt"}, "got 'alignmnt'"),
    "response: image_path a number": (Response, RESPONSE, {"image_path": 1}, "must be a text or null, got 1"),
    "response: drawn as text": (Response, RESPONSE, {"drawn": "yes"}, "'drawn' must be true or false"),
    "failure: no reason": (Failure, FAILURE, {"reason": ...}, "'reason' is missing"),
    "failure: reason an object": (Failure, FAILURE, {"reason": {}}, "'reason' must be a text"),
    "verdict: missing": (Verdict, VERDICT, {"judge": ...}, "'judge' is missing"),
    "verdict: unknown": (Verdict, VERDICT, {"jugde": "x"}, "'jugde' is unknown"),
    "verdict: a list": (Verdict, VERDICT, {"probabilities": [1.0]}, "'probabilities' must be an object"),
    "verdict: a text": (Verdict, VERDICT, {"probabilities": {"Safe": "1"}}, "'1' of 'Safe' is not a number"),
}


@pytest.mark.parametrize("case", EDITED)
def test_error_names_the_line_of_an_invalid_edited_record(tmp_path: Path, case: str) -> None:
    kind, record, change, message = EDITED[case]
    broken = {name: value for name, value in (record | change).items() if value is not ...}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n\n" + json.dumps(broken) + "\n")
    with pytest.raises(RecordError, match=message) as caught:
        read_records(tmp_path / "r.jsonl", kind)
    assert "r.jsonl, line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (b'{"a": ', "not JSON"),
        (b'{"a": 1}{"a": 2}', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b"\0\0\0", "not JSON"),
    ],
)
def test_truncated_last_line_is_skipped_and_an_earlier_one_is_an_error(
    tmp_path: Path, middle: bytes, message: str
) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"a": 1}\n' + middle)
    assert read_torn_jsonl(tmp_path / "r.jsonl") == [{"a": 1}]
    (tmp_path / "r.jsonl").write_bytes(b'{"a": 1}\n' + middle + b'\n{"a": 3}\n')
    with pytest.raises(RecordError, match=rf"r\.jsonl, line 2: .*{message}") as caught:
        read_torn_jsonl(tmp_path / "r.jsonl")
    assert "\n" not in str(caught.value)
