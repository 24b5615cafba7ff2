"""Fixtures of the objectives' tests: a tiny LLaVA with effective adapters, and a record of its training steps."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from by_hand import Run
from torch import Tensor, nn
from torch.utils.data import DataLoader

from safervlm.objectives.base import Objective
from safervlm.protocol import aligned_response, other_label
from safervlm.records import Example, Question
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA
from safervlm.vlm.packed import PackedBatch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For a model this small a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@dataclass
class Steps(L.Callback):
    """Records each optimizer step of a fit."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # before the step
    metrics: dict[str, float] = field(default_factory=dict)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        parameters = trained(pl_module)
        self.gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        self.weights.append({name: p.detach().clone() for name, p in parameters.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if "loss" in outputs:
            self.losses.append(outputs["loss"].item())

    def on_fit_end(self, trainer, pl_module) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture
def llava(tiny_llava: Path) -> Callable[[], Llava]:
    """``llava()``: settings of a tiny LLaVA in float32, with LoRA and without dropout, not loaded yet."""
    return lambda: Llava(
        str(tiny_llava), dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.0), image_fit="crop", system="A chat."
    )


@pytest.fixture
def perturb() -> Callable[[nn.Module], None]:
    """Sets weights that are initialised to zero (LoRA's second factor, the value head) to fixed random values."""

    def perturb(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(3)
        for name, parameter in sorted(trained(module).items()):
            if ".lora_B." in name or "value_head" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05

    return perturb


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Steps]:
    """``fit(objective, batches, epochs=1, ckpt_path=None)``: trains in order and returns the recorded steps."""

    def fit(
        objective: Objective, batches: Iterable[PackedBatch], epochs: int = 1, ckpt_path: Path | None = None
    ) -> Steps:
        steps = Steps()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[steps],
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(objective, DataLoader(list(batches), batch_size=None), ckpt_path=ckpt_path)
        return steps

    return fit


@pytest.fixture
def fit_rollouts(
    fit: Callable[..., Steps], make_questions: Callable[[int], list[Question]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """``fit_rollouts(objective, questions, epochs=1)``: fits one batch of an on-policy objective."""

    def run(objective: Any, questions: int, epochs: int = 1) -> Run:
        rollouts: list[Any] = []
        orders: list[int] = []
        roll, update = objective.rollout, objective.update

        def kept_rollout(*args: Any) -> Any:
            rollouts.append(roll(*args))
            return rollouts[-1]

        def kept_update(rollout: Any, seed: int) -> dict[str, Tensor]:
            orders.append(seed)
            return update(rollout, seed)

        monkeypatch.setattr(objective, "rollout", kept_rollout)
        monkeypatch.setattr(objective, "update", kept_update)
        batch = objective.collator([Example(question) for question in make_questions(questions)])
        return Run(objective, fit(objective, [batch], epochs=epochs), rollouts, orders)

    return run


@pytest.fixture
def pairs(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    """Five questions about three images; chosen and rejected responses, all of different lengths."""
    return [
        Example(
            question,
            (
                aligned_response(question.answer, question.prompt_number, "Saw" + " in a Wood" * (number * number % 5)),
                aligned_response(other_label(question.answer), question.prompt_number, "Saw" + " and Saw" * number),
            ),
        )
        for number, question in enumerate(make_questions(5))
    ]


@pytest.fixture
def targets(pairs: list[Example]) -> list[Example]:
    """The same with only the chosen response."""
    return [Example(example.question, example.completions[:1]) for example in pairs]
