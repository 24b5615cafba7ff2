"""Classifies the responses of a measurement as soon as they are complete."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from safervlm.data.responses import read_responses
from safervlm.errors import RecordError, first_line
from safervlm.io.tables import say
from safervlm.judging.panel import Panel
from safervlm.ranges import in_range
from safervlm.records import Failure, Verdict, read_jsonl, write_jsonl
from safervlm.run_folder import RunFolder


class JudgeResponses(Callback):
    """After ``predict``, writes ``verdicts.jsonl`` next to the run folder's ``responses.jsonl``.

    A verdict is identified by a question's id, a judge and the text of the response. Responses that these judges have
    classified already are not classified again. Verdicts of other judges, on other texts, or on responses that no
    longer exist, are removed. A response whose classification raises an exception is listed in
    ``verdicts-failed.jsonl`` with the reason, and the same command classifies it again. While the judges classify,
    each batch of verdicts is appended to ``verdicts-unfinished.jsonl``, so a process that dies loses at most the
    current one; the same command reads them and writes the same ``verdicts.jsonl`` as an uninterrupted run. The
    callback must come after the RecordWriter, which writes ``responses.jsonl``.

    Args:
        panel: The judges.
        batch_size: The number of responses that are classified at once.
    """

    def __init__(self, panel: Panel, batch_size: int = 64) -> None:
        in_range("JudgeResponses", least=1, batch_size=batch_size)
        self.panel = panel
        self.batch_size = batch_size

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Classifies the responses, on the first process.

        Raises:
            RecordError: ``responses.jsonl`` or ``verdicts.jsonl`` is damaged.
        """
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        files = RunFolder(run)
        responses = read_responses(run, may_be_empty=True)
        # Responses to be rated need another model: see RateResponses.
        responses = [response for response in responses if response.question.capability != "rated"]
        judges = {response.id: self.panel.judge_id(response.question.capability) for response in responses}
        texts = {response.id: response.response for response in responses}
        verdicts: dict[str, Verdict] = {}
        others = stale = 0
        if files.verdicts.exists():
            for number, record in enumerate(read_jsonl(files.verdicts), 1):
                try:
                    verdict = Verdict.from_dict(record)
                except (KeyError, TypeError, ValueError) as error:  # including RecordError
                    raise RecordError(f"{files.verdicts}, verdict {number}: {first_line(error)}") from error
                if verdict.id not in judges:
                    continue
                if judges[verdict.id] != verdict.judge:
                    others += 1
                elif not verdict.is_of(texts[verdict.id]):
                    stale += 1
                else:
                    verdicts[verdict.id] = verdict
        if others:
            say(f"{others} verdicts of another judge are replaced")
        if stale:
            say(f"{stale} verdicts of other responses (or of version 0.1) are judged again")

        left = [(each.question, each.response) for each in responses if each.id not in verdicts]
        self.panel.to(trainer.strategy.root_device)
        records = self.panel.judged_in_batches(left, RunFolder(run).unfinished_verdicts, self.batch_size)
        failed = [record for record in records if isinstance(record, Failure)]
        verdicts |= {record.id: record for record in records if isinstance(record, Verdict)}
        there = (verdicts[response.id] for response in responses if response.id in verdicts)
        write_jsonl(files.verdicts, (verdict.to_dict() for verdict in there))
        if failed:
            write_jsonl(files.unjudged, (failure.to_dict() for failure in failed))
        else:
            files.unjudged.unlink(missing_ok=True)
        RunFolder(run).unfinished_verdicts.unlink(missing_ok=True)
