"""Compares decoding steps of fixed and of growing shapes: CPU time and operators per decoding step.

    python scripts/decoding.py
    python scripts/decoding.py --repeats 3 --tokens 12

The model is a random LLaVA (see comparisons/model.py) with fewer image tokens, on a CPU. Every repetition runs both
sides one after the other, and the ratio is taken within a repetition. Their responses have to be equal, token by token,
in every repetition; otherwise the script stops and prints no table. The time per step is the difference between long
and short responses, so that it doesn't contain the prompt. On a GPU, gpu_check.py measures the step and its launches.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from benchmark import machine
from comparisons.model import Shape, examples, llava, lora_parameters, perturb, write_model
from comparisons.timing import say
from torch.profiler import ProfilerActivity, profile

from safervlm.records import Example
from safervlm.vlm.auto import Transformers
from safervlm.vlm.decoding import Decoding
from safervlm.vlm.lora import Adapter
from safervlm.vlm.sampling import Sampling

SHAPE = Shape(hidden=256, intermediate=688, layers=4, heads=4, image_size=112)
SHORT = 2  # tokens of the shortest responses
SIDES = {"growing": Decoding("growing"), "fixed": Decoding()}
TEMPLATE = "w1 w2 USER: <image> {question} ASSISTANT:"


@dataclass(frozen=True)
class Case:
    """A batch to generate responses for.

    Attributes:
        family: ``Llava`` or ``Transformers``.
        images: number of images.
        per_image: number of questions about each.
        sampled: whether responses are sampled (with top_p .9) rather than greedy.
        adapter: ``policy`` for a LoRA adapter, ``reference`` for none, which costs as much as a merged adapter.
        ends: number of tokens that end a response; with 0, all responses have the maximum length.
    """

    family: str
    images: int
    per_image: int = 1
    sampled: bool = False
    adapter: Adapter = "reference"
    ends: int = 0

    def __str__(self) -> str:
        parts = [f"{self.family}, {self.images * self.per_image} questions"]
        parts += [f"{self.per_image} per image"] if self.per_image > 1 else []
        parts += ["sampled" if self.sampled else "greedy"]
        parts += ["adapter"] if self.adapter == "policy" else []
        parts += ["different lengths"] if self.ends else []
        return ", ".join(parts)


CASES = (
    Case("Llava", 16),
    Case("Llava", 16, sampled=True),
    Case("Llava", 16, adapter="policy"),
    Case("Llava", 4, 5, sampled=True),
    Case("Llava", 16, sampled=True, ends=40),
    Case("Transformers", 16),
    Case("Transformers", 16, sampled=True),
    Case("Transformers", 16, sampled=True, ends=40),
)


class Measured:
    """Measurement of one case: runs both sides in turn.

    Args:
        vlm: the loaded model.
        case: the case.
        folder: folder for the images.
        tokens: length of the long responses.
    """

    def __init__(self, vlm: Any, case: Case, folder: Path, tokens: int) -> None:
        self.vlm, self.case, self.tokens = vlm, case, tokens
        made = examples(SHAPE, folder, case.images * case.per_image, 0)
        shown = [made[place // case.per_image * case.per_image].question.image_path for place in range(len(made))]
        asked = [Example(replace(each.question, image_path=path)) for each, path in zip(made, shown, strict=True)]
        self.batch = vlm.collator(asked)
        end = vlm.tokenizer.eos_token_id
        ends = [end, *range(100, 100 + case.ends)]
        self.ends = property(lambda _: ends)
        self.suppressed = torch.tensor(sorted({*vlm.suppressed.tolist(), *([] if case.ends else [end])}))
        self.ms: dict[str, list[float]] = {side: [] for side in SIDES}

    def generate(self, side: str, tokens: int) -> tuple[float, list[Any]]:
        """Returns the CPU seconds of a batch and the tokens of its responses.

        Args:
            side: the side.
            tokens: maximum length of a response.
        """
        self.vlm.decoding, sampling = SIDES[side], Sampling(float(self.case.sampled), 0.9, tokens)
        with (
            patch.object(type(self.vlm), "eos_token_ids", self.ends),
            patch.object(self.vlm, "suppressed", self.suppressed),
        ):
            start = time.process_time()
            answers = self.vlm.generate(self.batch, sampling, 0, self.case.adapter)
            seconds = time.process_time() - start
        return seconds, [answer.token_ids for answer in answers]

    def repeat(self, counted: bool) -> None:
        """Runs both sides.

        Args:
            counted: whether the times are kept.

        Raises:
            SystemExit: the responses differ.
        """
        found = {}
        for side in SIDES:
            short, _ = self.generate(side, SHORT)
            seconds, found[side] = self.generate(side, self.tokens)
            if counted:
                self.ms[side].append(1000 * (seconds - short) / (self.tokens - SHORT))
        if found["growing"] != found["fixed"]:
            sys.exit(f"{self.case}: the responses are not equal: the comparison is void")

    def operators(self, side: str) -> float:
        """Returns how many operators of PyTorch a step calls, without those called by other operators.

        Args:
            side: the side.
        """
        counts = []
        for tokens in (SHORT, SHORT + 4):
            with profile(activities=[ProfilerActivity.CPU]) as found:
                self.generate(side, tokens)
            events = [each for each in found.events() or [] if each.name.startswith("aten::")]
            counts.append(sum(each.cpu_parent is None for each in events))
        return (counts[1] - counts[0]) / 4

    def row(self) -> str:
        """Returns the row of the table."""
        ratios = [fixed / growing for growing, fixed in zip(self.ms["growing"], self.ms["fixed"], strict=True)]
        shown = [statistics.median(ratios), min(ratios), max(ratios)]
        times = [statistics.median(self.ms[side]) for side in SIDES]
        counts = ["", ""] if self.case.ends else [f"{self.operators(side):.0f}" for side in SIDES]
        figures = [f"{each:.2f}" for each in shown] + [f"{ms:.1f}" for ms in times] + counts
        return f"| {self.case} | {' | '.join(figures)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all cases and prints a table in Markdown.

    Args:
        arguments: the command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured repetitions (default: 5)")
    parser.add_argument("--tokens", type=int, default=40, help="length of a response in tokens (default: 40)")
    parser.add_argument("--only", default="", help="text that a case's name begins with (default: all cases)")
    options = parser.parse_args(arguments)
    if options.tokens <= SHORT:
        parser.error(f"--tokens: {options.tokens}, at least {SHORT + 1} are needed")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(SHAPE, folder)
        packed = llava(SHAPE, folder)
        packed.load(("policy",))
        assert packed.model is not None  # noqa: S101
        perturb(lora_parameters(packed.model))
        other = Transformers(name, dtype="float32", template=TEMPLATE)
        other.load()
        cases = [
            Measured({"Llava": packed, "Transformers": other}[case.family], case, folder, options.tokens)
            for case in CASES
            if str(case).startswith(options.only)
        ]
        for repeat in range(options.repeats + 1):
            for case in cases:
                case.repeat(bool(repeat))
            say(f"  {repeat}/{options.repeats}")
        rows = [case.row() for case in cases]
    found = {each.case: each.ms for each in cases}
    print(f"\n{machine()}\n\n{SHAPE}\n")
    print("| a step | fixed / growing (median) | min | max | growing, ms | fixed, ms | operators, growing | fixed |")
    print("|---|---|---|---|---|---|---|---|")
    print(*rows, sep="\n")
    for side in SIDES if CASES[2] in found and CASES[0] in found else ():
        ratios = [one / two for one, two in zip(found[CASES[2]][side], found[CASES[0]][side], strict=True)]
        print(f"\nA {side} step with an adapter takes {statistics.median(ratios):.2f} times as long as one without.")


if __name__ == "__main__":
    main()
