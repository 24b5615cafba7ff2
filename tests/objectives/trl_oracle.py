"""TRL's trainers on our examples: whole training runs, from text and images to the adapter after the last step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from safervlm.records import Example
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import adapted_layers

LR, STEPS = 1e-3, 3


@dataclass
class Oracle(TrainerCallback):
    """The record of a training run by TRL."""

    batch: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the last step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None}
        )

    def sequences(self, of: Tensor | None = None) -> list[list[int]]:
        """The token ids that TRL's collator made, without padding."""
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"] if of is None else of
        return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]

    def assert_equal(self, steps: Any, vlm: Llava) -> None:
        """Checks that losses and gradients of every step, and the final adapter, equal TRL's.

        Args:
            steps: the record of our fit, see ``conftest.Steps``.
            vlm: the VLM after that fit.
        """
        assert steps.losses == pytest.approx(self.losses, abs=1e-5)
        for ours, theirs in zip(steps.gradients, self.gradients, strict=True):
            assert {name.removeprefix("vlm.model.") for name in ours} == theirs.keys()
            for name, gradient in ours.items():
                expected = theirs[name.removeprefix("vlm.model.")]
                assert expected.abs().max() > 1e-4
                torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=name)
        weights = dict(vlm.model.named_parameters())  # type: ignore[union-attr]
        for name, expected in self.weights.items():
            torch.testing.assert_close(weights[name].data, expected, atol=1e-5, rtol=0, msg=name)


def rows(vlm: Llava, examples: Sequence[Example], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "images": [Image.open(example.question.image_path).convert("RGB")],
            # TRL adds no special tokens, so the texts contain them.
            "prompt": f"<s>{vlm.system} USER: <image>\n{example.question.prompt} ASSISTANT:",
            **{name: f" {text}</s>" for name, text in zip(names, example.completions, strict=True)},
        }
        for example in examples
    ]


def train_with_trl(vlm: Llava, examples: Sequence[Example], folder: Path, **loss: Any) -> Oracle:
    """Trains a copy of ``vlm`` for three steps, each on all examples.

    Args:
        vlm: a loaded VLM, whose adapter's weights are the initial weights of TRL.
        examples: with one completion for SFT, with two for DPO.
        folder: the output folder of TRL.
        loss: further settings of TRL.
    """
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": len(examples),
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
    }
    model: PreTrainedModel = LlavaForConditionalGeneration.from_pretrained(vlm.name, dtype=torch.float32)
    common: dict[str, Any] = {
        "processing_class": AutoProcessor.from_pretrained(vlm.name, backend="pil"),
        "peft_config": vlm.lora.to_peft(adapted_layers(model, vlm.lora)),
    }
    if len(examples[0].completions) == 1:
        data = Dataset.from_list(rows(vlm, examples, ["completion"]))
        trainer = SFTTrainer(model, args=SFTConfig(**shared, **loss), train_dataset=data, **common)
    else:
        data = Dataset.from_list(rows(vlm, examples, ["chosen", "rejected"]))
        trainer = DPOTrainer(model, args=DPOConfig(**shared, **loss), train_dataset=data, **common)
    start = {name: weight for name, weight in vlm.model.named_parameters() if ".lora_" in name}  # type: ignore[union-attr]
    adapter = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapter.keys() == start.keys()
    for name, parameter in adapter.items():
        parameter.data.copy_(start[name].data)
    oracle = Oracle(dict(trainer.data_collator([dict(row) for row in data])))
    trainer.add_callback(oracle)
    trainer.train()
    oracle.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    oracle.weights = {name: p.detach().clone() for name, p in adapter.items()}
    return oracle
