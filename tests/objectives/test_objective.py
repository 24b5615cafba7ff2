"""Data that objectives reject before any weight is loaded, and the loss of a custom objective."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image
from torch.utils.data import DataLoader

from safervlm.data.module import Parts, SaferData
from safervlm.data.own import OwnData
from safervlm.errors import ArgumentError, RecordError
from safervlm.finite import NotFiniteError
from safervlm.io.images import ImageSettings
from safervlm.judging.classifier import Judge
from safervlm.objectives import DPO, PPO, SFT
from safervlm.objectives.base import Objective
from safervlm.protocol import LABELS
from safervlm.records import Example, Question
from safervlm.vlm.llava import Llava

JUDGE = Judge(labels=LABELS["alignment"])


class Records(SaferData):
    """Data whose records have a given number of completions."""

    def __init__(self, questions: list[Question], completions: int) -> None:
        super().__init__(collator=list)
        self.examples = [Example(question, ("Yes.",) * completions) for question in questions]

    def load(self) -> Parts:
        return Parts(train=self.examples)


@pytest.mark.parametrize(
    ("objective", "takes", "given"),
    [(SFT, 1, 2), (SFT, 1, 0), (DPO, 2, 1), (DPO, 2, 0), (PPO, 0, 1), (PPO, 0, 2)],
)
def test_the_data_of_another_objective_is_rejected(
    objective: type[Objective],
    takes: int,
    given: int,
    llava: Callable[[], Llava],
    make_questions: Callable[[int], list[Question]],
    tmp_path: Path,
) -> None:
    model = PPO(llava(), JUDGE) if objective is PPO else objective(llava())
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(
        ValueError, match=f"Records provides {given} completions per record, {objective.__name__} needs {takes}"
    ):
        trainer.fit(model, datamodule=Records(make_questions(3), given))
    assert model.vlm.model is None  # no weights were loaded


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("damage", ["missing", "damaged", "folder", "too large"])
@pytest.mark.parametrize("objective", [SFT, DPO, PPO])
def test_an_image_that_cannot_be_trained_on_is_named_before_the_first_step(
    objective: type[Objective],
    damage: str,
    part: str,
    llava: Callable[[], Llava],
    make_questions: Callable[[int], list[Question]],
    tmp_path: Path,
) -> None:
    questions = make_questions(8)
    bad = tmp_path / "bad.png"
    if damage == "folder":
        bad.mkdir()
    elif damage != "missing":
        content = Path(str(questions[0].image_path)).read_bytes()
        bad.write_bytes(content[:60] if damage == "damaged" else content)
    questions[2:4] = [replace(question, image_path=str(bad)) for question in questions[2:4]]
    model = PPO(llava(), JUDGE) if objective is PPO else objective(llava())
    if damage == "too large":
        model.vlm.images = ImageSettings(max_side=39)  # of 40 x 30
    data = Records(questions[:2] if part == "validation" else questions, model.completions)
    held_out = [Example(question, ("Yes.",) * model.completions) for question in questions]
    data.load = lambda: Parts(train=data.examples, validation=held_out if part == "validation" else [])  # type: ignore[method-assign]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(
        RecordError, match=r"^data: \d of 4 images .*bad\.png|^data: \d of 4 images .* is \d+ x"
    ) as error:
        trainer.fit(model, datamodule=data)
    assert "\n" not in str(error.value)
    assert model.vlm.model is None  # no weights were loaded


LABELLED = {"image": "1.png", "prompt": "Is it safe?", "label": "Safe"}


@pytest.mark.parametrize(
    ("objective", "train", "validation", "message"),
    [
        (
            SFT,
            {},
            None,
            "train.jsonl, line 2: the field 'completions' has 0 texts, SFT takes 1 in each record; a label",
        ),
        (
            DPO,
            {},
            None,
            "train.jsonl, line 2: the field 'completions' has 0 texts, DPO takes 2 in each record; a label",
        ),
        (DPO, {"completions": ["Yes."]}, None, "train.jsonl, line 2: the field 'completions' has 1 texts, DPO takes 2"),
        (PPO, {"completions": ["Yes."]}, None, "train.jsonl, line 2: the field 'completions' has 1 texts, PPO takes 0"),
        (SFT, {"completions": ["Yes."]}, {}, "held.jsonl, line 2: the field 'completions' has 0 texts, SFT takes 1"),
    ],
)
def test_file_without_the_required_completions_is_rejected_by_line_and_field(
    objective: type[Objective],
    train: dict[str, object],
    validation: dict[str, object] | None,
    message: str,
    llava: Callable[[], Llava],
    tmp_path: Path,
) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    for name, fields in (("train", train), ("held", validation)):
        (tmp_path / f"{name}.jsonl").write_text(f"\n{json.dumps(LABELLED | (fields or {}))}\n")
    held = None if validation is None else str(tmp_path / "held.jsonl")
    data = OwnData(str(tmp_path / "train.jsonl"), held, collator=list)
    model = PPO(llava(), JUDGE) if objective is PPO else objective(llava())
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(RecordError, match=f"^{re.escape(f'{tmp_path}/{message}')}") as caught:
        trainer.fit(model, datamodule=data)
    assert "\n" not in str(caught.value)
    assert model.vlm.model is None  # no weights were loaded


@pytest.mark.parametrize(
    ("objective", "name", "value", "message"),
    [
        (SFT, "lr", -1.0, "above 0, got -1.0"),
        (SFT, "warmup_steps", -1, "at least 0, got -1"),
        (SFT, "weight_decay", -0.1, "at least 0"),
        (DPO, "beta", 0.0, "above 0"),
        (DPO, "rpo_alpha", -1.0, "at least 0"),
        (PPO, "ppo_epochs", 0, "at least 1"),
        (PPO, "mini_batch_size", 0, "at least 1"),
        (PPO, "micro_batch_size", 0, "at least 1"),
        (PPO, "temperature", 0.0, "above 0"),
        (PPO, "clip", 0.0, "above 0"),
        (PPO, "lr", float("nan"), "above 0, got nan"),
    ],
)
def test_an_argument_that_would_train_nothing_is_rejected(
    objective: type[Objective], name: str, value: float, message: str, llava: Callable[[], Llava]
) -> None:
    needed = {"judge": JUDGE} if objective is PPO else {}
    with pytest.raises(ValueError, match=f"model.{name}: {message}"):
        objective(llava(), **needed, **{name: value})


def test_ppo_rejects_a_judge_with_perception_labels(llava: Callable[[], Llava]) -> None:
    with pytest.raises(
        ValueError, match=r"model\.judge: its labels are A, B, C, D, N/A; name a judge of Safe, Unsafe, N/A"
    ):
        PPO(llava(), Judge(labels=LABELS["perception"]))


class Custom(Objective):
    """A custom objective whose loss function returns a plain scalar, changed by ``change``."""

    def __init__(self, vlm: Llava, change: Callable[[torch.Tensor], object] = lambda loss: loss) -> None:
        super().__init__(vlm, lr=1e-2, warmup_steps=0)
        self.change = change

    def loss(self, batch, part):
        return self.change(-self.vlm.score(batch).logprobs.mean())


class OwnStep(Objective):
    """A custom objective with a training step of its own."""

    def training_step(self, batch, batch_idx):
        return -self.vlm.score(batch).logprobs.mean()


def train_and_validate(module: Objective, examples: list[Example], folder: Path) -> dict[str, float]:
    """Trains one epoch with validation; returns the logged metrics."""
    data = DataLoader([module.collator(examples[:2]), module.collator(examples[2:])], batch_size=None)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("change", [lambda loss: loss, lambda loss: loss[None]], ids=["scalar", "one element"])
def test_a_plain_loss_is_trained_logged_and_validated(
    change: Callable, llava: Callable[[], Llava], targets: list[Example], tmp_path: Path
) -> None:
    module = Custom(llava(), change)
    metrics = train_and_validate(module, targets, tmp_path)
    assert metrics.keys() == {"train/loss", "val/loss"}
    weights = [weight for name, weight in module.named_parameters() if "lora_B" in name]
    assert any(weight.abs().sum() for weight in weights)  # they begin at zero


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda loss: loss * float("nan"), NotFiniteError, "the loss is not finite"),
        (lambda loss: loss.item(), ArgumentError, "the loss of Custom is a float; return a scalar tensor"),
        (lambda loss: None, ArgumentError, "the loss of Custom is a NoneType; return a scalar tensor"),
        (
            lambda loss: torch.stack([loss, loss]),
            ArgumentError,
            r"the loss of Custom is of shape \(2,\); return a scalar",
        ),
        (lambda loss: loss.detach(), ArgumentError, "the loss of Custom has no gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_rejected(
    change: Callable, error: type, message: str, llava: Callable[[], Llava], targets: list[Example], fit: Callable
) -> None:
    module = Custom(llava(), change)
    with pytest.raises(error, match=message):
        fit(module, [module.collator(targets[:2])])


@pytest.mark.parametrize(
    ("objective", "validated"), [(SFT, True), (DPO, True), (Custom, True), (PPO, False), (OwnStep, False)]
)
def test_an_objective_with_a_loss_function_is_validated(objective: type[Objective], validated: bool) -> None:
    assert is_overridden("validation_step", objective, L.LightningModule) == validated
    assert is_overridden("training_step", objective, L.LightningModule)


def test_custom_training_step_is_trained(llava: Callable[[], Llava], targets: list[Example], tmp_path: Path) -> None:
    module = OwnStep(llava(), lr=1e-2, warmup_steps=0)
    assert train_and_validate(module, targets, tmp_path) == {}
    assert any(weight.abs().sum() for name, weight in module.named_parameters() if "lora_B" in name)
