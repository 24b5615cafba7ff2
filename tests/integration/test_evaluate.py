"""The evaluation suite from the command line: several datasets in one run, skipped datasets, resuming, the table."""

import json
import os
import subprocess
from pathlib import Path

import forked
import pytest
import yaml
from processes import play, start_together

from safervlm.pictograms.benchmarks import write_benchmarks
from safervlm.records import read_jsonl, write_jsonl

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """The pictograms' benchmarks, with contexts of the tiny sets' concepts."""
    folder = tmp_path_factory.mktemp("world")
    record = {"image_filename": "images/0.png", "category": "Violence", "unsafe_concept": "knife"}
    write_jsonl(folder / "unsafe" / "metadata.jsonl", [record])
    write_benchmarks(folder, seed=0)
    concepts = ("Angry Mob", "Knife", "Razor")
    records = [
        {"category": "Hate", "unsafe concept": c, "output": f"Safe Context: {c}, may it?\n\nUnsafe Context: May {c}?"}
        for c in concepts
    ]
    (folder / "benchmarks" / "contexts.json").write_text(json.dumps(records))
    return folder / "benchmarks"


@pytest.fixture(scope="module")
def overlay(benchmarks, tiny_sets, tiny_llava, tiny_panel, tmp_path_factory):
    """The recipe's overlay: the shipped one for pictograms with tiny datasets, model and judges."""
    settings = yaml.safe_load((ROOT / "configs/pictograms/evaluate.yaml").read_text())
    folder = tmp_path_factory.mktemp("suite")
    sets = settings["data"]["init_args"]["sets"]
    for name, data in sets.items():
        arguments = data["init_args"]
        if "folder" in arguments:
            arguments |= {"folder": str(tiny_sets / "unsafe"), "validation_fraction": 0.0}
        if "safe_folder" in arguments:
            arguments["safe_folder"] = str(tiny_sets / "safe")
        for key in ("source", "contexts"):
            if key in arguments:
                arguments[key] = str(benchmarks / Path(arguments[key]).name)
        if name in ("mme", "mmvet", "llavabench", "smid", "nsfw"):
            arguments |= {"cache_dir": str(folder / "cache"), "limit": 8}
    settings["model"]["init_args"] = {
        "vlm": {"class_path": "safervlm.vlm.llava.Llava", "init_args": {"model": str(tiny_llava), "dtype": "float32"}},
        "sampling": {"max_new_tokens": 4},
    }
    settings["data"]["init_args"]["batch_size"] = 16
    settings["trainer"]["callbacks"][1]["init_args"]["panel"] = tiny_panel
    settings["trainer"]["enable_progress_bar"] = False
    (folder / "overlay.yaml").write_text(yaml.safe_dump(settings))
    return folder / "overlay.yaml"


def line(overlay, run, *more):
    recipe = [f"--config={ROOT}/configs/evaluate.yaml", f"--config={overlay}"]
    return ["predict", *recipe, f"--run={run}", *more]


def assert_same(run, other):
    """Checks that responses are byte-identical and verdicts equal; probabilities depend on the batch by rounding."""
    assert (run / "responses.jsonl").read_bytes() == (other / "responses.jsonl").read_bytes()
    found, expected = (list(read_jsonl(folder / "verdicts.jsonl")) for folder in (run, other))
    for one, two in zip(found, expected, strict=True):
        assert one.pop("probabilities") == pytest.approx(two.pop("probabilities"), abs=1e-5)
        assert one == two


@pytest.mark.slow
def test_evaluation_killed_resumed_or_run_in_parts_gives_the_same_results(overlay, tmp_path):
    whole = tmp_path / "whole"
    play(line(overlay, whole), tmp_path)
    asked = {(record["dataset"], record["capability"]) for record in read_jsonl(whole / "responses.jsonl")}
    assert asked == {
        *(("Pictograms", c) for c in ("alignment", "context", "context_text_only")),
        ("SafePictograms", "alignment"),
        *(("MME", "yes_no"), ("MM-Vet", "occurs"), ("LLaVABench", "rated")),
        *(("SMID", "generalisation"), ("NSFW", "generalisation")),
    }
    killed = tmp_path / "killed"
    for batch in (2, 5):
        kill = ["--trainer.callbacks+=processes.KillInPredict", f"--trainer.callbacks.batch={batch}"]
        play(line(overlay, killed, *kill), tmp_path, code=-9)
    play(line(overlay, killed), tmp_path)
    assert_same(killed, whole)
    parts = tmp_path / "parts"
    play(line(overlay, parts, "--data.only=[smid,mme]"), tmp_path)
    some = (parts / "responses.jsonl").read_text()
    assert {json.loads(record)["dataset"] for record in some.splitlines()} == {"SMID", "MME"}
    play(line(overlay, parts, "--data.only=[nsfw]"), tmp_path)  # earlier responses are kept
    assert set(some.splitlines()) < set((parts / "responses.jsonl").read_text().splitlines())
    play(line(overlay, parts), tmp_path)
    assert_same(parts, whole)
    # A dataset that has changed is rejected; a dataset that was unavailable before is accepted.
    refused = play(line(overlay, parts, "--data.limit=3", "--data.only=[smid]"), tmp_path, code=2)
    assert "data.sets.smid.limit: 8 there, 3 now" in refused


@pytest.mark.slow
def test_two_processes_skip_the_same_dataset(overlay, tmp_path):
    """One process looks for the dataset, and both skip it."""
    settings = yaml.safe_load(overlay.read_text())
    settings["data"]["init_args"]["sets"]["smid"]["init_args"]["source"] = "./nowhere.tsv"
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(settings))
    some = "--data.only=[mme,smid,nsfw]"
    one = play(line(tmp_path / "overlay.yaml", tmp_path / "one", some), tmp_path, code=3)
    assert one.count("smid is skipped") == 1
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2")
    ranks = start_together(line(tmp_path / "overlay.yaml", tmp_path / "two", some, *ddp), tmp_path)
    assert [rank.end() for rank in ranks] == [3, 0], ranks[0].output  # the first process reports for both
    assert sum(rank.output.count("smid is skipped") for rank in ranks) == 1
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_failed_run_does_not_stop_others_and_the_table_is_written(overlay, tmp_path, tiny_llava):
    settings = yaml.safe_load(overlay.read_text())
    settings["data"]["init_args"]["sets"]["nsfw"]["init_args"]["source"] = "./nowhere.tsv"
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(settings))
    adapter = tmp_path / "runs" / "sft" / "adapter"
    fit = ["fit", "--config=configs/sft.yaml", f"--model.vlm.model={tiny_llava}", "--model.vlm.dtype=float32"]
    sets = settings["data"]["init_args"]["sets"]["unsafe_concepts"]["init_args"]
    fit += [f"--data.folder={sets['folder']}", f"--data.safe_folder={sets['safe_folder']}", "--data.num_workers=0"]
    fit += [
        "--model.warmup_steps=0",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]

    def run(*words):
        environment = os.environ | {"COLUMNS": "200"}
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    with forked.program() as program:
        (tmp_path / "broken.yaml").write_text("model: {")
        trained = run(*forked.driver(program), "train", tmp_path / "broken.yaml", "sft", *fit[2:])
        assert trained.returncode == 1
        assert "failed: broken (exit code 2)" in trained.stderr
        assert (adapter / "adapter_config.json").is_file()
        only = "--data.only=[unsafe_concepts,contexts,mme,nsfw]"
        ended = run(
            *forked.driver(program), "evaluate", "runs/sft/", "runs/dpo", "--config", tmp_path / "overlay.yaml", only
        )
        assert ended.returncode == 1, ended.stderr
        assert "failed: runs/dpo: no adapter in it; train one" in ended.stderr
        assert ended.stderr.count("nsfw was skipped: data.sets.nsfw.source: there is no nowhere.tsv") == 2
        assert "incomplete: runs/sft: some questions have no response" in ended.stderr
        assert "MME total" in ended.stdout
        assert "sft" in (tmp_path / "runs" / "evaluation_differences.csv").read_text()
        page = (tmp_path / "runs" / "evaluation.html").read_text()
        assert "vlm.adapter" in page  # the difference between the two
        manifest = json.loads((tmp_path / "runs/sft/evaluation/manifest.json").read_text())
        assert "nsfw" not in manifest["stages"]["measure"]["settings"]["data"]["sets"]
        # The same table by the command that also reports measurements, for the folders or for the runs.
        for runs in (["runs/original/evaluation", "runs/sft/evaluation"], ["runs/original", "runs/sft"]):
            assert "MME total" in run(*program, "report", *runs, "--out", "again.html").stdout
            assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "runs" / "evaluation.csv").read_bytes()
