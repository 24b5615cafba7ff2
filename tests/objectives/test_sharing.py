"""Questions about one image share rows: loss and gradients equal those of a row per question, with every objective."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safervlm.judging.classifier import Judge
from safervlm.objectives import DPO, PPO, SFT
from safervlm.objectives.base import Objective
from safervlm.records import Example, Question
from safervlm.vlm import packing
from safervlm.vlm.auto import Transformers
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA


class Alone:
    """A trainer of one process."""

    world_size = 1


@pytest.fixture
def asked(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    """Five questions about one image and two about another, of different lengths, each with two responses."""
    first, second = make_questions(3)[::2]
    prompts = [
        (image, f"Is it {'very ' * number}safe?")
        for image, count in ((first, 5), (second, 2))
        for number in range(count)
    ]
    return [
        Example(
            replace(image, id=f"{image.id}/{number}", prompt=prompt),
            ("Yes, it is." + " Yes." * (number % 3), "No." + " No!" * (number % 4)),
        )
        for number, (image, prompt) in enumerate(prompts)
    ]


def any_model(folder: Path) -> Transformers:
    template = "A chat. USER: <image>\n{question} ASSISTANT:"
    return Transformers(str(folder), dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.0), template=template)


def value(objective: Any) -> nn.Linear:
    head = nn.Linear(objective.vlm.hidden_size, 1)
    nn.init.constant_(head.weight, 0.05)
    return head


@pytest.mark.parametrize("model", ["llava", "any"])
@pytest.mark.parametrize("case", ["sft", "dpo", "ppo", "ppo-head"])
def test_loss_and_gradients_equal_those_of_a_row_per_question(
    case: str,
    model: str,
    llava: Callable[[], Llava],
    tiny_llava: Path,
    tiny_judges: Path,
    perturb: Callable[[nn.Module], None],
    asked: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = llava() if model == "llava" else any_model(tiny_llava)
    objective: Objective
    if case in ("sft", "dpo"):
        objective = SFT(vlm) if case == "sft" else DPO(vlm, rpo_alpha=0.5)
        objective.configure_model()
    else:
        objective = PPO(vlm, Judge(), value_on="adapter" if case == "ppo" else "policy")
        vlm.load(objective.adapters)
        objective.value_head = value(objective)
    perturb(objective)
    objective._trainer = Alone()  # type: ignore[assignment]
    objective.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    examples = asked if case == "dpo" else [replace(example, completions=example.completions[:1]) for example in asked]

    def computed() -> tuple[Tensor, Tensor]:
        batch = objective.collator(examples)
        if isinstance(objective, PPO):
            scores, values = objective.score(batch, entropy=True)
            assert scores.entropy is not None
            ramp = torch.linspace(-1, 1, len(examples))[:, None]
            loss = ((scores.logprobs * ramp - 0.1 * scores.entropy + (values - ramp) ** 2) * scores.mask).mean()
        else:
            loss = objective.loss(batch, "train")
        parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        return loss.detach(), torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    loss, gradient = computed()
    if model == "any":
        assert vlm.scoring.works  # type: ignore[union-attr]
    if isinstance(objective, DPO):
        objective.reference.clear()
    monkeypatch.setattr(packing, "ROW", 1)
    if model == "any":
        monkeypatch.setattr(vlm.scoring, "works", False)  # type: ignore[union-attr]
    expected_loss, expected = computed()
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    assert expected.norm() > 1e-4
