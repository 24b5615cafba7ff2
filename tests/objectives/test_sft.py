"""Supervised fine-tuning against TRL's trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trl_oracle import LR, STEPS, train_with_trl

from safervlm.objectives import SFT
from safervlm.records import Example
from safervlm.vlm.llava import Llava
from safervlm.vlm.packed import PackedBatch


@pytest.fixture
def sft(llava: Callable[[], Llava], perturb: Callable[[nn.Module], None]) -> SFT:
    sft = SFT(llava(), lr=LR, warmup_steps=0)
    sft.configure_model()
    perturb(sft)
    return sft


def test_three_sft_steps_equal_trl(sft: SFT, targets: list[Example], fit: Callable[..., Any], tmp_path: Path) -> None:
    batch = sft.collator(targets)
    oracle = train_with_trl(sft.vlm, targets, tmp_path)

    # The same tokens, with the same response positions.
    packed = batch.packed
    assert packed is not None
    answers = [row[keep].tolist() for row, keep in zip(packed.target, packed.mask, strict=True)]
    ids = [prompt + answer for prompt, answer in zip(batch.prompt_ids, answers, strict=True)]
    assert oracle.sequences() == ids
    assert oracle.sequences(oracle.batch["labels"] != -100) == answers
    assert len({len(row) for row in ids}) > 2
    assert len({len(row) for row in answers}) > 3

    steps = fit(sft, [batch], epochs=STEPS)
    oracle.assert_equal(steps, sft.vlm)
    assert steps.losses[0] - steps.losses[-1] > 0.01


def test_one_step_lowers_the_loss(sft: SFT, targets: list[Example], fit: Callable[..., Any]) -> None:
    first, second = fit(sft, [sft.collator(targets)], epochs=2).losses
    assert 0 < second < first - 0.01


def test_loss_over_processes_is_the_mean_over_all_tokens(
    sft: SFT, targets: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of two processes' losses is the mean over all their tokens, however these are distributed."""
    whole, *parts = (sft.collator(part) for part in (targets, targets[:1], targets[1:]))
    counts = [part.packed.mask.sum() for part in parts]
    assert counts[1] > 2 * counts[0]
    monkeypatch.setattr(sft, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(sft, "all_gather", lambda value: torch.stack(counts))

    def loss(batch: PackedBatch, processes: int) -> float:
        sft._trainer = type("Processes", (), {"world_size": processes})()
        return sft.training_step(batch, 0).item()

    assert sum(loss(part, 2) for part in parts) / 2 == pytest.approx(loss(whole, 1), abs=1e-6)
    means = [loss(part, 1) for part in parts]
    assert abs(sum(means) / 2 - loss(whole, 1)) > 1e-3  # unlike a mean of means
