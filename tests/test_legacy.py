"""Names of version 0.1: modules, class paths and recorded settings resolve to today's."""

import importlib
import pkgutil

import pytest

import safervlm
from safervlm.legacy import MOVED, SPLIT, find, today, with_todays_names

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
    "safervlm.data.unsafe_concepts.UnsafeConcepts",
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
    "safervlm.evaluation.evaluate",
    "safervlm.demo.demo",
    "safervlm.verify.verify",
]


@pytest.mark.parametrize("path", CLASS_PATHS)
def test_an_old_name_is_todays_object(path: str) -> None:
    old = pkgutil.resolve_name(path)
    module, _, name = today(path).rpartition(".")
    assert getattr(importlib.import_module(module), name) is old


@pytest.mark.parametrize("module", sorted(MOVED))
def test_todays_modules_of_an_old_one_exist(module: str) -> None:
    assert all(importlib.import_module(place) for place in MOVED[module])
    with pytest.raises(AttributeError, match=rf"module '{module}' has no attribute 'nothing'"):
        getattr(importlib.import_module(module), "nothing")  # noqa: B009 (looked up by the import hook)
    with pytest.raises(ImportError):
        exec(f"from {module} import nothing")


def test_no_module_of_today_is_hidden() -> None:
    there = {info.name for info in pkgutil.walk_packages(safervlm.__path__, "safervlm.")}
    assert not there & MOVED.keys()
    assert there >= SPLIT.keys()


def test_other_names_stay() -> None:
    assert today("mine.Judge") == "mine.Judge"
    assert today("safervlm.judge.Nothing") == "safervlm.judge.Nothing"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("safervlm.nothing")
    with pytest.raises(AttributeError):
        find("safervlm.judge", "Nothing")


def test_recorded_settings_have_todays_names() -> None:
    before = {"model.class": "safervlm.measure.Measure", "model.vlm.class": "safervlm.vlm.transformers.Transformers"}
    expected = {"model.class": "safervlm.measure.Measure", "model.vlm.class": "safervlm.vlm.auto.Transformers"}
    assert with_todays_names(before | {"n": 3, "model": "safervlm.judge.Judge"}) == expected | {
        "n": 3,
        "model": "safervlm.judge.Judge",
    }
