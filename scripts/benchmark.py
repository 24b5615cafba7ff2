"""Compares the CPU time of a training step with alternative implementations that compute the same loss.

    python scripts/benchmark.py                      # everything
    python scripts/benchmark.py dpo sft --repeats 3

The model is a random LLaVA in the proportions of LLaVA-1.5-7B: 576 image tokens, a prompt of about 605 tokens,
responses of about 30 tokens, and a language model head with 2 % of the work. The script measures the CPU time of its
process, so that other processes matter little; only ratios are meaningful. Every repetition runs all sides one after
the other (A B A B ...), and ratios are taken within a repetition. The sides have to agree: on the gradients before the
first measurement, and on the loss in every repetition. The collation of batches from text and images is not measured.

TRL is measured at its best: on a GPU its head scores only the positions of the response, on a CPU all positions. Here
it is configured to do on the CPU what it does on a GPU.
"""

import argparse
import gc
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.io.images import open_image
from safervlm.judging.classifier import Judge
from safervlm.objectives import DPO, GRPO, PPO, SFT
from safervlm.objectives.base import Objective
from safervlm.objectives.grpo import GroupRollout
from safervlm.objectives.ppo import ValuedRollout
from safervlm.records import Example, Question
from safervlm.statistics.diversity import self_bleu
from safervlm.vlm import rows as packed_rows
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import Generation, must_be_answered
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA, active, adapted_layers
from safervlm.vlm.packed import PackedBatch
from safervlm.vlm.sampling import Sampler, Sampling, Suppress

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
LR = 1e-6
BETA = 0.1
SUPPRESSED = torch.tensor([0, 1])  # tokens that a response must not contain, where sampling is compared


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its inputs; the defaults have the proportions of LLaVA-1.5-7B.

    Attributes:
        hidden: width of the language model; layers, heads, intermediate and vocabulary also belong to it.
        vision_hidden: width of the vision tower; vision_layers and vision_heads also belong to it.
        image_size: side of an image in pixels; it becomes ``(image_size / patch_size) ** 2`` image tokens.
        patch_size: side of a patch in pixels.
        rank: rank of LoRA.
        question: minimum and maximum number of tokens of a question.
        answer: minimum and maximum number of tokens of a response.
        pairs: examples of a DPO step.
        targets: examples of an SFT step.
        rollouts: responses of a PPO step.
        response_length: the length to which the three-pass structure pads responses.
    """

    hidden: int = 512
    layers: int = 6
    heads: int = 8
    intermediate: int = 1376
    vocabulary: int = 768
    vision_hidden: int = 128
    vision_layers: int = 3
    vision_heads: int = 2
    image_size: int = 336
    patch_size: int = 14
    rank: int = 16
    question: tuple[int, int] = (20, 24)
    answer: tuple[int, int] = (24, 36)
    pairs: int = 4
    targets: int = 8
    rollouts: int = 4
    response_length: int = 512


# Attention and the vision tower have larger shares of the work than in the default shape.
SMALL = Shape(
    hidden=256, layers=2, heads=4, intermediate=688, vocabulary=128, vision_hidden=32, vision_layers=2, vision_heads=1
)


@dataclass
class Side:
    """One implementation of a training step.

    Attributes:
        backward: computes the loss and back-propagates it.
        trained: the adapter's parameters, which all sides have, by their names in the PEFT model.
        optimizer: optimizer of all parameters that this side trains.
        seconds: CPU time of each measured step.
    """

    backward: Callable[[], Tensor]
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)

    def step(self) -> float:
        """Makes one optimizer step and returns the loss."""
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def parameters(self) -> list[Tensor]:
        """Returns all parameters of the optimizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def gradients(self) -> tuple[float, Tensor]:
        """Returns the loss and the adapter's gradient as one vector, without a step."""
        loss = self.backward()
        gradient = torch.cat([self.trained[name].grad.flatten() for name in sorted(self.trained)])  # type: ignore[union-attr]
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), gradient


@dataclass(frozen=True)
class Row:
    """A row of the table: the ratio of their time to ours.

    Attributes:
        measure: the title of the comparison.
        theirs: seconds of each repetition of the other implementation.
        ours: seconds of each repetition of SaferVLM.
        target: the target of the median ratio; None for a row without a target.
    """

    measure: str
    theirs: Sequence[float]
    ours: Sequence[float]
    target: float | None = None

    def ratios(self) -> list[float]:
        """Returns the ratio of each repetition."""
        return [a / b for a, b in zip(self.theirs, self.ours, strict=True)]

    def __str__(self) -> str:
        ratios = self.ratios()
        median = statistics.median(ratios)
        target = "" if self.target is None else f"{self.target:g}" + ("" if median >= self.target else " (missed)")
        shown = " | ".join(
            f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}" for ratio in (median, min(ratios), max(ratios))
        )
        times = f"{statistics.median(self.theirs):.3g} | {statistics.median(self.ours):.3g}"
        return f"| {self.measure} | {shown} | {target} | {times} |"


def say(text: str) -> None:
    """Prints progress to stderr; the table goes to stdout.

    Args:
        text: one line.
    """
    print(text, file=sys.stderr, flush=True)


def measure(sides: dict[str, Side], repeats: int) -> None:
    """Runs all sides in turn, ``repeats`` times, after one round that is not measured.

    Args:
        sides: the implementations by name; the first one is the reference of the comparison.
        repeats: number of measured repetitions.

    Raises:
        SystemExit: the sides do not compute the same gradients or losses.
    """
    first, *others = sides
    loss, gradient = sides[first].gradients()
    for name in others:
        other_loss, other = sides[name].gradients()
        error = float((other - gradient).norm() / gradient.norm())
        say(f"  {name}: loss {other_loss:.6f} ({first}: {loss:.6f}), gradient differs by {error:.1e}")
        if abs(other_loss - loss) > 1e-5 or not error < 1e-4:
            sys.exit(f"{name} and {first} don't compute the same: the comparison is void")
    start_weights = {name: [p.detach().clone() for p in side.parameters()] for name, side in sides.items()}
    for repeat in range(repeats + 1):
        losses = {}
        gc.collect()
        for name, side in sides.items():
            # Each step starts from the same weights: a value head on the policy and a value adapter would diverge.
            for parameter, weight in zip(side.parameters(), start_weights[name], strict=True):
                parameter.data.copy_(weight)
            start = time.process_time()
            losses[name] = side.step()
            if repeat:
                side.seconds.append(time.process_time() - start)
        if not max(losses.values()) - min(losses.values()) < 1e-5:
            sys.exit(f"the losses are not equal: {losses}: the comparison is void")
        if repeat:
            say(f"  {repeat}/{repeats}: " + ", ".join(f"{name} {s.seconds[-1]:.2f} s" for name, s in sides.items()))


def alternate(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Runs all sides in turn, ``repeats`` times, after one round that is not measured.

    Args:
        sides: what to run, by name.
        repeats: number of measured repetitions.

    Returns:
        By name, the CPU seconds of each repetition and the last result.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            start = time.process_time()
            results[name] = side()
            if repeat:
                seconds[name].append(time.process_time() - start)
        if repeat:
            say(f"  {repeat}/{repeats}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()))
    return seconds, results


# --- the model and the examples ---------------------------------------------------------------------------------------


def write_model(shape: Shape, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Writes a random LLaVA with a word-level tokenizer, in the format of ``save_pretrained``.

    Args:
        shape: the sizes of the model.
        folder: the folder to write.
        dtype: the type of the weights.
        device: the device on which the weights are created.
    """
    special = [PAD, BOS, EOS, UNK, "USER:", "ASSISTANT:"]
    words = special + [f"w{number}" for number in range(shape.vocabulary - len(special) - 1)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=4 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=4096,
        ),
        image_token_id=fast.convert_tokens_to_ids("<image>"),
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    with torch.no_grad():  # the outputs of a freshly initialised model hardly depend on its input
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("language_model" in name or "lm_head" in name):
                parameter.mul_(2)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": shape.image_size},
            crop_size={"height": shape.image_size, "width": shape.image_size},
        ),
        tokenizer=fast,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def examples(shape: Shape, folder: Path, count: int, completions: int, questions: int = 1) -> list[Example]:
    """Creates questions with random responses of different lengths.

    Args:
        shape: the lengths of questions and responses.
        folder: the folder for the images.
        count: number of questions.
        completions: number of responses per question.
        questions: number of questions about each image.
    """
    rng = random.Random(1)

    def words(lengths: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(shape.vocabulary - 7)}" for _ in range(rng.randint(*lengths)))

    made = []
    for number in range(count):
        path = folder / f"{number // questions}.png"
        pixels = np.random.default_rng(number // questions).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((448, 336)).save(path)
        question = Question(
            id=f"Benchmark/{path.name}/alignment/{number % questions}",
            dataset="Benchmark",
            image=path.name,
            image_path=str(path),
            capability="alignment",
            prompt_number=number % questions,
            prompt=words(shape.question),
            category="",
            concept="",
            answer="Safe",
        )
        made.append(Example(question, tuple(words(shape.answer) for _ in range(completions))))
    return made


def llava(shape: Shape, folder: Path, gradient_checkpointing: bool = False) -> Llava:
    """Returns the model as a VLM of SaferVLM, not loaded yet.

    Args:
        shape: see :func:`write_model`.
        folder: the folder of the model.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
    """
    return Llava(
        str(folder),
        dtype="float32",
        lora=LoRA(r=shape.rank, alpha=2 * shape.rank, dropout=0.0),
        gradient_checkpointing=gradient_checkpointing,
        image_fit="crop",
        system="w1 w2",
    )


def lora_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Returns the parameters of an adapter by their names.

    Args:
        model: the PEFT model.
        adapter: the name of the adapter in PEFT.
    """
    return {name: parameter for name, parameter in model.named_parameters() if f".{adapter}." in name}


def perturb(parameters: dict[str, nn.Parameter]) -> None:
    """Sets an adapter to fixed random weights, the same for every side.

    The second factor of LoRA is initialised to zero; there the loss of DPO is ln 2 whatever a side computes.

    Args:
        parameters: see :func:`lora_parameters`.
    """
    generator = torch.Generator().manual_seed(3)
    for name in sorted(parameters):
        scale = 0.02 if ".lora_B." in name else 0.05
        parameters[name].data.copy_(torch.randn(parameters[name].shape, generator=generator) * scale)


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


# --- TRL --------------------------------------------------------------------------------------------------------------


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
        Row(f"{name}, reference kept : TRL as it comes (with GC)", times["TRL, GC"], times["ours"], default),
        Row(
            f"{name}, first epoch (reference computed) : TRL without GC",
            times["TRL"],
            times["ours, first epoch"],
            first,
        ),
    ]


def titled(objective: str, questions: int) -> str:
    """Returns the name of an objective in the table.

    Args:
        objective: its name.
        questions: number of questions about each image.
    """
    return objective if questions == 1 else f"{objective}, {questions} questions per image"


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
            f"{name}, GC : TRL with GC (as it comes)",
            times["TRL, GC"],
            times["ours, GC"],
            1.0 if questions == 1 else None,
        ),
    ]


# --- PPO against three passes -----------------------------------------------------------------------------------------


def our_ppo(
    shape: Shape, folder: Path, value_on: Any, rollout: ValuedRollout | None = None, questions: int = 1
) -> tuple[PPO, Side, ValuedRollout]:
    """Returns an inner PPO step of SaferVLM.

    All variants start from the same adapter weights, also those of the value adapter, so that all losses agree.

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        value_on: see :class:`safervlm.objectives.PPO`.
        rollout: the rollout of another variant; None to make one.
        questions: number of questions about each image.

    Returns:
        The objective, the step and the rollout.
    """
    ppo = PPO(llava(shape, folder), Judge(), value_on=value_on, response_length=shape.response_length)
    ppo.vlm.load(ppo.adapters)
    assert ppo.vlm.model is not None  # noqa: S101
    trained, value = lora_parameters(ppo.vlm.model), lora_parameters(ppo.vlm.model, "value")
    perturb(trained)
    for name, parameter in value.items():
        parameter.data.copy_(trained[name.replace(".value.", ".default.")])
    ppo.value_head = nn.Linear(shape.hidden, 1)
    nn.init.constant_(ppo.value_head.weight, 0.01)
    nn.init.zeros_(ppo.value_head.bias)
    made = rollout or make_rollout(ppo, examples(shape, folder, shape.rollouts, 1, questions))
    rows = torch.arange(shape.rollouts)

    def backward() -> Tensor:
        loss = ppo.total(ppo.losses(made, rows)) / made.mask.sum()
        loss.backward()
        return loss

    parameters = [*trained.values(), *value.values(), *ppo.value_head.parameters()]
    return ppo, Side(backward, trained, torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)), made


def make_rollout(ppo: PPO, made: Sequence[Example]) -> ValuedRollout:
    """Returns a rollout of given responses by a slightly different policy, with encoded images.

    Args:
        ppo: the objective, loaded.
        made: examples with one completion, the response.
    """
    batch = ppo.collator(made)
    packed = batch.packed
    assert packed is not None  # noqa: S101
    answers = [Generation(row[keep].tolist(), "", "stop") for row, keep in zip(packed.target, packed.mask, strict=True)]
    generator = torch.Generator().manual_seed(5)

    def noise(scale: float) -> Tensor:
        return torch.randn(packed.mask.shape, generator=generator) * scale * packed.mask

    with torch.no_grad():
        scores, values = ppo.score(batch)
    rollout = (scores.logprobs + noise(0.2), values + noise(0.2), noise(1.0), values + noise(1.0))
    logprobs, values, advantages, returns = rollout
    return ValuedRollout(batch, answers, packed.mask, logprobs, advantages, {}, values, returns)


def three_passes(shape: Shape, ppo: PPO, rollout: ValuedRollout, reference: bool = True) -> Side:
    """Returns a PPO step with the structure of the published implementation: three independent forward passes.

    Policy, value function and reference each process images, prompts and responses. Responses are padded to
    ``response_length``, the images are encoded in every pass, and the reference (without gradient) is evaluated in
    every step. As in SaferVLM, the head runs on the positions of the response only.

    Args:
        shape: see :class:`Shape`.
        ppo: the objective, loaded, with a value adapter.
        rollout: see :func:`make_rollout`.
        reference: whether to evaluate the reference; its output does not enter the loss.
    """
    batch, length = rollout.batch, shape.response_length
    base = ppo.vlm.base
    prompt = max(map(len, batch.prompt_ids))
    ids = torch.zeros(len(batch), prompt + length, dtype=torch.long)
    attention = torch.zeros_like(ids)
    mask = torch.zeros(len(batch), length, dtype=torch.bool)
    target = torch.zeros(len(batch), length, dtype=torch.long)
    for row, (question, answer) in enumerate(zip(batch.prompt_ids, rollout.answers, strict=True)):
        tokens = torch.tensor(question + answer.token_ids)
        start = prompt - len(question)
        ids[row, start : start + len(tokens)] = tokens
        attention[row, start : start + len(tokens)] = 1
        mask[row, : len(answer.token_ids)] = True
        target[row, : len(answer.token_ids)] = torch.tensor(answer.token_ids)
    wide = [
        nn.functional.pad(part, (0, length - part.shape[1]))
        for part in (rollout.logprobs, rollout.advantages, rollout.values, rollout.returns)
    ]
    old_logprobs, advantages, old_values, returns = wide
    images = batch.pixel_values[batch.image_rows]  # each row has an image of its own
    inputs = {"input_ids": ids, "attention_mask": attention, "pixel_values": images, "use_cache": False}
    suppressed = ppo.vlm.suppressed

    def distribution() -> Tensor:
        logits = base(**inputs, logits_to_keep=length + 1).logits[:, :-1].float()
        return logits.index_fill(-1, suppressed, torch.finfo(torch.float32).min).log_softmax(-1)

    def backward() -> Tensor:
        if reference:
            with torch.no_grad(), active(base, "reference"):
                distribution().gather(-1, target[..., None])
        with active(base, "policy"):
            everything = distribution()
        with active(base, "value"):
            states = base.model(**inputs).last_hidden_state[:, -length - 1 : -1]
        values = ppo.value_head(states)[..., 0]  # type: ignore[misc]
        ratio = (everything.gather(-1, target[..., None])[..., 0] - old_logprobs).exp()
        policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - ppo.clip, 1 + ppo.clip))
        near = old_values + (values - old_values).clamp(-ppo.value_clip, ppo.value_clip)
        value = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        entropy = -(everything.exp() * everything).sum(-1)
        parts = {"policy_loss": policy, "value_loss": value, "entropy": entropy}
        loss = ppo.total({name: (part * mask).sum() for name, part in parts.items()}) / mask.sum()
        loss.backward()
        return loss

    model = ppo.vlm.model
    assert model is not None  # noqa: S101
    parameters = [p for p in (*model.parameters(), *ppo.value_head.parameters()) if p.requires_grad]  # type: ignore[union-attr]
    return Side(backward, lora_parameters(model), torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0))


def benchmark_ppo(shape: Shape, folder: Path, repeats: int, questions: int = 1) -> list[Row]:
    """Compares the inner step of PPO (forward, backward, optimizer) with three passes over padded responses.

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        questions: number of questions about each image.
    """
    _, on_adapter, rollout = our_ppo(shape, folder, "adapter", questions=questions)
    _, on_policy, _ = our_ppo(shape, folder, "policy", rollout)
    published, _, _ = our_ppo(shape, folder, "adapter", rollout)
    without, _, _ = our_ppo(shape, folder, "adapter", rollout)
    sides = {
        "three passes": three_passes(shape, published, rollout),
        "two passes": three_passes(shape, without, rollout, reference=False),
        "value adapter": on_adapter,
        "value head on the policy": on_policy,
    }
    measure(sides, repeats)
    times = {name: side.seconds for name, side in sides.items()}
    published_times = times["three passes"]
    name = titled("PPO", questions)
    adapter, policy = (2.5, 5.0) if questions == 1 else (8.5, 17.5)
    padded = f"three passes padded to {shape.response_length}"
    return [
        Row(f"{name}, value adapter : {padded}", published_times, times["value adapter"], adapter),
        Row(f"{name}, value head on the policy : {padded}", published_times, times["value head on the policy"], policy),
        Row(
            f"{name}, value adapter : the same without the reference's pass",
            times["two passes"],
            times["value adapter"],
        ),
    ]


def benchmark_shared(shape: Shape, folder: Path, repeats: int, questions: int = 5) -> list[Row]:
    """Compares DPO, SFT and PPO with the alternatives where all questions of a step are about one image.

    Args:
        shape: see :class:`Shape`; a step has ``questions`` examples.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        questions: number of questions about the image.
    """
    shape = replace(shape, pairs=questions, targets=questions, rollouts=questions)
    comparisons = (benchmark_dpo, benchmark_sft, benchmark_ppo)
    return [row for compare in comparisons for row in compare(shape, folder, repeats, questions)]


# --- groups of responses ----------------------------------------------------------------------------------------------


@contextmanager
def responses_a_row(number: int) -> Iterator[None]:
    """Limits the responses to a prompt that share a packed row.

    Args:
        number: the maximum number; 1 for one row per response.
    """
    before, packed_rows.ROW = packed_rows.ROW, number
    try:
        yield
    finally:
        packed_rows.ROW = before


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
        return batch, must_be_answered(vlm.generate(batch, grpo.sampling, seed=0))

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


# --- measuring --------------------------------------------------------------------------------------------------------


def benchmark_measure(shape: Shape, folder: Path, repeats: int, images: int = 4, tokens: int = 20) -> list[Row]:
    """Compares greedy generation in one batch with ``generate`` of transformers, one question at a time.

    There are five questions about each image. The batch is generated by :class:`safervlm.vlm.llava.Llava` and by
    :class:`safervlm.vlm.auto.Transformers`. Prompts are encoded beforehand, and all sides suppress the end token.

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        images: number of images.
        tokens: number of new tokens per response.

    Raises:
        SystemExit: the sides generate different responses.
    """
    vlm = llava(shape, folder)
    other = Transformers(str(folder), dtype="float32", template="w1 w2 USER: <image> {question} ASSISTANT:")
    vlm.load()
    other.load()
    made = examples(shape, folder, 5 * images, 0, questions=5)
    never = [*vlm.suppressed.tolist(), *vlm.eos_token_ids]
    vlm.suppressed = other.suppressed = torch.tensor(sorted(never))
    singles = [vlm.collator([example]) for example in made]
    sampling = Sampling(temperature=0, max_new_tokens=tokens)

    def one_by_one() -> list[list[int]]:
        answers = []
        for single in singles:
            ids = torch.tensor(single.prompt_ids)
            generated = vlm.base.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=single.pixel_values,
                max_new_tokens=tokens,
                do_sample=False,
                suppress_tokens=never,
            )
            answers.append(generated[0, ids.shape[1] :].tolist())
        return answers

    def together() -> list[list[int]]:
        batch = vlm.collator(made)  # collated again, because a batch caches its encoded images
        return [generation.token_ids for generation in vlm.generate(batch, sampling, seed=0)]

    encoded = other.collator(made)

    def together_as_any() -> list[list[int]]:
        return [generation.token_ids for generation in other.generate(encoded, sampling, seed=0)]

    sides = {"one by one": one_by_one, "together": together, "as any model": together_as_any}
    seconds, answers = alternate(sides, repeats)
    if any(each != answers["one by one"] for each in answers.values()):
        sys.exit("the answers are not equal: the comparison is void")
    name = f"{images} images of 5 questions, {tokens} tokens each"
    theirs = seconds["one by one"]
    return [
        Row(f"{name} : transformers' generate, one by one", theirs, seconds["together"], 3),
        Row(f"{name}, as any model of transformers : the same", theirs, seconds["as any model"], 3),
    ]


# --- sampling ---------------------------------------------------------------------------------------------------------


def zipf_logits(rows: int, vocabulary: int, exponent: float) -> Tensor:
    """Returns (rows, vocabulary) logits by Zipf's law, each row in an order of its own.

    Args:
        rows: number of rows.
        vocabulary: number of tokens.
        exponent: the exponent of a token's rank. With 1.5, about 60 tokens survive top_p .9; with 1.15, about 8,000.
    """
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)])
    return -exponent * (1.0 + ranks).log()


def chain_with_sort(top_p: float, generators: Sequence[torch.Generator]) -> Callable[[Tensor], Tensor]:
    """Returns the former way to choose tokens: a full sort, and a generator per row.

    Args:
        top_p: see :class:`Sampling`.
        generators: the generator of each row.
    """
    warpers = (TemperatureLogitsWarper(1.0), TopPLogitsWarper(top_p))

    def choose(logits: Tensor) -> Tensor:
        bad = ~torch.isfinite(logits.amax(-1))
        scores = Suppress(SUPPRESSED)(None, logits.masked_fill(bad[:, None], 0))
        for warper in warpers:
            scores = warper(None, scores)
        size = scores.shape[-1]
        uniform = torch.stack([torch.rand(size, generator=each, dtype=torch.float64) for each in generators])
        return (scores - torch.log(-torch.log(uniform)).float()).argmax(-1)

    return choose


def benchmark_sampling(repeats: int, rows: int = 64, vocabulary: int = 152_064) -> list[Row]:
    """Compares :class:`safervlm.vlm.sampling.Sampler` with the former chain of logits processors.

    Args:
        repeats: number of measured repetitions.
        rows: number of rows of a batch.
        vocabulary: number of tokens.

    Raises:
        SystemExit: a chosen token doesn't survive top_p.
    """
    table = []
    for title, exponent, top_p, target in (
        ("top_p .9", 1.5, 0.9, 4.0),
        ("top_p .9, flat distributions", 1.15, 0.9, None),
        ("top_p 1", 1.5, 1.0, 1.8),
    ):
        logits = zipf_logits(rows, vocabulary, exponent)
        scores = Suppress(SUPPRESSED)(None, logits)
        kept = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        sides = {
            "theirs": chain_with_sort(top_p, [torch.Generator().manual_seed(row) for row in range(rows)]),
            "ours": Sampler(Sampling(top_p=top_p), SUPPRESSED, list(range(rows)), logits.device).choose,
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for name, choose in sides.items():
                start = time.process_time()
                tokens = choose(logits)
                if repeat:
                    seconds[name].append(time.process_time() - start)
                if not kept.gather(1, tokens[:, None]).isfinite().all():
                    sys.exit(f"{title}: a token doesn't survive: the comparison is void")
        say(f"  {title}: {int(kept.isfinite().sum(-1).float().mean())} tokens survive")
        name = f"a token of {rows} rows of {vocabulary:,}, {title} : a full sort, a generator per row"
        table.append(Row(name, seconds["theirs"], seconds["ours"], target))
    return table


# --- self-BLEU --------------------------------------------------------------------------------------------------------


def benchmark_bleu(repeats: int, count: int = 1000, sample: int = 40) -> list[Row]:
    """Compares self-BLEU with NLTK.

    The time of NLTK is measured for a sample of the texts and scaled, since its time per text is constant.

    Args:
        repeats: number of measured repetitions.
        count: number of texts.
        sample: number of texts for which NLTK is measured.

    Raises:
        SystemExit: the two values differ.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1

    def nltk(texts: Sequence[str], of: Sequence[int]) -> float:
        tokens = [text.split() for text in texts]
        return statistics.mean(
            sentence_bleu(tokens[:i] + tokens[i + 1 :], tokens[i], smoothing_function=smoothing) for i in of
        )

    rng = random.Random(0)
    stems = [[f"w{int(rng.paretovariate(0.6)) % 1500}" for _ in range(35)] for _ in range(60)]

    def answer() -> str:
        words = rng.choice(stems)[: rng.randint(15, 35)]
        return " ".join(word if rng.random() < 0.6 else f"w{int(rng.paretovariate(0.6)) % 1500}" for word in words)

    texts = [answer() for _ in range(count)]
    few = texts[:60]
    difference = abs(nltk(few, range(len(few))) - self_bleu(few))
    say(f"  self-BLEU of {len(few)} answers differs from NLTK's by {difference:.1e}")
    if not difference < 1e-9:
        sys.exit("self-BLEU is not NLTK's: the comparison is void")
    self_bleu(texts)
    theirs, ours = [], []
    for repeat in range(repeats):
        start = time.process_time()
        nltk(texts, rng.sample(range(count), sample))
        middle = time.process_time()
        for _ in range(5):
            self_bleu(texts)
        end = time.process_time()
        theirs.append((middle - start) * count / sample)
        ours.append((end - middle) / 5)
        say(f"  {repeat + 1}/{repeats}: NLTK {theirs[-1]:.1f} s (scaled), ours {ours[-1] * 1000:.1f} ms")
    return [Row(f"self-BLEU of {count:,} answers : NLTK (scaled from {sample} of them)", theirs, ours, 500)]


# --- the command ------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Describes the machine and the versions of the libraries."""
    import trl

    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    return (
        f"{date.today()}, {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}, float32"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the selected comparisons and prints a table in Markdown.

    Args:
        arguments: the command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("dpo", "sft", "ppo", "shared", "group", "measure", "sampling", "bleu")
    parser.add_argument("which", nargs="*", help=f"what to measure: {', '.join(names)} (default: everything)")
    parser.add_argument("--repeats", type=int, default=5, help="measured repetitions (default: 5)")
    parser.add_argument("--small", action="store_true", help="a smaller model, for a busy machine")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    options = parser.parse_args(arguments)
    wrong = set(options.which) - set(names)
    if wrong:
        parser.error(f"which: {min(wrong)!r} is none of {', '.join(names)}")
    warnings.filterwarnings("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape = SMALL if options.small else Shape()
    rows: list[Row] = []
    for name in options.which or names:
        say(f"{name}: {options.repeats} repetitions")
        if name in ("sampling", "bleu"):
            rows += {"sampling": benchmark_sampling, "bleu": benchmark_bleu}[name](options.repeats)
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_model(shape, Path(folder))
            run = globals()[f"benchmark_{name}"]
            rows += run(shape, Path(folder), options.repeats)
    print(f"\n{machine()}\n\n{shape}\n")
    print("| ours : theirs | times as fast (median) | min | max | target | theirs, s | ours, s |")
    print("|---|---|---|---|---|---|---|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
