"""Measuring a VLM: a predict loop whose step generates."""

from dataclasses import asdict
from typing import Any

import lightning as L

from safervlm.records import Response
from safervlm.vlm.base import VLM, Batch, Collator
from safervlm.vlm.sampling import Sampling


class Measure(L.LightningModule):
    """Asks a VLM the questions of the data and gives its answers.

    Args:
        vlm: the model to measure, with or without an adapter.
        sampling: how answers are drawn; the default is the published measurement's.
        seed: an answer's randomness is drawn from (seed, record id, step): neither the batch, the order nor the number
            of processes changes an answer in float32.
    """

    def __init__(self, vlm: VLM, sampling: Sampling = Sampling(), seed: int = 0) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.vlm, self.sampling, self.seed = vlm, sampling, seed

    @property
    def collator(self) -> Collator:
        """Makes the batches; the CLI hands it to the data."""
        return self.vlm.collator

    def describe(self) -> dict[str, Any]:
        """What decides an answer."""
        return {"vlm": self.vlm.describe(), "sampling": asdict(self.sampling), "seed": self.seed}

    def configure_model(self) -> None:
        """Reads the weights."""
        self.vlm.load()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Response]:
        """One answer a question."""
        generations = self.vlm.generate(batch, self.sampling, self.seed)
        return [
            Response(question, generation.text, generation.finish_reason, len(generation.token_ids))
            for question, generation in zip(batch.questions, generations, strict=True)
        ]
