"""The scores of a run, written and printed once its answers have been judged."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from rich.console import Console

from safervlm.records import write_atomically
from safervlm.scoring import accuracy_table, by_category, load_run, other_table, scores, write_workbook


class ScoreTable(Callback):
    """Scores the run folder after a prediction: ``scores.csv``, ``scores.xlsx``, and the tables on the terminal.

    It reads ``responses.jsonl`` and ``verdicts.jsonl``, so it stands after the callbacks that write them. Only the
    first process works.
    """

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints.

        Args:
            trainer: its ``default_root_dir`` is the run folder.
            pl_module: not looked at.

        Raises:
            RecordError: see :func:`safervlm.scoring.load_run`.
        """
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        table = scores(load_run(run))
        write_atomically(run / "scores.csv", lambda file: table.to_csv(file, index=False))
        write_workbook(run / "scores.xlsx", {"by category": by_category(table), "scores": table})
        console = Console()
        console.print(accuracy_table(table, title=f"{run.name}: accuracy in %"))
        console.print(other_table(table, title=f"{run.name}: gap and over-flagging in %, diversity"))
