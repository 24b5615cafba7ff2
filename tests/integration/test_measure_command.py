"""``safervlm measure``: one failing VLM does not stop the others, complete runs are skipped, progress is shown."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import yaml

from safervlm.cli.measure import progress_of

WIDE = os.environ | {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def measure() -> Iterator[list[str]]:
    """The command, without the names of the VLMs."""
    with forked.program() as program:
        yield [*forked.driver(program), "measure"]


@pytest.fixture
def query(measure: list[str], tiny_llava: Path, tiny_sets: Path, tiny_panel: dict[str, object], tmp_path: Path):
    """``query(*vlms)``: the output of the command; ``good`` is a VLM, ``bad`` names a folder that does not exist."""
    overlay = {
        "model": {"init_args": {"sampling": {"max_new_tokens": 3}}},
        "data": {"init_args": {"folder": str(tiny_sets / "unsafe"), "limit": 2, "num_workers": 0}},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "callbacks.record_writer.RecordWriter"},
                {"class_path": "callbacks.judge_responses.JudgeResponses", "init_args": {"panel": tiny_panel}},
            ],
        },
    }
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    for name, model in {"good": tiny_llava, "bad": tmp_path / "nowhere"}.items():
        vlm = {"class_path": "safervlm.vlm.llava.Llava", "init_args": {"model": str(model), "dtype": "float32"}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(vlm))

    def query(*vlms: str, more: tuple[str, ...] = (), code: int = 0) -> str:
        line = [*measure, *(str(tmp_path / f"{name}.yaml") for name in vlms), "--runs=runs"]
        line += ["--config", str(tmp_path / "overlay.yaml"), *more]
        ended = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=WIDE, check=False)
        assert ended.returncode == code, ended.stderr
        return ended.stdout

    return query


def test_unknown_vlm_name_is_rejected_before_measuring(query, tmp_path: Path) -> None:
    assert query("good", "nosuch", code=2) == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_one_failing_vlm_does_not_stop_others_and_complete_runs_are_skipped(query, tmp_path: Path) -> None:
    printed = query("bad", "good", code=1)
    rows = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["good"].split("│")[2:5]] == ["complete, 2", "complete, 10", "complete, 10"]
    assert "failed: vlm.model: no folder" in rows["bad"]
    assert (tmp_path / "runs" / "bad.log").exists()
    responses = (tmp_path / "runs" / "good" / "responses.jsonl").read_bytes()
    again = query("good")
    assert "complete, skipped" in again
    assert (tmp_path / "runs" / "good" / "responses.jsonl").read_bytes() == responses
    # A run that is complete with other arguments is not complete with these.
    refused = query("good", more=("--data.limit", "1"), code=1)
    assert "data.limit: 2 there, 1 now" in refused
    assert "complete, skipped" in query("good")
    (tmp_path / "runs" / "good" / "manifest.json").rename(tmp_path / "kept.json")
    (tmp_path / "runs" / "good" / "manifest.json").write_text("{")  # damaged
    assert "runs/good/manifest.json, line 1: not JSON" in query("good", code=1)
    (tmp_path / "kept.json").rename(tmp_path / "runs" / "good" / "manifest.json")

    # Half of it is missing, as after a kill: the table shows it, and the next run completes it.
    run = tmp_path / "runs" / "good"
    shard = run / "shards" / "responses" / "0-1.jsonl"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"\n".join(responses.split(b"\n")[:3]) + b'\n{"id": "to')
    (run / "responses.jsonl").unlink()
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
    assert sorted(text.split(":")[0] for text in progress_of(run).values())[-2:] == ["partial, 1", "partial, 2"]
    query("good")
    assert (run / "responses.jsonl").read_bytes() == responses
