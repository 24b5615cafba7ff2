"""What the policy said while PPO trained it."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from safervlm.records import to_line


class RolloutLog(Callback):
    """Appends some answers of every rollout to ``rollouts.jsonl`` in the run folder (text alone, no image).

    Args:
        answers: how many of each rollout.
    """

    def __init__(self, answers: int = 4) -> None:
        self.answers = answers

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Appends the first answers of a rollout."""
        if not trainer.is_global_zero:
            return
        number = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        pairs = list(zip(outputs["questions"], outputs["answers"], strict=True))[: self.answers]
        with (Path(trainer.default_root_dir) / "rollouts.jsonl").open("a", encoding="utf-8") as file:
            for question, answer in pairs:
                record = {"batch": number, "id": question.id, "answer": question.answer, "response": answer.text}
                file.write(to_line(record | {"finish_reason": answer.finish_reason}))
