"""When last.ckpt is written, and its state after a crash."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

import callbacks.checkpoint
from callbacks.checkpoint import LastCheckpoint, save_last
from callbacks.generation_check import GenerationCheck
from safervlm.io import sharded
from safervlm.io.seals import verify_seal
from safervlm.run import lock


class Module(LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.weight.sum()
        for _ in range(3):  # optimizer steps a batch
            self.optimizers().step()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Steps(Callback):
    """Sets the duration of each step by a fake clock."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.now = seconds, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.now += self.seconds[trainer.fit_loop.epoch_loop.total_batch_idx] if self.seconds else 0


def saved(
    monkeypatch,
    tmp_path,
    every: int,
    manual: bool = False,
    seconds=(),
    saving: float = 0,
    long_step: float | None = None,
    other: Callback | None = None,
    **settings,
) -> list[int]:
    """Returns the numbers of the batches after which a run saved a checkpoint, with six batches per epoch."""
    batches, steps = [], Steps(seconds)

    def note(trainer, folder):
        assert folder == tmp_path / "checkpoints"
        batches.append(trainer.fit_loop.epoch_loop.total_batch_idx + 1)
        steps.now += saving

    monkeypatch.setattr(callbacks.checkpoint, "save_last", note)
    monkeypatch.setattr(callbacks.checkpoint, "time", SimpleNamespace(monotonic=lambda: steps.now))
    checkpoint = LastCheckpoint(every, long_step)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[checkpoint, steps, *([other] if other else [])],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(Module(manual), range(6))
    assert trainer.callbacks[-1] is checkpoint  # after the files that the other callbacks write about a batch
    assert len(trainer.callbacks) == (3 if other else 2)
    return batches


def test_checkpoint_is_saved_every_n_batches_and_at_the_end(monkeypatch, tmp_path):
    assert saved(monkeypatch, tmp_path, 5, max_epochs=2) == [5, 10, 12]


def test_checkpoint_is_saved_at_the_end_of_a_run_limited_by_max_steps(monkeypatch, tmp_path):
    assert saved(monkeypatch, tmp_path, 50, max_epochs=2, max_steps=8) == [8]


def test_checkpoint_interval_counts_batches_and_not_optimizer_steps(monkeypatch, tmp_path):
    assert saved(monkeypatch, tmp_path, 4, manual=True, max_epochs=2) == [4, 8, 12]
    assert saved(monkeypatch, tmp_path, 50, manual=True, max_epochs=2, max_steps=15) == [5]


def test_checkpoint_waits_for_the_step_of_accumulated_gradients(monkeypatch, tmp_path):
    # Steps after batches 4, 6 (an epoch's end), 10 and 12.
    assert saved(monkeypatch, tmp_path, 3, max_epochs=2, accumulate_grad_batches=4) == [4, 10, 12]


@pytest.mark.parametrize(
    ("seconds", "settings", "expected"),
    [
        ([1] * 12, {}, [12]),  # short steps
        ([3] * 12, {}, [*range(1, 13)]),
        ([1, 3] + [1] * 10, {}, [*range(2, 13)]),  # from the first long one on
        ([3] + [1] * 29, {"max_epochs": 5}, [*range(1, 12), 30]),  # ten batches after the last long one
        ([1] * 12, {"accumulate_grad_batches": 3}, [3, 6, 9, 12]),  # the duration of a step is the sum over its batches
        ([3] * 3, {"manual": True, "max_epochs": 1, "limit_train_batches": 3}, [1, 2, 3]),
    ],
)
def test_checkpoint_is_saved_after_each_long_step(seconds, settings, expected, monkeypatch, tmp_path):
    assert saved(monkeypatch, tmp_path, 50, seconds=seconds, **{"max_epochs": 2} | settings) == expected


def test_saving_time_counts_as_part_of_a_step(monkeypatch, tmp_path):
    assert saved(monkeypatch, tmp_path, 5, max_epochs=2, seconds=[1] * 12, saving=1.5) == [5, 6, 7, 8, 9, 10, 11, 12]


def test_the_default_of_a_long_step_is_half_of_the_grace(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFERVLM_GRACE", "8")
    assert saved(monkeypatch, tmp_path, 50, max_epochs=1, seconds=[3] * 6) == [6]
    assert saved(monkeypatch, tmp_path, 50, max_epochs=1, seconds=[5] * 6) == [1, 2, 3, 4, 5, 6]
    assert saved(monkeypatch, tmp_path, 50, max_epochs=1, seconds=[5] * 6, long_step=6) == [6]


@pytest.mark.parametrize(("took", "expected"), [(3, [2, 4, 6]), (1, [6])])
def test_checkpoint_is_saved_before_a_long_generation_check(took, expected, monkeypatch, tmp_path):
    check = object.__new__(GenerationCheck)
    check.every_n_batches, check.seconds = 2, took
    for hook in ("on_train_start", "on_train_batch_start", "on_train_end"):
        monkeypatch.setattr(check, hook, lambda *args: None)
    monkeypatch.setattr(GenerationCheck, "state_dict", lambda self: {})
    assert saved(monkeypatch, tmp_path, 50, max_epochs=1, seconds=[1] * 6, other=check) == expected


def test_checkpoint_is_saved_before_validation(monkeypatch, tmp_path):
    monkeypatch.setattr(Module, "validation_step", lambda self, batch, batch_idx: None)
    monkeypatch.setattr(Module, "val_dataloader", lambda self: range(2))
    assert saved(monkeypatch, tmp_path, 50, max_epochs=2, seconds=[1] * 12) == [6, 12]
    assert saved(monkeypatch, tmp_path, 50, max_epochs=1, seconds=[1] * 6, val_check_interval=2) == [2, 4, 6]
    monkeypatch.setattr(Module, "val_dataloader", lambda self: [])  # nothing is held out
    assert saved(monkeypatch, tmp_path, 50, max_epochs=2, seconds=[1] * 12) == [12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches: at least 1, got 0"),
        *(({"long_step": value}, "long_step: above 0") for value in (0, -1, math.inf, math.nan)),
    ],
)
def test_out_of_range_checkpoint_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        LastCheckpoint(**arguments)


class Saving:
    """The parts of a trainer that saving needs; ``write`` receives the path and may raise."""

    def __init__(self, write) -> None:
        self.save_checkpoint, self.is_global_zero = write, True
        self.strategy = SimpleNamespace(barrier=lambda name: None, broadcast=lambda value: value)
        self.lightning_module = Module()


def write_folder(content: str, die: bool = False):
    def write(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / content).write_text(content)
        (path / "latest").write_text("a mark of DeepSpeed's")
        if die:
            raise KeyboardInterrupt

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("safervlm.json", "latest"))


def test_checkpoint_file_is_replaced_atomically(tmp_path):
    def write(content: str, die: bool = False):
        def save(path: Path) -> None:
            parts = {"state_dict": {}, "loops": {}, "optimizer_states": [{}], "lr_schedulers": []}
            torch.save(parts | {"pytorch-lightning_version": "2.6.0", "content": content}, path)
            if die:
                raise KeyboardInterrupt

        return save

    def content() -> str:
        verify_seal(tmp_path / "last.ckpt", {"class": f"{Module.__module__}.Module"})
        return torch.load(tmp_path / "last.ckpt", weights_only=True)["content"]

    save_last(Saving(write("first")), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save_last(Saving(write("torn", die=True)), tmp_path)
    assert content() == "first"
    save_last(Saving(write("second")), tmp_path)
    assert content() == "second"
    assert names(tmp_path) == ["last.ckpt"]


def test_checkpoint_folder_is_replaced_atomically(tmp_path, monkeypatch):
    for content in ("first", "second", "third"):
        save_last(Saving(write_folder(content)), tmp_path)
        assert names(tmp_path / "last.ckpt") == [content]
        verify_seal(tmp_path / "last.ckpt", {"class": f"{Module.__module__}.Module"})
        assert len(names(tmp_path)) == 2  # the link and its target
    with pytest.raises(KeyboardInterrupt):
        save_last(Saving(write_folder("torn", die=True)), tmp_path)
    assert names(tmp_path / "last.ckpt") == ["third"]
    # The next checkpoint contains nothing of the torn one.
    save_last(Saving(write_folder("fourth")), tmp_path)
    assert names(tmp_path / "last.ckpt") == ["fourth"]

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded, "remove_replaced", die)
    with pytest.raises(KeyboardInterrupt):  # between the creation of the new link and the removal of the old folder
        save_last(Saving(write_folder("fifth")), tmp_path)
    monkeypatch.undo()
    assert names(tmp_path / "last.ckpt") == ["fifth"]
    save_last(Saving(write_folder("sixth")), tmp_path)
    assert names(tmp_path / "last.ckpt") == ["sixth"]
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_saving_keeps_the_users_own_checkpoints(kind, tmp_path):
    """Checkpoints that the user copied or linked here, and what last.ckpt pointed to before."""
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    names = ("next.ckpt", "other.ckpt", "link", "best.ckpt", ".safervlm-mine.ckpt")
    for folder in (elsewhere, *(checkpoints / f"{name}.d" for name in names), checkpoints / "next.ckpt"):
        folder.mkdir(parents=True)
        (folder / "mine").write_text("mine")
    for name in names[1:]:
        (checkpoints / name).write_text("mine")
    (checkpoints / ".safervlm-0123456789abcdef.ckpt").symlink_to(elsewhere)
    (checkpoints / "last.ckpt").symlink_to(elsewhere)
    mine = {path for path in tmp_path.rglob("*") if path.name != "last.ckpt"}

    write = write_folder("first") if kind == "folder" else lambda path: torch.save({"state_dict": {}}, path)
    for _ in range(2):
        save_last(Saving(write), checkpoints)
        held = lock(tmp_path)
        assert held is not None
        held.close()
    assert [path for path in sorted(mine) if not path.exists()] == []
    new = {path.relative_to(checkpoints).parts[0] for path in checkpoints.rglob("*") if path not in mine}
    assert len(new) == (2 if kind == "folder" else 1)  # last.ckpt, and the folder that it points to
