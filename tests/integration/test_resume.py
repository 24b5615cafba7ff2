"""A killed and resumed run ends bit-identical to an uninterrupted one."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import play, write_config

pytestmark = pytest.mark.slow

OBJECTIVES = ("sft", "dpo", "ppo", "grpo")
# 48 examples in batches of 8, two epochs: 12 batches, a checkpoint at every other one and at the last.
BATCHES = 12


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_llava, tiny_sets, tiny_judges) -> Callable[..., list[object]]:
    """``command(objective, run, *overlays)``: a command line with shuffling, dropout and two workers."""
    folder = tmp_path_factory.mktemp("configs")
    vlm = {"model": str(tiny_llava), "dtype": "float32", "lora": {"r": 4, "alpha": 8}, "system": ""}
    for objective in OBJECTIVES:
        model: dict[str, Any] = {"vlm": {"class_path": "safervlm.vlm.llava.Llava", "init_args": vlm}, "lr": 0.01}
        callbacks = []
        if objective in ("ppo", "grpo"):
            judge = {
                "base": str(tiny_judges / "alignment"),
                "checkpoint": str(tiny_judges / "alignment" / "epoch_10.pt"),
            }
            judge = {"class_path": "safervlm.judging.classifier.Judge", "init_args": judge}
            model |= {"judge": judge, "response_length": 6, "mini_batch_size": 4, "micro_batch_size": 2}
            model |= {"group_size": 2, "mini_batch_size": 8} if objective == "grpo" else {}
            check = {"judge": judge, "every_n_batches": 4, "minimum": 6, "sampling": {"max_new_tokens": 3}}
            # After the checkpoint's callback, as a user's overlay appends it.
            callbacks = [
                {"class_path": "callbacks.generation_check.GenerationCheck", "init_args": check},
                {"class_path": "callbacks.rollout_log.RolloutLog"},
            ]
        config = {
            "model": {"init_args": model},
            "data": {
                "init_args": {
                    "folder": str(tiny_sets / "unsafe"),
                    "safe_folder": str(tiny_sets / "safe"),
                    "validation_fraction": 0.2 if objective in ("ppo", "grpo") else 0.0,
                    "batch_size": 8,
                    "num_workers": 2,
                }
            },
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "precision": "32-true",
                "max_epochs": 2,
                "enable_progress_bar": False,
                "callbacks+": callbacks,
            },
        }
        write_config(folder / f"{objective}.yaml", config)

    def make(objective: str, run: object, *more: object, long_step: float = 1000) -> list[object]:
        checkpoint = {"every_n_batches": 2, "long_step": long_step}
        callbacks = [
            {"class_path": "callbacks.checkpoint.LastCheckpoint", "init_args": checkpoint},
            {"class_path": "callbacks.metrics_csv.MetricsCSV"},
            {"class_path": "callbacks.adapter_export.AdapterExport"},
        ]
        saving = write_config(folder / f"{long_step}.yaml", {"trainer": {"callbacks": callbacks}})
        configs = [f"configs/{objective}.yaml", saving, folder / f"{objective}.yaml"]
        return ["fit", *(f"--config={config}" for config in configs), "--run", run, *more]

    return make


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory) -> Callable[[str], Path]:
    """``uninterrupted(objective)``: the folder of an uninterrupted run."""
    done: dict[str, Path] = {}

    def run(objective: str) -> Path:
        if objective not in done:
            folder = tmp_path_factory.mktemp(objective)
            play(command(objective, folder / "run"), folder)
            done[objective] = folder / "run"
        return done[objective]

    return run


def checkpoint(run: Path) -> dict[str, Any]:
    # A trusted file, written by this test.
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Checks that two runs are bit-identical."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}/{index}")
    else:
        assert one == other, place


def assert_same_run(run: Path, other: Path) -> None:
    assert (run / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    mine, its = checkpoint(run), checkpoint(other)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks")
    for part in (*parts, *(["reference_logprobs"] if "reference_logprobs" in its else [])):
        assert_same(mine[part], its[part], part)
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()
    if (other / "rollouts.jsonl").exists():
        assert (run / "rollouts.jsonl").read_bytes() == (other / "rollouts.jsonl").read_bytes()
    assert json.loads((run / "manifest.json").read_text())["stages"].popitem()[1]["finished"]


def batches(run: Path) -> int:
    """The last batch in metrics.csv."""
    return int((run / "metrics.csv").read_text().splitlines()[-1].split(",")[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_uninterrupted_reference_run_trains_and_completes_its_schedule(objective, uninterrupted):
    run = uninterrupted(objective)
    state = checkpoint(run)
    assert batches(run) == BATCHES
    # The weights changed, dropout was active, and the schedule reached its end.
    assert any(value.abs().max() > 1e-3 for name, value in state["state_dict"].items() if "lora_B" in name)
    assert state["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0, abs=1e-9)
    if objective in ("ppo", "grpo"):
        assert "train/unsafe_rate_on_safe" in (run / "metrics.csv").read_text()
    if objective == "ppo":
        assert {name.split(".")[-2] for name in state["state_dict"] if "lora" in name} == {"default", "value"}


@pytest.mark.parametrize("objective", ["sft", "dpo", "ppo"])  # GRPO's loop is PPO's
def test_run_interrupted_in_every_way_ends_bit_identical(objective, command, uninterrupted, tmp_path):
    line, run, whole = command(objective, "run"), tmp_path / "run", uninterrupted(objective)
    expected = (whole / "metrics.csv").read_bytes()

    def interrupted(by: str, code: int, rows: int, saved: int) -> None:
        play([*line, f"--trainer.callbacks+=processes.{by}", *settings], tmp_path, code)
        # The results so far are correct.
        assert expected.startswith((run / "metrics.csv").read_bytes())
        assert (batches(run), checkpoint(run)["lr_schedulers"][0]["last_epoch"]) == (rows, saved)
        assert not json.loads((run / "manifest.json").read_text())["stages"].popitem()[1]["finished"]

    # SIGTERM: it saves at a batch where it otherwise would not; after that at every other batch.
    settings = ["--trainer.callbacks.batch=3", f"--trainer.callbacks.number={int(signal.SIGTERM)}"]
    interrupted("SignalAtBatchEnd", 143, rows=3, saved=3)
    # kill -9 during a save, the first one of the second epoch.
    settings = ["--trainer.callbacks.save=2"]
    interrupted("KillInSave", -9, rows=7, saved=5)
    assert len(list((run / "checkpoints").glob(".tmp-safervlm-*/last.ckpt"))) == 1  # the torn one
    # kill -9 in the middle of a step: rows after the checkpoint, and a torn row.
    settings = ["--trainer.callbacks.batch=11"]
    interrupted("KillInBackward", -9, rows=10, saved=9)
    with (run / "metrics.csv").open("a") as file:
        file.write("11,train/lo")
    # kill -9 between the rows and the checkpoint of the same batch.
    interrupted("SignalAtBatchEnd", -9, rows=11, saved=9)
    # kill -9 between the last checkpoint and the adapter's export.
    settings = []
    interrupted("KillAtExport", -9, rows=12, saved=12)
    assert not (run / "adapter").exists()

    assert "resuming from" in play(line, tmp_path)
    assert_same_run(run, whole)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_run_with_long_steps_resumes_from_the_last_batch(objective, command, uninterrupted, tmp_path):
    line = command(objective, "run", long_step=1e-6)
    play([*line, "--trainer.callbacks+=processes.KillInBackward", "--trainer.callbacks.batch=4"], tmp_path, code=-9)
    assert checkpoint(tmp_path / "run")["lr_schedulers"][0]["last_epoch"] == 3
    play(line, tmp_path)
    assert_same_run(tmp_path / "run", uninterrupted(objective))


def test_run_resumes_at_the_end_of_an_epoch_and_after_completion(command, uninterrupted, tmp_path):
    line = command("sft", "run")
    play([*line, "--trainer.callbacks+=processes.KillInBackward", "--trainer.callbacks.batch=7"], tmp_path, code=-9)
    assert checkpoint(tmp_path / "run")["lr_schedulers"][0]["last_epoch"] == 6
    for _ in range(2):
        play(line, tmp_path)
        assert_same_run(tmp_path / "run", uninterrupted("sft"))


@pytest.mark.parametrize("objective", ["sft", "ppo"])
def test_run_limited_by_max_steps_resumes_without_further_training(objective, command, tmp_path):
    steps = 5 if objective == "sft" else 10  # PPO: two optimizer steps per rollout
    line = command(objective, "run", f"--trainer.max_steps={steps}", "--model.warmup_steps=1")
    play([*line, "--trainer.callbacks+=processes.KillAtExport"], tmp_path, code=-9)
    state = checkpoint(tmp_path / "run")
    assert state["global_step"] == steps
    assert batches(tmp_path / "run") == 5
    assert state["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0, abs=1e-9)
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    # It is at its last step already: nothing to train, but the export is missing.
    shutil.rmtree(tmp_path / "run" / "adapter", ignore_errors=True)
    play(line, tmp_path)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_termination_waits_for_the_step_of_accumulated_gradients(command, tmp_path):
    """A request to end at batch 5 waits for the optimizer step after batch 8: a checkpoint contains no gradients."""
    for name in ("whole", "run"):
        line = command("sft", name, "--trainer.accumulate_grad_batches=4")
        if name == "run":
            kill = ["--trainer.callbacks+=processes.SignalAtBatchEnd", "--trainer.callbacks.batch=5"]
            play([*line, *kill, f"--trainer.callbacks.number={int(signal.SIGTERM)}"], tmp_path, code=143)
            assert checkpoint(tmp_path / "run")["global_step"] == 2
        play(line, tmp_path)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_other_settings_are_rejected(command, uninterrupted, tmp_path):
    run = uninterrupted("sft")
    printed = play(command("sft", run, "--model.lr=0.02", "--data.batch_size=4"), tmp_path, code=2)
    error = [line for line in printed.splitlines() if line.startswith("safervlm: error:")]
    assert len(error) == 1
    assert "model.lr: 0.01 there, 0.02 now" in error[0]
    assert "data.batch_size: 8 there, 4 now" in error[0]


def test_another_objectives_checkpoint_is_rejected(command, uninterrupted, tmp_path):
    last = uninterrupted("sft") / "checkpoints" / "last.ckpt"
    printed = play(command("ppo", "run", "--ckpt_path", last), tmp_path, code=2)
    assert "model.class: 'safervlm.objectives.sft.SFT' there, 'safervlm.objectives.ppo.PPO' now" in printed


def test_console_script_ends_with_exit_code_143_after_sigterm(command, uninterrupted, tmp_path):
    line = list(map(str, command("sft", "run")))
    helpers = Path(__file__).parents[1] / "helpers"
    for name, module in (("mine", "processes"), ("full_disk", "full_disk")):
        (tmp_path / f"{name}.py").write_text((helpers / f"{module}.py").read_text())
    ask = ["--trainer.callbacks+=mine.SignalAtBatchEnd", "--trainer.callbacks.batch=5"]
    script = str(Path(sys.executable).with_name("safervlm"))
    number = f"--trainer.callbacks.number={int(signal.SIGTERM)}"
    assert subprocess.run([script, *line, *ask, number], cwd=tmp_path, check=False).returncode == 143
    play(line, tmp_path)
    assert_same_run(tmp_path / "run", uninterrupted("sft"))
