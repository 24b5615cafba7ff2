"""DPO and SFT against TRL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from comparisons.model import BOS, EOS, Shape, examples, llava, lora_parameters, perturb
from comparisons.timing import LR, Row, Side, measure, titled
from safervlm.io.images import open_image
from safervlm.objectives import DPO, SFT
from safervlm.objectives.base import Objective
from safervlm.records import Example
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import adapted_layers
from safervlm.vlm.packed import PackedBatch

BETA = 0.1


class Alone:
    """Stand-in for the trainer of an objective: one process."""

    world_size = 1


def our_side(objective: Objective, batch: PackedBatch) -> Side:
    """Returns a training step of SaferVLM; the images are encoded in every step.

    Args:
        objective: the objective, whose model is loaded here.
        batch: a batch from the collator of the objective.
    """
    objective.configure_model()
    objective._trainer = Alone()  # type: ignore[assignment]
    objective.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert objective.vlm.model is not None  # noqa: S101
    trained = lora_parameters(objective.vlm.model)
    perturb(trained)

    def backward() -> Tensor:
        loss: Tensor = objective.training_step(PackedBatch(**vars(batch) | {"features": None}), 0)  # type: ignore[operator]
        loss.backward()
        return loss

    return Side(backward, trained, torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Makes TRL apply its head to the positions of the response only, which it otherwise does on a GPU only."""
    from trl.trainer import utils

    before = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


def trl_side(made: Sequence[Example], vlm: Llava, gradient_checkpointing: bool) -> Side:
    """Returns a training step of TRL on the same examples.

    Args:
        made: examples with one completion (SFTTrainer) or two (DPOTrainer).
        vlm: settings of the model and of LoRA.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    names = ["completion"] if len(made[0].completions) == 1 else ["chosen", "rejected"]
    rows = Dataset.from_list(
        [
            {
                "images": [open_image(str(example.question.image_path), example.question.id)],
                "prompt": f"{BOS} {vlm.system} USER: <image>\n{example.question.prompt} ASSISTANT:",
                **{name: f"{text} {EOS}" for name, text in zip(names, example.completions, strict=True)},
            }
            for example in made
        ]
    )
    settings: dict[str, Any] = {
        "output_dir": vlm.name,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": gradient_checkpointing,
        "max_length": None,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": len(made),
        "learning_rate": LR,
        "weight_decay": 0.0,
    }
    model = LlavaForConditionalGeneration.from_pretrained(vlm.name, dtype=torch.float32, trust_remote_code=False)
    common: dict[str, Any] = {
        "train_dataset": rows,
        "processing_class": AutoProcessor.from_pretrained(vlm.name, backend="pil", trust_remote_code=False),
        "peft_config": vlm.lora.to_peft(adapted_layers(model, vlm.lora)),
    }
    if len(names) == 1:
        trainer = SFTTrainer(model, args=SFTConfig(**settings), **common)
    else:
        trainer = DPOTrainer(model, args=DPOConfig(beta=BETA, **settings), **common)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    if gradient_checkpointing:  # TRL prepares it in its constructor, and the Trainer enables it in train()
        trainer.model.activation_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    perturb(trained)
    batch = dict(trainer.data_collator([dict(row) for row in rows]))
    labels = batch.get("labels")
    tokens = None if labels is None else (labels[:, 1:] != -100).sum()

    def backward() -> Tensor:
        with as_on_a_gpu():
            return trainer.training_step(trainer.model, dict(batch), num_items_in_batch=tokens)

    return Side(backward, trained, trainer.optimizer)


def benchmark_dpo(shape: Shape, folder: Path, repeats: int, questions: int = 1) -> list[Row]:
    """Compares DPO with TRL, with and without cached reference and gradient checkpointing (GC).

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        questions: number of questions about each image.
    """
    made = examples(shape, folder, shape.pairs, completions=2, questions=questions)

    def ours(gradient_checkpointing: bool, kept: bool) -> Side:
        objective = DPO(llava(shape, folder, gradient_checkpointing), beta=BETA)
        side = our_side(objective, objective.collator(made))
        if kept:
            return side
        with_reference = side.backward

        def first_time() -> Tensor:
            objective.reference.clear()
            return with_reference()

        return replace(side, backward=first_time)

    vlm = llava(shape, folder)
    sides = {
        "TRL": trl_side(made, vlm, gradient_checkpointing=False),
        "TRL, GC": trl_side(made, vlm, gradient_checkpointing=True),
        "ours": ours(gradient_checkpointing=False, kept=True),
        "ours, GC": ours(gradient_checkpointing=True, kept=True),
        "ours, first epoch": ours(gradient_checkpointing=False, kept=False),
    }
    measure(sides, repeats)
    times = {name: side.seconds for name, side in sides.items()}
    name = titled("DPO", questions)
    kept, checkpointed, default, first = (2.5, 2.3, None, None) if questions == 1 else (8, None, 10, 6)
    return [
        Row(f"{name}, reference kept (from the second epoch on) : TRL without GC", times["TRL"], times["ours"], kept),
        Row(f"{name}, reference kept, GC : TRL with GC", times["TRL, GC"], times["ours, GC"], checkpointed),
        Row(f"{name}, reference kept : TRL's default (with GC)", times["TRL, GC"], times["ours"], default),
        Row(
            f"{name}, first epoch (reference computed) : TRL without GC",
            times["TRL"],
            times["ours, first epoch"],
            first,
        ),
    ]


def benchmark_sft(shape: Shape, folder: Path, repeats: int, questions: int = 1) -> list[Row]:
    """Compares SFT with TRL at the same settings.

    With one response per prompt and one question per image there is no prefix to share.

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        questions: number of questions about each image.
    """
    made = examples(shape, folder, shape.targets, completions=1, questions=questions)
    vlm = llava(shape, folder)
    sides = {}
    for name, checkpointing in (("", False), (", GC", True)):
        sides[f"TRL{name}"] = trl_side(made, vlm, checkpointing)
        objective = SFT(llava(shape, folder, checkpointing))
        sides[f"ours{name}"] = our_side(objective, objective.collator(made))
    measure(sides, repeats)
    times = {name: side.seconds for name, side in sides.items()}
    name = titled("SFT", questions)
    return [
        Row(f"{name} : TRL without GC", times["TRL"], times["ours"], 1.0 if questions == 1 else 3.3),
        Row(
            f"{name}, GC : TRL with GC (its default)",
            times["TRL, GC"],
            times["ours, GC"],
            1.0 if questions == 1 else None,
        ),
    ]
