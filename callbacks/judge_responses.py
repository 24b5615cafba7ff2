"""Judges the answers of a measurement as soon as they are complete."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track

from safervlm.data.responses import read_responses
from safervlm.judge import Panel
from safervlm.records import Verdict, read_jsonl, write_jsonl

VERDICTS = "verdicts.jsonl"


class JudgeResponses(Callback):
    """After ``predict``, writes ``verdicts.jsonl`` beside the run folder's ``responses.jsonl``.

    Answers that these judges have read already are not read again; verdicts of other judges, or of answers that are
    no longer there, are replaced. It stands behind the RecordWriter, which writes ``responses.jsonl``.

    Args:
        panel: The judges.
        batch_size: How many answers they read at once.
    """

    def __init__(self, panel: Panel, batch_size: int = 64) -> None:
        self.panel = panel
        self.batch_size = batch_size

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges, on one process."""
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        responses = read_responses(run)
        # A rating needs another model: RateResponses.
        responses = [response for response in responses if response.question.capability != "rated"]
        judges = {response.id: self.panel.reader(response.question.capability) for response in responses}
        verdicts: dict[str, Verdict] = {}
        others = 0
        if (run / VERDICTS).exists():
            for verdict in map(Verdict.from_dict, read_jsonl(run / VERDICTS)):
                if judges.get(verdict.id) == verdict.judge:
                    verdicts[verdict.id] = verdict
                elif verdict.id in judges:
                    others += 1
        if others:
            Console().print(f"{others} verdicts of another judge are replaced")

        left = [response for response in responses if response.id not in verdicts]
        self.panel.to(trainer.strategy.root_device)
        # Each judge sorts what it is given by length, so it is given more than a batch.
        size = 16 * self.batch_size
        for start in track(range(0, len(left), size), "Judging", disable=not left):
            for verdict in self.panel.judge(left[start : start + size], self.batch_size):
                verdicts[verdict.id] = verdict
        write_jsonl(run / VERDICTS, (verdicts[response.id].to_dict() for response in responses))
