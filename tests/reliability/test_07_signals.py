"""Promise 7: a signal ends the process within seconds, and the same command resumes to the same result."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import CONTEXT, PROMISE, Played, must_end, play, stall_instead, start_together, write_config

from safervlm.run import finished

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
CODES = {TERM: 143, INT: 130, KILL: -9}
GRACE = 1  # seconds, instead of 4: the time that a step may still take
DEFAULT = 4


def wait_for(file: Path, played: Played) -> None:
    end = time.monotonic() + 200
    while not file.exists():
        assert played.process.exitcode is None, played.output
        assert time.monotonic() < end, played.output
        time.sleep(0.02)


def interrupt(
    line: list[object], folder: Path, where: str, number: int, grace: float = GRACE, **settings: object
) -> str:
    """Runs a command that stalls at a known moment, sends it a signal there, and returns its output."""
    stall = ["--trainer.callbacks+=processes.StallAt", f"--trainer.callbacks.where={where}"]
    stall += [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    marker = folder / "stalled-0"
    marker.unlink(missing_ok=True)
    played = Played([*line, *stall], folder, SAFERVLM_GRACE=grace)
    wait_for(marker, played)
    os.kill(int(played.process.pid or 0), number)
    must_end(played.process.is_alive)
    code = played.end()
    assert code == CODES[signal.Signals(number)], played.output
    assert "Traceback" not in played.output
    return played.output


# Where a measurement stalls, the signal, whether it stalls in C, and the number of responses in the shards afterwards.
PREDICT = [
    ("setup", TERM, False, 0),  # before the model is loaded
    ("setup", INT, False, 0),
    ("setup", KILL, False, 0),
    ("setup", TERM, True, 0),
    ("RecordWriter.on_predict_batch_end", TERM, True, 0),  # in a step that does not end
    ("RecordWriter.on_predict_batch_end", INT, False, 0),
    ("RecordWriter.on_predict_batch_end", KILL, False, 0),
    ("RecordWriter.on_predict_end", TERM, False, 30),  # all questions have responses, nothing is merged
    ("RecordWriter.on_predict_end", KILL, False, 30),
    ("JudgeResponses.on_predict_end", TERM, False, None),
    ("JudgeResponses.on_predict_end", INT, True, None),
    ("ScoreTable.on_predict_end", TERM, False, None),
    ("ScoreTable.on_predict_end", INT, False, None),
    ("RunManifest.teardown", KILL, False, None),
    ("RunManifest.teardown", TERM, False, None),
]


def answers_in_shards(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in (folder / "run" / "shards").rglob("*.jsonl"))


def files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("responses.jsonl", "verdicts.jsonl", "scores.csv")}


@pytest.mark.slow
def test_measurement_interrupted_at_every_point_ends_like_an_uninterrupted_one(
    measuring_line: Callable[[Path, Path], list[str]], tiny_sets: Path, tmp_path: Path
) -> None:
    line: list[object] = [*measuring_line(Path("run"), tiny_sets / "unsafe"), "--data.batch_size=5"]
    whole = tmp_path / "whole"
    whole.mkdir()
    play(line, whole)
    assert (whole / "run" / "responses.jsonl").read_bytes().count(b"\n") == 30

    for where, number, deaf, answered in PREDICT:
        interrupt(line, tmp_path, where, number, deaf=str(deaf).lower())
        if answered is not None:
            assert answers_in_shards(tmp_path) == answered, where
        assert not finished(tmp_path / "run", "measure")
        assert not list((tmp_path / "run").rglob(".tmp-safervlm-*")) or number == KILL or deaf, where
    play(line, tmp_path)
    assert files(tmp_path / "run") == files(whole / "run")
    assert not list((tmp_path / "run").rglob(".tmp-safervlm-*"))


@pytest.mark.parametrize("number", [TERM, INT])
def test_hanging_step_is_abandoned_within_five_seconds(
    number: int, measuring_line: Callable[[Path, Path], list[str]], tiny_sets: Path, tmp_path: Path
) -> None:
    line: list[object] = [*measuring_line(Path("run"), tiny_sets / "unsafe"), "--data.batch_size=5"]
    said = interrupt(line, tmp_path, "RecordWriter.on_predict_batch_end", number, grace=DEFAULT, deaf="true")
    assert "ended in the middle of a step" in said


@pytest.mark.parametrize("number", [TERM, INT])
def test_step_that_ends_within_the_grace_period_is_written(
    number: int, measuring_line: Callable[[Path, Path], list[str]], tiny_sets: Path, tmp_path: Path
) -> None:
    line: list[object] = [*measuring_line(Path("run"), tiny_sets / "unsafe"), "--data.batch_size=5"]
    said = interrupt(line, tmp_path, "RecordWriter.on_predict_batch_end", number, grace=60, call=2, seconds=1)
    assert "the current step is completed first" in said
    assert "the same command" in said
    assert answers_in_shards(tmp_path) == 10


PLAIN = [
    "report run",
    "evaluation run",
    "verify run",
    "label run --rater me",
    "merge run --out merged",
    "export --out exported",
    "pictograms",
    "demo",
    "doctor --config configs/measure.yaml",
]


@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("line", PLAIN)
def test_signal_ends_a_command_without_a_training_loop_in_time(line: str, number: int, tmp_path: Path) -> None:
    log, marker = tmp_path / "log.txt", tmp_path / "stalled"
    (tmp_path / "run").mkdir()
    process = CONTEXT.Process(target=stall_instead, args=(line.split(), log))
    process.start()
    try:
        end = time.monotonic() + 200
        while not marker.exists():
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(int(process.pid or 0), number)
        must_end(process.is_alive)
        process.join()
        assert process.exitcode == CODES[signal.Signals(number)], log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


def callbacks(long_step: float | None, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """The callbacks of a training that writes checkpoints only at the last batch and after long steps."""
    checkpoint = {"every_n_batches": 50, "long_step": long_step}
    return [
        {"class_path": "callbacks.checkpoint.LastCheckpoint", "init_args": checkpoint},
        {"class_path": "callbacks.metrics_csv.MetricsCSV"},
        {"class_path": "callbacks.adapter_export.AdapterExport"},
        *more,
    ]


@pytest.fixture(scope="module")
def fit(tmp_path_factory, tiny_llava: Path, tiny_sets: Path) -> list[object]:
    """A command that trains for 6 batches, none of which counts as long, even on a busy machine."""
    vlm = {"model": str(tiny_llava), "dtype": "float32", "lora": {"r": 4, "alpha": 8}, "system": ""}
    config: dict[str, Any] = {
        "model": {"init_args": {"vlm": {"class_path": "safervlm.vlm.llava.Llava", "init_args": vlm}, "lr": 0.01}},
        "data": {
            "init_args": {
                "folder": str(tiny_sets / "unsafe"),
                "safe_folder": str(tiny_sets / "safe"),
                "validation_fraction": 0.0,
                "batch_size": 8,
                "num_workers": 2,
            }
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "max_epochs": 1,
            "enable_progress_bar": False,
            "callbacks": callbacks(1000),
        },
    }
    file = write_config(tmp_path_factory.mktemp("configs") / "fit.yaml", config)
    return ["fit", "--config=configs/sft.yaml", f"--config={file}", "--run=run"]


def saved(folder: Path) -> int:
    """The number of batches before the last checkpoint."""
    last = folder / "run" / "checkpoints" / "last.ckpt"
    return torch.load(last, weights_only=False)["lr_schedulers"][0]["last_epoch"] if last.exists() else 0


# Where training stalls, in which call, the signal, seconds, whether in C, and the saved batches afterwards.
FIT = [
    ("setup", 1, TERM, 120, False, 0),
    ("MetricsCSV.on_train_batch_end", 2, INT, 1, False, 2),  # the step ends in time: it is saved
    ("MetricsCSV.on_train_batch_end", 2, TERM, 120, True, 2),  # a step that does not end
    ("save", 1, KILL, 120, False, None),
    ("MetricsCSV.on_train_batch_end", 1, TERM, 1, False, 3),
    ("save", 1, TERM, 120, True, 3),  # half of a checkpoint
    ("LastCheckpoint.on_train_batch_end", 1, KILL, 120, False, 3),
    ("AdapterExport.on_fit_end", 1, TERM, 120, False, 6),
    ("AdapterExport.on_fit_end", 1, KILL, 120, False, 6),
]


@pytest.mark.slow
def test_training_interrupted_at_every_point_ends_like_an_uninterrupted_one(fit: list[object], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    play(fit, whole)
    assert saved(whole) == 6
    for where, call, number, seconds, deaf, batches in FIT:
        grace = 60 if seconds == 1 else GRACE
        interrupt(fit, tmp_path, where, number, grace, call=call, seconds=seconds, deaf=str(deaf).lower())
        if batches is not None:
            assert saved(tmp_path) == batches, where
    play(fit, tmp_path)
    for name in ("metrics.csv", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


def long_steps(folder: Path, **settings: object) -> str:
    """The argument that makes steps longer than the grace period."""
    slow = {"class_path": "processes.SlowSteps", "init_args": {"seconds": 0.8 * GRACE} | settings}
    return f"--config={write_config(folder / 'long.yaml', {'trainer': {'callbacks': callbacks(None, slow)}})}"


def test_signal_during_a_long_step_loses_only_that_step(fit: list[object], tmp_path: Path) -> None:
    line = [*fit, long_steps(tmp_path)]
    for call, batches in ((4, 3), (3, 5)):  # the second one resumes after 3
        interrupt(line, tmp_path, "MetricsCSV.on_train_batch_end", TERM, call=call, deaf="true")
        assert saved(tmp_path) == batches


@pytest.mark.parametrize("slow", [0, 1])
def test_two_processes_save_the_same_step_if_one_is_slow(slow: int, fit: list[object], tmp_path: Path) -> None:
    line = [*fit, "--trainer.strategy=ddp", "--trainer.devices=2", "--data.num_workers=0", "--data.batch_size=4"]
    stall = ["--trainer.callbacks+=processes.StallAt", "--trainer.callbacks.where=MetricsCSV.on_train_batch_end"]
    line += [long_steps(tmp_path, rank=slow), *stall, "--trainer.callbacks.call=3"]
    played = start_together(line, tmp_path, SAFERVLM_GRACE=GRACE)
    try:
        for rank in range(2):
            wait_for(tmp_path / f"stalled-{rank}", played[rank])
        os.kill(int(played[0].process.pid or 0), TERM)
        must_end(lambda: any(each.process.is_alive() for each in played))
        assert {each.end() for each in played} == {143}, "\n".join(each.output for each in played)
        assert saved(tmp_path) == 2
    finally:
        for each in played:
            each.process.kill()


@pytest.mark.parametrize(
    ("ranks", "number", "seconds", "codes"),
    [
        ([0], TERM, 1, {143}),  # this process forwards it to the others
        ([1], INT, 1, {130, 143}),
        ([0, 1], TERM, 1, {143}),
        ([0], TERM, 120, {143}),  # one hangs, the other waits for it
        ([1], KILL, 120, {-9, 1}),
        ([0], KILL, 120, {-9, 1}),
    ],
)
def test_signal_to_one_of_two_processes_ends_both(
    ranks: list[int], number: int, seconds: int, codes: set[int], fit: list[object], tmp_path: Path
) -> None:
    line = [*fit, "--trainer.strategy=ddp", "--trainer.devices=2", "--data.num_workers=0", "--data.batch_size=4"]
    stall = ["--trainer.callbacks+=processes.StallAt", "--trainer.callbacks.where=MetricsCSV.on_train_batch_end"]
    stall += ["--trainer.callbacks.call=2", f"--trainer.callbacks.seconds={seconds}"]
    played = start_together([*line, *stall], tmp_path, SAFERVLM_GRACE=60 if seconds == 1 else GRACE)
    try:
        for rank in range(2):
            wait_for(tmp_path / f"stalled-{rank}", played[rank])
        for rank in ranks:
            os.kill(int(played[rank].process.pid or 0), number)
        # The death of a process is noticed by polling once a second; no time is promised.
        must_end(lambda: any(each.process.is_alive() for each in played), promise=15 if number == KILL else PROMISE)
        ended = [each.end() for each in played]
        output = "\n".join(each.output for each in played)
        assert set(ended) == codes, (ended, output)
        if number == KILL:
            survivor = played[1 - ranks[0]].output
            assert sum("another process of this run has ended" in text for text in survivor.splitlines()) == 1
        elif seconds == 1:
            assert saved(tmp_path) == 2
        assert "Traceback" not in output
    finally:
        for each in played:
            each.process.kill()
