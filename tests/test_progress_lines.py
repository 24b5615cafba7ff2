"""ProgressLines: the lines of fit, validate and predict, and when they replace Lightning's bar."""

from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from safervlm import progress_lines as module
from safervlm.cli.trainer import callbacks_with_lines
from safervlm.progress_lines import ProgressLines


class Model(LightningModule):
    """Has one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **settings) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=[ProgressLines()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of progress, without rate and time."""
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err
    assert "\x1b" not in captured.out + captured.err
    return [line.split(",")[0] for line in captured.err.splitlines() if " % (" in line]


def test_fit_validate_and_predict_write_a_progress_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DataLoader(range(4))
    trainer(tmp_path, max_epochs=3).fit(Model(), data, data)
    assert said(capsys) == ["training: 100 % (12 of 12 batches)"]
    trainer(tmp_path).validate(Model(), data, verbose=False)
    assert said(capsys) == ["validation: 100 % (4 of 4 batches)"]
    trainer(tmp_path).predict(Model(), data)
    assert said(capsys) == ["prediction: 100 % (4 of 4 batches)"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 3, "accumulate_grad_batches": 2}, "training: 100 % (3 of 3 steps)"),
        ({"max_epochs": 5, "limit_train_batches": 2}, "training: 100 % (10 of 10 batches)"),
    ],
)
def test_progress_total_follows_max_steps_and_batch_limits(
    settings: dict[str, int], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, **settings).fit(Model(), DataLoader(range(4)))
    assert said(capsys) == [expected]


def test_a_resumed_training_counts_what_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Model(), DataLoader(range(4)))
    first.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    trainer(tmp_path, max_epochs=2).fit(Model(), DataLoader(range(4)), ckpt_path=tmp_path / "last.ckpt")
    assert said(capsys) == ["training: 100 % (8 of 8 batches)"]


def test_other_processes_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    trainer(tmp_path).predict(Model(), DataLoader(range(4)))
    assert said(capsys) == []


@pytest.mark.parametrize(
    ("terminal", "callbacks", "enabled", "expected"),
    [
        (False, None, None, [ProgressLines]),
        (False, [], True, [ProgressLines]),
        (False, [], False, []),
        (False, TQDMProgressBar(), None, [TQDMProgressBar]),
        (True, None, None, []),
    ],
)
def test_progress_lines_replace_the_bar_without_a_terminal(
    terminal: bool, callbacks: object, enabled: bool | None, expected: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "in_terminal", lambda: terminal)
    given = {"callbacks": callbacks, "enable_progress_bar": enabled}
    assert [type(callback) for callback in callbacks_with_lines(given)] == expected


def test_module_print_is_shown_beside_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(Model):
        def on_validation_epoch_end(self) -> None:
            self.print("held-out accuracy 0.5")

    batches = DataLoader(range(2), batch_size=1)
    trainer(tmp_path, max_epochs=1).fit(Prints(), batches, batches)
    assert "held-out accuracy 0.5\n" in capsys.readouterr().out
