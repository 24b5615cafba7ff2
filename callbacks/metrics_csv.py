"""Training metrics as a CSV file to which a resumed run appends."""

import csv
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from safervlm.io.files import write_atomically
from safervlm.run_folder import RunFolder

COLUMNS = ("batch", "metric", "value")


class MetricsCSV(Callback):
    """Writes ``metrics.csv`` in the run folder: one row for each ``train/`` metric that a training batch logged.

    A run that is resumed from a checkpoint first removes the rows after it; they are written again, with the same
    values. Lightning's ``CSVLogger`` would delete the earlier rows.
    """

    def __init__(self) -> None:
        self._written: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the rows up to the checkpoint, or starts a new file."""
        if not trainer.is_global_zero:
            return
        path, done = self._path(trainer), trainer.fit_loop.epoch_loop.total_batch_idx + 1
        rows = []
        if done and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                # An incomplete row, left by a crash, is always after the checkpoint.
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3 and int(row[0]) <= done]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *rows])

        write_atomically(path, write)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Appends the batch's metrics."""
        if not trainer.is_global_zero:
            return
        number = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        rows = []
        # Sorted: Lightning's order is that of the first logging, which differs in a resumed run.
        for name, value in sorted(trainer.callback_metrics.items()):
            # The dictionary still has metrics of earlier batches, in the same memory; a resumed run would lack them.
            before = self._written.get(name)
            if name.startswith("train/") and (before is None or before.data_ptr() != value.data_ptr()):
                self._written[name] = value
                rows.append((number, name, repr(value.item())))
        with self._path(trainer).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return RunFolder(trainer.default_root_dir).metrics
