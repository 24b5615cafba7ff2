"""MetricsCSV: the rows of metrics.csv."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer

from callbacks.metrics_csv import MetricsCSV


class Logging(LightningModule):
    """Logs one metric in each batch and another, of constant value, in every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.log("train/z", torch.tensor(batch_idx + 0.1), on_step=True)
        if batch_idx % 3 == 0:
            self.log("train/rare", 7.0)
        self.log("other", 1.0)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(run: Path, done: int, first: bool = True) -> SimpleNamespace:
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=done - 1))
    return SimpleNamespace(default_root_dir=str(run), is_global_zero=first, fit_loop=loop)


def rows(run: Path) -> list[str]:
    return (run / "metrics.csv").read_text().splitlines()


def test_a_row_for_each_metric_that_a_batch_logged(tmp_path):
    Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[MetricsCSV()],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Logging(), range(4))
    found = [(int(batch), name, float(value)) for batch, name, value in (row.split(",") for row in rows(tmp_path)[1:])]
    z = [pytest.approx(number % 4 + 0.1) for number in range(8)]
    assert found == [
        (1, "train/rare", 7.0),
        (1, "train/z", z[0]),
        (2, "train/z", z[1]),
        (3, "train/z", z[2]),
        (4, "train/rare", 7.0),
        (4, "train/z", z[3]),
        (5, "train/rare", 7.0),
        (5, "train/z", z[4]),
        (6, "train/z", z[5]),
        (7, "train/z", z[6]),
        (8, "train/rare", 7.0),
        (8, "train/z", z[7]),
    ]


def test_rows_after_the_checkpoint_and_a_truncated_row_are_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("batch,metric,value\n1,a,0.5\n2,a,0.25\n2,b,1.0\n3,a,0.1\n12,a,0.3\n1")
    MetricsCSV().on_train_start(trainer(tmp_path, 2), None)
    assert rows(tmp_path) == ["batch,metric,value", "1,a,0.5", "2,a,0.25", "2,b,1.0"]


def test_new_run_starts_a_new_file_only_in_the_first_process(tmp_path):
    (tmp_path / "metrics.csv").write_text("batch,metric,value\n1,a,0.5\n")
    MetricsCSV().on_train_start(trainer(tmp_path, 0, first=False), None)
    assert len(rows(tmp_path)) == 2
    MetricsCSV().on_train_start(trainer(tmp_path, 0), None)
    assert rows(tmp_path) == ["batch,metric,value"]


def test_resumed_run_with_a_missing_metrics_file_starts_a_new_one(tmp_path):
    MetricsCSV().on_train_start(trainer(tmp_path, 5), None)
    assert rows(tmp_path) == ["batch,metric,value"]
