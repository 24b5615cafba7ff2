"""Odds when measuring: they change no response, and are resumed, merged and reported like responses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import play, play_together, write_config

from safervlm.protocol import REVERSED
from safervlm.records import read_jsonl

pytestmark = pytest.mark.slow

DDP = ("--trainer.strategy=ddp", "--trainer.devices=2")
ODDS = "--model.odds=true"
IMAGES, NAMES = 3 + 3, 3  # unsafe and safe images; concepts


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_llava, tiny_sets) -> Callable[..., list[object]]:
    """``command(*more)``: a command line that asks 3 + 6 * (5 + 1) + 3 * 5 questions, in batches of 4."""
    sets = tmp_path_factory.mktemp("sets")
    for name in ("unsafe", "safe"):
        shutil.copytree(tiny_sets / name, sets / name)
    overlay = {
        "model": {
            "init_args": {
                "vlm": {"init_args": {"model": str(tiny_llava), "dtype": "float32", "system": ""}},
                "sampling": {"max_new_tokens": 6},
            }
        },
        "data": {
            "init_args": {
                "folder": str(sets / "unsafe"),
                "safe_folder": str(sets / "safe"),
                "reversed_question": True,
                "limit": 3,
                "batch_size": 4,
                "num_workers": 0,
            }
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "callbacks.record_writer.RecordWriter"}],
        },
    }
    config = write_config(tmp_path_factory.mktemp("configs") / "overlay.yaml", overlay)
    return lambda *more: ["predict", "--config=configs/measure.yaml", f"--config={config}", "--run=run", *more]


@pytest.fixture(scope="module")
def without(command, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run without odds."""
    folder = tmp_path_factory.mktemp("without")
    play(command(), folder)
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run with odds."""
    folder = tmp_path_factory.mktemp("with")
    play(command(ODDS), folder)
    return folder / "run"


def odds(run: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(run / "odds.jsonl"))


def stage(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["stages"]["measure"]


def same(run: Path, other: Path) -> None:
    """The same responses to the byte, and the same odds up to rounding, in the same order."""
    assert (run / "responses.jsonl").read_bytes() == (other / "responses.jsonl").read_bytes()
    found, expected = odds(run), odds(other)
    assert [record["id"] for record in found] == [record["id"] for record in expected]
    for record, wanted in zip(found, expected, strict=True):
        assert record["log_odds"] == pytest.approx(wanted["log_odds"], abs=1e-3)
    assert not (run / "shards").exists()
    assert not (run / "odds-failed.jsonl").exists()


def test_measuring_odds_does_not_change_responses(without, uninterrupted):
    assert (without / "responses.jsonl").read_bytes() == (uninterrupted / "responses.jsonl").read_bytes()
    assert not (without / "odds.jsonl").exists()
    assert stage(uninterrupted)["settings"] == stage(without)["settings"]
    asked = [record for record in read_jsonl(without / "responses.jsonl") if record["capability"] != "perception"]
    assert [record["id"] for record in odds(uninterrupted)] == [record["id"] for record in asked]
    assert len(asked) == IMAGES * 6 + NAMES * 5
    assert sum(record["capability"] == REVERSED for record in asked) == IMAGES
    assert len({record["log_odds"] for record in odds(uninterrupted)}) > 3 * IMAGES


def test_odds_are_added_to_a_finished_run_and_kept_when_not_requested(without, uninterrupted, command, tmp_path):
    shutil.copytree(without, tmp_path / "run")
    before = (tmp_path / "run" / "responses.jsonl").stat()
    printed = " ".join(play(command(ODDS), tmp_path).split())
    assert "responses.jsonl: 54 records already exist, nothing is left to do" in printed
    same(tmp_path / "run", uninterrupted)
    assert stage(tmp_path / "run")["finished"]
    assert before.st_size == (tmp_path / "run" / "responses.jsonl").stat().st_size
    kept = (tmp_path / "run" / "odds.jsonl").read_bytes()
    for more in ((), (ODDS,)):
        play(command("--trainer.callbacks+=processes.RefuseToLoad", *more), tmp_path)  # nothing is left to do
    assert (tmp_path / "run" / "odds.jsonl").read_bytes() == kept


def test_killed_odds_run_is_resumed_by_two_processes(command, uninterrupted, tmp_path):
    for batch, torn in ((1, 40), (2, 9)):
        kill = ["--trainer.callbacks+=processes.KillInPredict", f"--trainer.callbacks.batch={batch}"]
        play([*command(ODDS), *kill, f"--trainer.callbacks.torn={torn}"], tmp_path, code=-9)
    shards = tmp_path / "run" / "shards"
    assert 0 < sum(shard.read_bytes().count(b"\n") for shard in (shards / "odds").iterdir()) < len(odds(uninterrupted))
    play_together(command(ODDS, *DDP), tmp_path)
    same(tmp_path / "run", uninterrupted)


def test_missing_responses_and_missing_odds_are_completed_independently(command, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for file, kept in (("responses.jsonl", slice(10, None)), ("odds.jsonl", slice(None, 20))):
        lines = (tmp_path / "run" / file).read_bytes().splitlines(keepends=True)
        (tmp_path / "run" / file).write_bytes(b"".join(lines[kept]))
    printed = " ".join(play(command(ODDS), tmp_path).split())
    assert "responses.jsonl: 44 records already exist, continuing with the remaining 10" in printed
    assert (
        f"odds.jsonl: 20 records already exist, continuing with the remaining {len(odds(uninterrupted)) - 20}"
        in printed
    )
    same(tmp_path / "run", uninterrupted)


def test_failed_odds_end_with_exit_code_3_and_are_computed_again(command, uninterrupted, tmp_path):
    printed = " ".join(play(command(ODDS, "--trainer.callbacks+=processes.FailOdds"), tmp_path, code=3).split())
    run = tmp_path / "run"
    assert (run / "responses.jsonl").read_bytes() == (uninterrupted / "responses.jsonl").read_bytes()
    failed = list(read_jsonl(run / "odds-failed.jsonl"))
    assert {record["reason"] for record in failed} == {"RuntimeError: no odds"}
    assert {record["image"] for record in failed} == {failed[0]["image"]}
    assert f"{len(failed)} questions have no odds, for example: RuntimeError: no odds" in printed
    assert "have no response" not in printed
    assert not stage(run)["finished"]
    assert len(odds(run)) == len(odds(uninterrupted)) - len(failed)
    play(command(), tmp_path)  # without odds, the failures of odds are none
    assert stage(run)["finished"]
    play(command(ODDS), tmp_path)
    same(run, uninterrupted)
