"""Version 0.1: modules, class paths and recorded settings resolve to today's; its run folders are read."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import safervlm
from safervlm.cli.lightning import IdleCLI
from safervlm.cli.main import main
from safervlm.data.alignment import SFTData
from safervlm.legacy import MOVED, SPLIT, find, today, with_todays_names
from safervlm.objectives import SFT
from safervlm.records import read_jsonl
from safervlm.results.runs import load_run
from safervlm.run import finished, read_manifest

# A measurement and a training in one folder, written by version 0.1, with placeholders for paths.
OLD_RUN = Path(__file__).parent / "fixtures" / "run-0.1"

# Every class path in the recipes and saved configurations of version 0.1, and what its users import.
CLASS_PATHS = [
    "callbacks.adapter_export.AdapterExport",
    "callbacks.attempt_log.AttemptLog",
    "callbacks.checkpoint.LastCheckpoint",
    "callbacks.first_implementation.FirstImplementationFiles",
    "callbacks.generation_check.GenerationCheck",
    "callbacks.judge_responses.JudgeResponses",
    "callbacks.metrics_csv.MetricsCSV",
    "callbacks.rate_responses.RateResponses",
    "callbacks.record_writer.RecordWriter",
    "callbacks.rollout_log.RolloutLog",
    "callbacks.score_table.ScoreTable",
    "safervlm.data.alignment.DPOData",
    "safervlm.data.alignment.OwnData",
    "safervlm.data.alignment.PPOData",
    "safervlm.data.alignment.SFTData",
    "safervlm.data.benchmarks.Benchmark",
    "safervlm.data.contexts.Contexts",
    "safervlm.data.labelled.LabelledAnswers",
    "safervlm.data.responses.SavedResponses",
    "safervlm.data.suite.Suite",
    "safervlm.data.unsafe_concepts.ImageRecord",
    "safervlm.data.unsafe_concepts.ImageSets",
    "safervlm.data.unsafe_concepts.UnsafeConcepts",
    "safervlm.data.unsafe_concepts.paper_split",
    "safervlm.data.unsafe_concepts.spread",
    "safervlm.judge.Judge",
    "safervlm.judge.Panel",
    "safervlm.measure.Measure",
    "safervlm.objectives.DPO",
    "safervlm.objectives.PPO",
    "safervlm.objectives.SFT",
    "safervlm.objectives.dpo.DPO",
    "safervlm.objectives.ppo.PPO",
    "safervlm.objectives.sft.SFT",
    "safervlm.vlm.api.Server",
    "safervlm.vlm.cogvlm.CogVLM",
    "safervlm.vlm.llava.Llava",
    "safervlm.vlm.llava_original.LlavaOriginal",
    "safervlm.vlm.lora.LoRA",
    "safervlm.vlm.sampling.Sampling",
    "safervlm.vlm.transformers.Transformers",
    "safervlm.vlm.xcomposer.XComposer2",
    "safervlm.data.base.Parts",
    "safervlm.data.base.SaferData",
    "safervlm.functional.dpo_loss",
    "safervlm.functional.gae",
    "safervlm.images.open_image",
    "safervlm.intervals.coverage",
    "safervlm.rules.yes_or_no",
    "safervlm.scoring.load_run",
    "safervlm.scoring.scores",
    "safervlm.scoring.compare",
    "safervlm.records.Question",
    "safervlm.records.RecordError",
    "safervlm.rating.Rating",
    "safervlm.evaluation.Column",
    "safervlm.evaluation.columns",
    "safervlm.evaluation.evaluate",
    "safervlm.demo.demo",
    "safervlm.verify.verify",
]


@pytest.mark.parametrize("path", CLASS_PATHS)
def test_legacy_class_path_resolves_to_the_current_class(path: str) -> None:
    old = pkgutil.resolve_name(path)
    module, _, name = today(path).rpartition(".")
    assert getattr(importlib.import_module(module), name) is old


@pytest.mark.parametrize("module", sorted(MOVED))
def test_current_modules_of_a_legacy_module_exist(module: str) -> None:
    assert all(importlib.import_module(place) for place in MOVED[module])
    with pytest.raises(AttributeError, match=rf"module '{module}' has no attribute 'nothing'"):
        getattr(importlib.import_module(module), "nothing")  # noqa: B009 (looked up by the import hook)
    with pytest.raises(ImportError):
        exec(f"from {module} import nothing")


def test_legacy_names_do_not_shadow_current_modules() -> None:
    there = {info.name for info in pkgutil.walk_packages(safervlm.__path__, "safervlm.")}
    assert not there & MOVED.keys()
    assert there >= SPLIT.keys()


def test_other_names_are_not_translated() -> None:
    assert today("mine.Judge") == "mine.Judge"
    assert today("safervlm.judge.Nothing") == "safervlm.judge.Nothing"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("safervlm.nothing")
    with pytest.raises(AttributeError):
        find("safervlm.judge", "Nothing")


def test_recorded_settings_are_translated_to_current_names() -> None:
    before = {"model.class": "safervlm.measure.Measure", "model.vlm.class": "safervlm.vlm.transformers.Transformers"}
    expected = {"model.class": "safervlm.measure.Measure", "model.vlm.class": "safervlm.vlm.auto.Transformers"}
    assert with_todays_names(before | {"n": 3, "model": "safervlm.judge.Judge"}) == expected | {
        "n": 3,
        "model": "safervlm.judge.Judge",
    }


@pytest.fixture
def old_run(tiny_llava: Path, tiny_sets: Path, tiny_judges: Path, tmp_path: Path) -> Path:
    """The run folder of version 0.1, about the models and data of the other tests."""
    run = tmp_path / "run"
    run.mkdir()
    places = {"LLAVA": tiny_llava, "SETS": tiny_sets, "JUDGES": tiny_judges, "RUN": run}
    for file in OLD_RUN.iterdir():
        text = file.read_text(encoding="utf-8")
        for placeholder, path in places.items():
            text = text.replace(placeholder, str(path))
        (run / file.name).write_text(text, encoding="utf-8")
    return run


def test_an_old_run_is_loaded_and_reported(old_run: Path, tmp_path: Path) -> None:
    assert read_manifest(old_run)["stages"].keys() == {"measure", "sft"}
    assert finished(old_run, "measure")
    table = load_run(old_run)
    assert len(table) == 30
    assert set(table.label) <= {"Safe", "Unsafe", "N/A"}
    main(["report", str(old_run), "--out", str(tmp_path / "report.html")])
    assert "UnsafeConcepts" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_sampled_responses_of_an_old_run_are_not_continued(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hint = "with the sampling noise of another version of SaferVLM (model.noise: None there, 2 now)"
    again = ["predict", "--config", str(old_run / "predict.yaml"), "--run", str(old_run)]
    for line in (again, ["verify", str(old_run), "--sample", "3"]):
        with pytest.raises(SystemExit, match="2"):
            main(line)
        assert hint in capsys.readouterr().err


def test_an_old_run_is_verified(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (old_run / "predict.yaml", old_run / "manifest.json"):  # as if its responses were greedy
        text = file.read_text(encoding="utf-8")
        greedy = re.sub(r"(temperature\W+)1\.0", r"\g<1>0.0", text)
        assert greedy != text
        file.write_text(greedy, encoding="utf-8")
    main(["verify", str(old_run), "--sample", "3"])
    assert "3 verdicts" in (said := capsys.readouterr().out)  # without the hash of the text that they are about
    assert "of version 0.1" in said
    changed = list(read_jsonl(old_run / "verify.jsonl"))  # another processor may round to another response
    assert all(record["label"] is None for record in changed)


def test_an_old_configuration_is_built(old_run: Path, tmp_path: Path) -> None:
    line = ["fit", "--config", str(old_run / "fit.yaml"), "--run", str(tmp_path / "again")]
    cli = IdleCLI(line, build=True)
    assert type(cli.model) is SFT
    assert type(cli.datamodule) is SFTData
    assert cli.model.vlm.lora.r == 2
