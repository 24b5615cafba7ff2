"""GRPO's group of responses in one row against one row per response."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comparisons.model import Shape, examples, llava, lora_parameters, perturb
from comparisons.timing import LR, Row, Side, alternate, measure
from safervlm.judging.classifier import Judge
from safervlm.objectives import GRPO
from safervlm.objectives.grpo import GroupRollout
from safervlm.vlm import packing
from safervlm.vlm.base import Generation, require_responses
from safervlm.vlm.packed import PackedBatch


@contextmanager
def responses_a_row(number: int) -> Iterator[None]:
    """Limits the responses to a prompt that share a packed row.

    Args:
        number: the maximum number; 1 for one row per response.
    """
    before, packing.ROW = packing.ROW, number
    try:
        yield
    finally:
        packing.ROW = before


def benchmark_group(shape: Shape, folder: Path, repeats: int, group: int = 8, tokens: int = 24) -> list[Row]:
    """Compares GRPO's group in one row, which shares image and prompt, with one row per response.

    Both sides encode the image once. Responses have no end token, so that all of them have the same length.

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        group: responses to the question.
        tokens: number of tokens of a response.

    Raises:
        SystemExit: the sides do not compute the same.
    """
    grpo = GRPO(llava(shape, folder), Judge(), group_size=group, response_length=tokens, kl_coef=0.04)
    vlm = grpo.vlm
    vlm.load(grpo.adapters)
    assert vlm.model is not None  # noqa: S101
    trained = lora_parameters(vlm.model)
    perturb(trained)
    vlm.suppressed = torch.tensor(sorted([*vlm.suppressed.tolist(), *vlm.eos_token_ids]))
    made = examples(shape, folder, 1, 0)
    rows = {"one row per response": 1, "one row": group}

    def each(run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        def limited(number: int) -> Callable[[], Any]:
            def side() -> Any:
                with responses_a_row(number):
                    return run()

            return side

        return {name: limited(number) for name, number in rows.items()}

    def generate() -> tuple[PackedBatch, list[Generation]]:
        batch = grpo.collator(made).repeat(group)
        return batch, require_responses(vlm.generate(batch, grpo.sampling, seed=0))

    generating, sampled = alternate(each(generate), repeats)
    batch, answers = sampled["one row"]
    if [answer.token_ids for answer in sampled["one row per response"][1]] != [answer.token_ids for answer in answers]:
        sys.exit("the responses are not equal: the comparison is void")

    def select() -> PackedBatch:
        return batch.select(torch.arange(group), [answer.token_ids for answer in answers])

    with torch.no_grad():
        scoring, scores = alternate(each(lambda: grpo.columns(select())), repeats)
    mine, theirs = scores["one row"], scores["one row per response"]
    if max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in mine) > 1e-5:
        sys.exit("the scores are not equal: the comparison is void")
    generator = torch.Generator().manual_seed(5)
    mask = mine["mask"]
    rollout = GroupRollout(
        batch=batch,
        answers=answers,
        mask=mask,
        logprobs=mine["logprobs"] + torch.randn(mask.shape, generator=generator) * 0.2 * mask,
        advantages=torch.randn(group, 1, generator=generator),
        metrics={},
        reference=mine["reference"],
        rewards=torch.zeros(group),
        signal=torch.ones(group, dtype=torch.bool),
    )

    def backward() -> Tensor:
        loss = grpo.total(grpo.losses(rollout, torch.arange(group))) / group
        loss.backward()
        return loss

    def side(run: Callable[[], Tensor]) -> Side:
        return Side(run, trained, torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0))

    updates = {name: side(run) for name, run in each(backward).items()}
    measure(updates, repeats)
    updating = {name: one.seconds for name, one in updates.items()}
    return [
        Row(f"GRPO, {what} {group} responses in one row : one row per response", *times.values(), target)
        for what, times, target in (
            (f"generating ({tokens} tokens)", generating, 3),
            ("scoring (policy and reference)", scoring, 6),
            ("an update with", updating, 4.5),
        )
    ]
