"""Numeric arguments: a value out of range is one line that names argument, value and range."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks.checkpoint import LastCheckpoint
from callbacks.generation_check import GenerationCheck
from callbacks.judge_responses import JudgeResponses
from callbacks.rollout_log import RolloutLog
from safervlm.data.alignment import DPOData, PPOData, SFTData
from safervlm.data.labelled import LabelledAnswers
from safervlm.data.own import OwnData
from safervlm.data.responses import SavedResponses
from safervlm.data.unsafe_concepts import UnsafeConcepts
from safervlm.errors import ArgumentError
from safervlm.judging.classifier import Judge
from safervlm.judging.panel import Panel
from safervlm.limits import TextLimits
from safervlm.measure import Measure
from safervlm.objectives.dpo import DPO
from safervlm.objectives.grpo import GRPO
from safervlm.objectives.ppo import PPO
from safervlm.objectives.sft import SFT
from safervlm.pictograms.world import build
from safervlm.protocol import LABELS
from safervlm.ranges import in_range
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.client import Server

NAN, INFINITY = math.nan, math.inf

CASES: dict[str, tuple[dict[str, float], float, str | None]] = {
    "in it": ({"least": 0, "most": 1}, 1, None),
    "its end": ({"above": 0}, 1e-300, None),
    "not given": ({"least": 0}, None, None),
    "any number": ({}, -1e300, None),
    "too small": ({"least": 1}, 0, "a.x: at least 1, got 0"),
    "as small": ({"above": 0}, 0.0, "a.x: above 0, got 0.0"),
    "too large": ({"least": 0, "most": 1}, 1.5, "a.x: at least 0 and at most 1, got 1.5"),
    "as large": ({"least": 0, "below": 1}, 1.0, "a.x: at least 0 and below 1, got 1.0"),
    "NaN": ({"least": 0}, NAN, "a.x: at least 0, got nan"),
    "NaN in any": ({}, NAN, "a.x: a number, got nan"),
    "infinite": ({"above": 0}, INFINITY, "a.x: above 0, and not infinite, got inf"),
    "65 bits": ({"least": 1}, 2**64, "a.x: an integer of at most 9223372036854775807, got 18446744073709551616"),
    "as many bits below 0": ({}, -(2**64), "a.x: an integer of at most 9223372036854775807, got -18446744073709551616"),
    "more than a float": ({"least": 1}, 10**400, f"a.x: an integer of at most 9223372036854775807, got 1{'0' * 79}"),
    "64 bits": ({"least": 1}, 2**63 - 1, None),
    "minus infinity": ({}, -INFINITY, "a.x: a number, and not infinite, got -inf"),
}


@pytest.mark.parametrize("case", CASES)
def test_error_names_argument_value_and_allowed_range(case: str) -> None:
    bounds, value, message = CASES[case]
    if message is None:
        in_range("a", **bounds, x=value)
        return
    with pytest.raises(ArgumentError) as caught:
        in_range("a", **bounds, x=value)
    assert str(caught.value) == message


VLM = Llava("nowhere")
JUDGE = Judge(labels=LABELS["alignment"])
PERCEPTION = Judge(labels=LABELS["perception"])


def saved(**given: Any) -> SavedResponses:
    return SavedResponses("nowhere", **given)


# A function that builds each object, and values of its numeric arguments that are out of range.
WRONG: dict[str, tuple[Callable[..., object], dict[str, tuple[float, ...]]]] = {
    "Judge": (
        Judge,
        {
            "lr": (0.0, -1e-5, NAN, INFINITY),
            "weight_decay": (-0.1, NAN, INFINITY),
            "warmup": (-0.1, 1.1, NAN),
            "label_smoothing": (-0.1, 1.0, 2.0, NAN),
            "max_characters": (0, -1),
        },
    ),
    "Measure": (lambda **given: Measure(VLM, **given), {"failures_in_a_row": (0, -1)}),
    "SFT": (
        lambda **given: SFT(VLM, **given),
        {"lr": (0.0, NAN, INFINITY), "warmup_steps": (-1,), "weight_decay": (-0.1, NAN, INFINITY)},
    ),
    "DPO": (
        lambda **given: DPO(VLM, **given),
        {
            "beta": (0.0, -1.0, NAN, INFINITY),
            "rpo_alpha": (-1.0, NAN, INFINITY),
            "lr": (0.0, NAN),
            "warmup_steps": (-1,),
            "weight_decay": (-1.0,),
        },
    ),
    "PPO": (
        lambda **given: PPO(VLM, JUDGE, **given),
        {
            "kl_coef": (-0.1, NAN, INFINITY),
            "budget": (-0.1, 0.0, 1.0, NAN),
            "budget_step": (0.0, NAN, INFINITY),
            "entropy_coef": (-0.1, NAN, INFINITY),
            "vf_coef": (-0.1, NAN),
            "clip": (0.0, NAN, INFINITY),
            "value_clip": (0.0, NAN),
            "gamma": (-0.1, 1.1, NAN),
            "lam": (-0.1, 1.1, NAN),
            "ppo_epochs": (0,),
            "mini_batch_size": (0,),
            "micro_batch_size": (0,),
            "temperature": (0.0, NAN, INFINITY),
            "response_length": (0, -1),
            "length_bonus": (NAN, INFINITY),
            "no_eos_penalty": (NAN, -INFINITY),
            "reward_scale": (NAN, INFINITY),
            "max_grad_norm": (0.0, NAN),
            "lr": (0.0,),
            "warmup_steps": (-1,),
            "weight_decay": (-1.0,),
        },
    ),
    "GRPO": (
        lambda **given: GRPO(VLM, JUDGE, **given),
        {
            "group_size": (1, 0),
            "clip": (0.0, NAN, INFINITY),
            "clip_high": (0.0, NAN),
            "kl_coef": (-0.1, NAN, INFINITY),
            "budget": (-0.1, 0.0, 1.0, NAN),
            "budget_step": (0.0, NAN, INFINITY),
            "epochs": (0,),
            "mini_batch_size": (0,),
            "micro_batch_size": (0,),
            "temperature": (0.0, NAN, INFINITY),
            "response_length": (0, -1),
            "length_bonus": (NAN, INFINITY),
            "no_eos_penalty": (NAN, -INFINITY),
            "max_grad_norm": (0.0, NAN),
            "lr": (0.0,),
            "warmup_steps": (-1,),
            "weight_decay": (-1.0,),
        },
    ),
    "Sampling": (
        Sampling,
        {"temperature": (-0.1, NAN, INFINITY), "top_p": (0.0, 1.1, NAN), "max_new_tokens": (0, -1)},
    ),
    "TextLimits": (TextLimits, {"max_tokens": (0, -1), "seconds": (0.0, -1.0, NAN, INFINITY)}),
    "LoRA": (LoRA, {"r": (0,), "alpha": (0, -1), "dropout": (-0.1, 1.0, NAN), "min_coverage": (-0.1, 1.1, NAN)}),
    "Server": (
        lambda **given: Server("m", ["http://127.0.0.1:1/v1"], **given),
        {
            "concurrency": (0,),
            "timeout": (0.0, NAN, INFINITY),
            "max_retries": (-1,),
            "max_requests": (0,),
            "max_tokens": (0,),
            "max_wait": (0.0, NAN, INFINITY),
            "question_timeout": (-1.0, NAN, INFINITY),
            "max_body": (0,),
            "max_count": (0,),
        },
    ),
    "UnsafeConcepts": (
        UnsafeConcepts,
        {"validation_fraction": (-0.1, 1.0, NAN), "limit": (0,), "batch_size": (0, -1), "num_workers": (-1,)},
    ),
    **{
        data.__name__: (
            data,
            {"validation_fraction": (-0.1, 1.0, NAN), "limit": (0,), "batch_size": (0, -1), "num_workers": (-1,)},
        )
        for data in (SFTData, DPOData, PPOData)
    },
    "OwnData": (
        lambda **given: OwnData("nowhere.jsonl", **given),
        {"limit": (0,), "repeats": (0, -1), "batch_size": (0, -1), "num_workers": (-1,)},
    ),
    "SavedResponses": (saved, {"limit": (0,), "batch_size": (0, -1), "num_workers": (-1,)}),
    "LabelledAnswers": (
        lambda **given: LabelledAnswers("nowhere.csv", **given),
        {"held_out": (0.0, 1.0, -0.1, NAN), "limit": (0,), "batch_size": (0,), "num_workers": (-1,)},
    ),
    "JudgeResponses": (lambda **given: JudgeResponses(Panel(JUDGE, PERCEPTION), **given), {"batch_size": (0, -1)}),
    "LastCheckpoint": (LastCheckpoint, {"every_n_batches": (0, -1)}),
    "RolloutLog": (RolloutLog, {"answers": (0, -1)}),
    "GenerationCheck": (
        lambda **given: GenerationCheck(JUDGE, **given),
        {"every_n_batches": (0,), "minimum": (0,), "tolerance": (-0.1, 1.0, NAN)},
    ),
    "build": (lambda **given: build(Path("nowhere"), **given), {"threads": (0,), "perturbation": (-0.1, 0.2, NAN)}),
}
ALL = [
    (what, name, value) for what, (_, numbers) in WRONG.items() for name, values in numbers.items() for value in values
]


@pytest.mark.parametrize(("what", "name", "value"), ALL, ids=lambda each: str(each))
def test_out_of_range_argument_is_rejected_in_one_line(what: str, name: str, value: float) -> None:
    make, _ = WRONG[what]
    with pytest.raises(ArgumentError, match=rf"^([\w]+\.)*{name}: .*, got {value}$") as caught:
        make(**{name: value})
    assert "\n" not in str(caught.value)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    "made", [Judge, SFT, DPO, PPO, GRPO, Measure, Sampling, TextLimits, LoRA, Server, LabelledAnswers, OwnData]
)
def test_every_numeric_argument_has_a_range_test_case(made: type) -> None:
    """Except seeds, all of which are in range."""
    numbers = {
        name
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.annotation in (int, float, int | None, float | None)
    }
    assert numbers - {"seed"} <= WRONG[made.__name__][1].keys()
