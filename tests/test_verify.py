"""Asking again: what flipped is counted, by answer and by verdict."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from safervlm.cli import main
from safervlm.records import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def run(measuring_line: Callable[[Path, Path], list[str]], tiny_sets: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("verify") / "run"
    main(measuring_line(run, tiny_sets / "unsafe"))
    return run


def flipped(printed: str) -> dict[str, tuple[int, int]]:
    """The rows of the printed table: how many were asked, how many flipped."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[1]: (int(row[3]), int(row[5])) for row in rows if row[1:2] in (["answers"], ["verdicts"])}


def test_in_float32_no_answer_depends_on_the_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(run), "--sample", "20"])
    assert flipped(capsys.readouterr().out)["answers"] == (20, 0)
    assert not list(read_jsonl(run / "verify.jsonl"))


def test_what_flips_is_counted_and_written_down(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses, verdicts = (list(read_jsonl(run / f"{name}.jsonl")) for name in ("responses", "verdicts"))
    responses[3]["response"], responses[7]["response"] = "another answer", "a third one"
    other = {"Safe": "Unsafe", "Unsafe": "N/A", "N/A": "Safe"}
    before = verdicts[7]["label"]
    verdicts[7]["label"] = other[before]
    chances = verdicts[7]["probabilities"]
    chances[before], chances[other[before]] = chances[other[before]], chances[before]
    for name, records in (("responses", responses), ("verdicts", verdicts)):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    (tmp_path / "predict.yaml").write_text((run / "predict.yaml").read_text())
    main(["verify", str(tmp_path), "--sample", str(len(responses)), "--batch_size", "4"])
    assert flipped(capsys.readouterr().out) == {"answers": (len(responses), 2), "verdicts": (len(responses), 1)}
    flips = {record["id"]: record for record in read_jsonl(tmp_path / "verify.jsonl")}
    assert flips.keys() == {responses[3]["id"], responses[7]["id"]}
    again = flips[responses[7]["id"]]
    assert again["response"] == "a third one"
    assert again["label"] == verdicts[7]["label"] != again["label_again"]
    assert json.loads((run / "manifest.json").read_text())["stages"]["measure"]["finished"]


def test_a_folder_that_was_not_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path)])
    assert "holds no predict.yaml; name the folder of a measurement" in capsys.readouterr().err
