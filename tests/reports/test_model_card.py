"""The card of a merged model: scores with their judges, licence and settings; no scores of other models."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from evaluations import question, safety, write

from safervlm.io.tables import JUDGE_NOTE
from safervlm.judging.rating import Rating
from safervlm.records import THINKING_UNFINISHED
from safervlm.reports.model_card import licence_of, model_card
from safervlm.run import write_stage
from safervlm.vlm.adapters import adapter_fingerprint

CHECKPOINTS = {"alignment": "some/judge:epoch_10.pt", "perception": "/home/somebody/judges/perception.pt"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training, and an evaluation of its adapter with a rated dataset."""
    run = tmp_path / "a|b"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    model = {"vlm": {"model": "/home/somebody/base"}, "lora": {"r": 4}, "judge": "0123456789abcdef"}
    write_stage(run, "ppo", settings={"model": model, "data": {"names": ["Pictograms"]}})
    evaluation(run)
    return run


def evaluation(run: Path, folder: str = "evaluation") -> None:
    asked = [question("LLaVABench", f"{n}.png", "rated", 0, "a") for n in range(12)]
    ratings = [Rating(each.id, False, 8.0, 4.0 + n % 3, "", "judge", "judge", "", "") for n, each in enumerate(asked)]
    answers = [*safety(np.random.default_rng(0)), *((each, "b", "") for each in asked)]
    (run / folder).mkdir(exist_ok=True)
    write(run / folder, answers, ratings=ratings)
    adapter = {"folder": "elsewhere", "sha256": adapter_fingerprint(str(run / "adapter"))}
    vlm = {"model": "base", "dtype": "bfloat16", "adapter": adapter}
    write_stage(run / folder, "measure", settings={"model": {"vlm": vlm, "sampling": {"temperature": 0.0}}})
    judges = {name: {"init_args": {"checkpoint": named}} for name, named in CHECKPOINTS.items()}
    callbacks = [{"class_path": "a.B"}, {"init_args": {"panel": {"class_path": "P", "init_args": judges}}}]
    (run / folder / "predict.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))


def card(run: Path, base: str = "org/base") -> str:
    return model_card(run, base, None, "float32", "Rounding.")


@pytest.mark.parametrize("folder", ["evaluation", "."])
def test_the_scores_are_listed_with_the_judges_that_produced_them(run: Path, folder: str, capsys: Any) -> None:
    if folder == ".":
        for file in (run / "evaluation").iterdir():
            file.unlink()
        (run / "evaluation").rmdir()
        evaluation(run, folder)
    text = card(run)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {8}
    found = {row[1]: row for row in rows}
    assert re.fullmatch(r"\[0\.\d+, 0\.\d+\]", found["SMID"][3])
    assert found["SMID"][-1] == "judge |"
    assert "judge, one order" in found["LLaVABench"][-1]
    assert found["SMID: 1 - self-BLEU"][-1] == "none |"
    assert "in bfloat16, before merging (temperature 0.0)" in text
    assert JUDGE_NOTE in text
    assert "alignment `some/judge:epoch_10.pt`, perception `…/perception.pt`" in text
    assert text.count("## Objective: ") == text.count("## Data") == text.count("## Judge of the reward") == 1
    assert "`0123456789abcdef`. Scores by the same judge may be better than by another one" in text
    assert "somebody" not in text
    assert "the model card has no scores" not in capsys.readouterr().out


def test_the_scores_of_another_adapter_are_skipped_and_named(run: Path, capsys: Any) -> None:
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"trained further")
    for stated in (card(run), capsys.readouterr().out):
        assert "the evaluation is of another model than this adapter's; evaluate again: safervlm evaluate" in stated
    assert "| SMID |" not in card(run)


def test_responses_that_were_not_rated_have_no_row(run: Path) -> None:
    (run / "evaluation" / "ratings.jsonl").unlink()
    text = card(run)
    assert "| SMID |" in text
    assert "| LLaVABench" not in text
    assert "| nan" not in text


def test_responses_without_an_answer_are_counted(run: Path) -> None:
    file = run / "evaluation" / "responses.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if record["dataset"] == "SMID":
            record |= {"response": "", "finish_reason": THINKING_UNFINISHED}
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    number = sum(record["dataset"] == "SMID" for record in records)
    (row,) = [line.split(" | ") for line in card(run).splitlines() if " | SMID | " in line]
    assert row[2:] == ["none", "none", row[4], "0", str(number), "none |"]


def test_reasoning_marks_are_not_shortened_like_paths(run: Path) -> None:
    model = {
        "vlm": {"model": "/home/somebody/base", "thinking": {"marks": [["<think>", "</think>"]]}},
        "lora": {"r": 4},
    }
    write_stage(run, "sft", settings={"model": model, "data": {"names": ["Pictograms"]}})
    text = card(run)
    assert "</think>" in text
    assert "somebody" not in text


def test_licence_is_taken_from_the_base_model(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for text, licence in (
        (None, None),
        ("# No metadata", None),
        ("---\nlicense: llama2\n---\n# Base", "llama2"),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a\n---\n", None),
    ):
        if text is not None:
            (base / "README.md").write_text(text)
        assert licence_of(str(base), None) == licence
        _, head, body = card(run, str(base)).split("---", 2)
        assert yaml.safe_load(head) == {
            "base_model": "…/base",
            "library_name": "transformers",
            "license": licence or "other",
        }
        assert f"Base model's licence: {licence or 'see the base'}" in body


def test_the_licence_of_a_model_on_the_hub_is_read_from_its_card(tmp_path: Path, monkeypatch: Any) -> None:
    there = tmp_path / "README.md"
    there.write_text("---\nlicense: apache-2.0\n---\n")
    asked = []

    def cached(*named: Any, **more: Any) -> str:
        asked.append((*named, more))
        return str(there)

    monkeypatch.setattr("safervlm.reports.model_card.cached_file", cached)
    assert licence_of("org/base", "abc") == "apache-2.0"
    assert asked == [("org/base", "README.md", {"revision": "abc"})]
    monkeypatch.undo()
    assert licence_of("org/there-is-none", None) is None
