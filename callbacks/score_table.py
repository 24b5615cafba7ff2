"""Writes and prints the scores of a run once its responses have been classified."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from safervlm.io.tables import say, show_table, write_csv, write_workbook
from safervlm.reports.tables import accuracy_table, other_table
from safervlm.results.measures import UnfinishedAs
from safervlm.results.runs import load_run
from safervlm.results.scores import by_category, scores, unfinished_in
from safervlm.run_folder import RunFolder
from safervlm.vlm.thinking import many_unfinished


class ScoreTable(Callback):
    """Scores the run folder after a prediction: ``scores.csv``, ``scores.xlsx``, and the tables on the terminal.

    The callback reads ``responses.jsonl`` and ``verdicts.jsonl``, so it must come after the callbacks that write them.
    If no question has a response, or no response a verdict, it prints one line and writes nothing. Only the first
    process scores.

    Args:
        thinking_unfinished: How responses count that ended inside their reasoning, without an answer: ``apart``
            excludes them and counts them separately, ``N/A`` and ``wrong`` count them as such.
    """

    def __init__(self, thinking_unfinished: UnfinishedAs = "apart") -> None:
        self.thinking_unfinished = thinking_unfinished

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints the scores.

        Args:
            trainer: The trainer; its ``default_root_dir`` is the run folder.
            pl_module: Not used.

        Raises:
            RecordError: See :func:`safervlm.results.runs.load_run`.
        """
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        files = RunFolder(run)
        for file, what in ((files.responses, "question has a response"), (files.verdicts, "response has a verdict")):
            if file.is_file() and not file.stat().st_size:
                say(f"{run.name}: no {what}, so there is nothing to score")
                return
        frame = load_run(run, self.thinking_unfinished)
        table = scores(frame)
        write_csv(files.scores, table)
        write_workbook(files.workbook, {"by category": by_category(table), "scores": table})
        show_table(accuracy_table(table, title=f"{run.name}: accuracy in %"))
        show_table(other_table(table, title=f"{run.name}: gap and over-flagging in %, diversity"))
        if line := many_unfinished(run.name, unfinished_in(frame), len(frame)):
            say(line)
