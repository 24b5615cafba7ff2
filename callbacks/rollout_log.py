"""Logs sampled responses of the policy during training."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from safervlm.ranges import in_range
from safervlm.records import read_torn_jsonl, to_line, write_jsonl
from safervlm.run_folder import RunFolder


class RolloutLog(Callback):
    """Appends some responses of every rollout to ``rollouts.jsonl`` in the run folder (text only, no image).

    A run that is resumed from a checkpoint first removes the responses after it; they are written again, identically.

    Args:
        answers: The number of responses per rollout.
    """

    def __init__(self, answers: int = 4) -> None:
        in_range(least=1, answers=answers)
        self.answers = answers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the responses up to the checkpoint, or starts a new file."""
        if not trainer.is_global_zero:
            return
        path, done = self._path(trainer), trainer.fit_loop.epoch_loop.total_batch_idx + 1
        records = read_torn_jsonl(path) if path.is_file() else []
        write_jsonl(path, (record for record in records if record["batch"] <= done))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Appends the first responses of a rollout."""
        if not trainer.is_global_zero:
            return
        number = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        pairs = list(zip(outputs["questions"], outputs["answers"], strict=True))[: self.answers]
        with self._path(trainer).open("a", encoding="utf-8", newline="\n") as file:
            for question, answer in pairs:
                record = {"batch": number, "id": question.id, "answer": question.answer, "response": answer.text}
                record |= {"finish_reason": answer.finish_reason}
                file.write(to_line(record | ({"reasoning": answer.reasoning} if answer.reasoning else {})))

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return RunFolder(trainer.default_root_dir).rollouts
