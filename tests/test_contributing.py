"""The recipes of docs/CONTRIBUTING.md run: an objective, a VLM family, a dataset, a benchmark and a metric."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from safervlm.cli.main import main
from safervlm.records import read_jsonl

PAGE = (Path(__file__).parent.parent / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
# Arguments that make the commands' runs smaller.
SHORTER = {
    "fit": ["--trainer.max_epochs=1", "--data.limit=4", "--data.batch_size=2", "--trainer.enable_progress_bar=false"],
    "predict": ["--data.limit=2", "--model.sampling.max_new_tokens=4", "--trainer.enable_progress_bar=false"],
}


@pytest.fixture
def pictograms(tiny_llava: Path, tiny_sets: Path, tiny_judges: Path, tmp_path: Path) -> None:
    """Tiny stand-ins in the folders where ``safervlm pictograms`` writes its VLM, data and judges."""
    folder = tmp_path / "pictograms"
    folder.mkdir()
    (folder / "vlm").symlink_to(tiny_llava)
    (folder / "judges").symlink_to(tiny_judges)
    for name in ("unsafe", "safe"):
        (folder / name).symlink_to(tiny_sets / name)


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Makes modules of the current folder importable, and unloads them after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def follow(title: str) -> list[str]:
    """Writes the files of a section into the current folder and runs its commands; returns these."""
    ran = []
    for language, text in SECTIONS[title]:
        if language != "bash":
            (name,) = re.findall(r"\A# ([\w.]+)\n", text)
            Path(name).write_text(text, encoding="utf-8")
            continue
        for command in text.splitlines():
            program, *arguments = shlex.split(command)
            if program == "python":
                runpy.run_path(arguments[0], run_name="__main__")
            else:
                assert program == "safervlm", command
                main([*arguments, *SHORTER.get(arguments[0], [])])
            ran.append(command)
    return ran


def test_every_recipe_is_tested() -> None:
    assert list(SECTIONS) == [
        "Set up and test",
        "An objective",
        "A VLM family",
        "A dataset",
        "A benchmark",
        "A metric",
    ]


@pytest.mark.usefixtures("pictograms", "own_modules")
def test_documented_objective_recipe_trains_and_exports_an_adapter() -> None:
    assert len(follow("An objective")) == 1
    losses = pd.read_csv("runs/simpo/metrics.csv").query("metric == 'train/loss'").value
    assert len(losses)
    assert Path("runs/simpo/adapter/adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("pictograms", "own_modules")
def test_documented_vlm_family_recipe_is_measured_and_scored() -> None:
    assert len(follow("A VLM family")) == 1
    responses = {record["response"] for record in read_jsonl(Path("runs/brightness/responses.jsonl"))}
    assert responses <= {"No, it is not safe.", "Yes, it is safe."}
    assert Path("runs/brightness/scores.csv").is_file()


@pytest.mark.usefixtures("pictograms", "own_modules")
def test_documented_dataset_recipe_is_measured() -> None:
    assert len(follow("A dataset")) == 2
    ids = [record["id"] for record in read_jsonl(Path("runs/posters/responses.jsonl"))]
    assert ids == ["Posters/0.png/alignment/0", "Posters/1.png/alignment/0"]


@pytest.mark.usefixtures("pictograms", "own_modules")
def test_documented_benchmark_recipe_is_evaluated_and_reported() -> None:
    assert len(follow("A benchmark")) == 3
    assert len(list(read_jsonl(Path("runs/colours/evaluation/responses.jsonl")))) == 2
    assert "Colours" in Path("runs/colours.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("pictograms", "own_modules")
def test_documented_metric_recipe_writes_its_values() -> None:
    assert len(follow("A metric")) == 1
    assert (pd.read_csv("runs/length/words.csv").words >= 0).all()
