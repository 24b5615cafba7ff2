"""Checks and measures SaferVLM on one GPU, within 9 minutes, and writes gpu_check.json.

    python scripts/gpu_check.py --out FOLDER         # 15 GB of disk for random weights of LLaVA-1.5-7B's size
    python scripts/gpu_tables.py FOLDER/gpu_check.json

In this order: the tests marked ``gpu``; attention with one key-value head in bfloat16 against float32; generation with
its time, launches, kernels and GPU time per step; training steps of SFT, DPO and PPO. The file is written after each
figure. What doesn't fit into the time is left out, with the reason, and the process ends itself at the limit.

The weights are random, and the end token is suppressed, so every response has the maximum length. The time per step is
the difference between long and short responses, so that it doesn't contain the prompt.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import sizes
import torch
import torch.nn.functional as F
import transformers
from comparisons.model import Shape, examples
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from safervlm.io.files import write_text_atomically
from safervlm.io.reading import json_text
from safervlm.records import Example
from safervlm.vlm.llava import Llava
from safervlm.vlm.packed import PackedBatch
from safervlm.vlm.sampling import Sampling

ROOT = Path(__file__).parent.parent
NO_TIME, NOT_REACHED = "no time left", "not reached"
# Seconds that must be left to begin a measurement: more than it took on an H100.
TESTS, GENERATION, TRAINING = 150, 25, {"sft": 60, "dpo": 65, "ppo": 120}
EXAMPLES = 32  # of a training step
SHORT, PROFILED = 2, 8  # tokens of the shortest responses; steps that are profiled
HEADS, HEAD_SIZE = 8, 256  # of attention, as in PaliGemma
LAUNCH = re.compile(r"(cuda|cu|hip)(Launch|GraphLaunch|Memcpy|Memset|ModuleLaunch|ExtModuleLaunch|ExtLaunch)")
LENGTHS = (32, 33, 64, 65, 256, 257, 608, 609, 1024, 1025)


@dataclass(frozen=True)
class Case:
    """A batch to generate responses for.

    Attributes:
        questions: number of questions.
        per_image: number of questions about each image.
        sampled: whether responses are sampled (with top_p .9) rather than greedy.
        adapter: whether a LoRA adapter is active that is not merged, as in the rollouts of PPO.
    """

    questions: int
    per_image: int = 1
    sampled: bool = False
    adapter: bool = False


CASES = (
    *(Case(16, 1, sampled, adapter) for adapter in (False, True) for sampled in (False, True)),
    *(Case(64, 1, sampled, adapter) for adapter in (False, True) for sampled in (False, True)),
    *(Case(256, 5, sampled) for sampled in (False, True)),
    *(Case(1, 1, sampled, adapter) for adapter in (False, True) for sampled in (False, True)),
)


class Report:
    """The figures, in a file that is complete at any time.

    Args:
        file: the file to write.
        minutes: the time limit.
        content: description of the check.
    """

    def __init__(self, file: Path, minutes: float, content: dict[str, Any]) -> None:
        self.file, self.limit, self.start = file, 60 * minutes, time.monotonic()
        self.content = content | {
            "tests": {"missing": NOT_REACHED},
            "attention": {"missing": NOT_REACHED},
            "generation": [asdict(case) | {"missing": NOT_REACHED} for case in CASES],
            "training": [{"recipe": each, "examples": EXAMPLES, "missing": NOT_REACHED} for each in TRAINING],
        }
        self.write()

    def write(self) -> None:
        """Writes the file."""
        self.content["seconds"] = round(time.monotonic() - self.start)
        write_text_atomically(self.file, json_text(self.content, indent=2, finite=False) + "\n")

    def measure(self, entry: dict[str, Any], needed: float, figure: Callable[[], dict[str, Any]]) -> None:
        """Measures a figure, if enough time is left, and writes it.

        Args:
            entry: the entry of the figure, which is changed.
            needed: seconds that must be left.
            figure: returns the figure. An exception that it raises is recorded as the reason why there is none.
        """
        del entry["missing"]
        if time.monotonic() - self.start + needed > self.limit:
            entry["missing"] = NO_TIME
        else:
            try:
                entry |= figure()
            except (Exception, SystemExit) as error:
                entry["missing"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        self.write()
        print(entry, file=sys.stderr, flush=True)


def run_tests(tests: Sequence[str]) -> dict[str, Any]:
    """Runs the tests marked ``gpu`` in a process of their own; returns how many have each outcome.

    Args:
        tests: files or folders of tests.
    """
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-m", "gpu", *tests]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=TESTS, check=False)  # noqa: S603
    last = next((text for text in reversed(done.stdout.splitlines()) if " in " in text), "")
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    if not counts:
        raise RuntimeError(f"pytest ended with {done.returncode}: {last or done.stderr[-200:]}")
    return counts


@torch.no_grad()
def attention(device: str) -> dict[str, Any]:
    """Compares attention with one key-value head in bfloat16 with float32 (pytorch#191937).

    Keys and values are a view that repeats the head without a copy, as in transformers, and the mask hides padding.

    Args:
        device: the device.

    Returns:
        For each length, the root-mean-square difference relative to the standard deviation of the result.
    """
    differences = {}
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(length)
        query = torch.randn(2, HEADS, length, HEAD_SIZE, generator=generator)
        key, value = (torch.randn(2, 1, length, HEAD_SIZE, generator=generator) for _ in range(2))
        mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
        mask[1, :, :, : length // 4] = False  # left padding, where each token attends to itself
        mask |= torch.eye(length, dtype=torch.bool)
        short = [each.to(device, torch.bfloat16) for each in (query, key, value)]
        results = []
        for some in (short, [each.float() for each in short]):
            keys, values = (each.expand(-1, HEADS, -1, -1) for each in some[1:])
            results.append(F.scaled_dot_product_attention(some[0], keys, values, attn_mask=mask.to(device)).float())
        wrong = (results[0] - results[1]).square().mean().sqrt() / results[1].std()
        differences[str(length)] = float(wrong)
    return {"differences": differences}


def wait() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def batch_of(vlm: Llava, shape: Shape, folder: Path, case: Case) -> PackedBatch:
    """Returns the questions of a case as a batch on the model's device.

    Args:
        vlm: the model.
        shape: sizes of the model and its questions.
        folder: folder for the images.
        case: see :class:`Case`.
    """
    made = examples(shape, folder, case.questions, 0)
    shown = [made[number // case.per_image * case.per_image].question.image_path for number in range(case.questions)]
    asked = [Example(replace(each.question, image_path=path)) for each, path in zip(made, shown, strict=True)]
    batch: PackedBatch = vlm.collator(asked)
    return batch.to(next(vlm.base.parameters()).device)


def generation(vlm: Llava, batch: PackedBatch, case: Case, tokens: int) -> dict[str, Any]:
    """Measures the generation of responses.

    Args:
        vlm: the model, with an adapter.
        batch: the questions.
        case: see :class:`Case`.
        tokens: length of a response.

    Returns:
        The time of the batch, memory, and per step its time, launches, kernels and GPU time.
    """

    def generate(length: int) -> float:
        batch.features = None  # the images are encoded each time
        wait()
        start = time.perf_counter()
        sampling = Sampling(float(case.sampled), max_new_tokens=length)
        answers = vlm.generate(batch, sampling, 0, "policy" if case.adapter else "reference")
        wait()
        if any(len(answer.token_ids) != length for answer in answers):  # type: ignore[union-attr]
            raise RuntimeError("a response is shorter than all others")
        return time.perf_counter() - start

    generate(SHORT)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    short, long = generate(SHORT), generate(tokens)
    memory = torch.cuda.max_memory_allocated() / sizes.GIB if torch.cuda.is_available() else 0.0
    few, more = (profiled(lambda length=length: generate(length)) for length in (SHORT, SHORT + PROFILED))
    counts = {name: (more[name] - few[name]) / PROFILED for name in few}
    figures = {"memory": memory, "step_ms": 1000 * (long - short) / (tokens - SHORT)} | counts
    return {"batch_s": round(long, 2)} | {name: round(value, 1) for name, value in figures.items()}


def profiled(run: Callable[[], Any]) -> dict[str, float]:
    """Returns what a call launches on the GPU.

    Args:
        run: the call.

    Returns:
        ``launches``, the calls of the driver that launch a kernel, a copy or a whole graph; ``kernels``, the kernels
        and copies that the GPU executes, of which a graph has many; ``gpu_ms``, their time in milliseconds.
    """
    with profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]) as found:
        run()
    events = found.events() or []
    kernels = [each for each in events if each.device_type == DeviceType.CUDA]
    return {
        "launches": sum(each.device_type == DeviceType.CPU and bool(LAUNCH.match(each.name)) for each in events),
        "kernels": len(kernels),
        "gpu_ms": sum(each.time_range.elapsed_us() for each in kernels) / 1000,
    }


def generations(report: Report, shape: Shape, folder: Path, tokens: int) -> None:
    """Measures all cases with the model loaded once.

    Args:
        report: receives the figures.
        shape: sizes of the model.
        folder: folder of the model.
        tokens: length of a response.
    """
    vlm = Llava(str(folder / "model"))
    vlm.load(train=("policy",), seed=0)
    vlm.to("cuda" if torch.cuda.is_available() else "cpu")
    vlm.suppressed = torch.tensor(sorted({*vlm.suppressed.tolist(), *vlm.eos_token_ids}))
    for case, entry in zip(CASES, report.content["generation"], strict=True):
        report.measure(
            entry,
            GENERATION,
            lambda case=case: generation(vlm, batch_of(vlm, shape, folder, case), case, tokens),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the check; exit code 1 if a figure is missing or a test fails.

    Args:
        arguments: the command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives gpu_check.json")
    parser.add_argument("--hidden", type=int, default=sizes.SEVEN.hidden, help="width of the model (default: 4096)")
    parser.add_argument("--layers", type=int, default=sizes.SEVEN.layers, help="layers of the model (default: 32)")
    parser.add_argument("--tokens", type=int, default=128, help="length of a response in tokens (default: 128)")
    parser.add_argument("--minutes", type=float, default=9, help="time limit (default: 9)")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="files or folders of tests (default: tests)")
    options = parser.parse_args(arguments)
    if options.tokens < SHORT + 1:
        parser.error(f"--tokens: {options.tokens}, at least {SHORT + 1} are needed")
    options.out.mkdir(parents=True, exist_ok=True)
    if hasattr(signal, "alarm"):
        signal.alarm(max(1, int(60 * options.minutes)))  # ends the process; the file is complete at any time
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report(
        options.out / "gpu_check.json",
        options.minutes,
        {
            "date": date.today().isoformat(),
            "card": torch.cuda.get_device_name() if device == "cuda" else "no GPU",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "shape": asdict(replace(sizes.SEVEN, hidden=options.hidden, layers=options.layers)),
            "tokens": options.tokens,
        },
    )
    report.measure(report.content["tests"], TESTS, lambda: run_tests(options.tests))
    report.measure(report.content["attention"], 0, lambda: attention(device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = sizes.prepare(folder, options.hidden, options.layers, judge=True)
        generations(report, shape, folder, options.tokens)
        for entry in report.content["training"]:
            recipe = entry["recipe"]
            report.measure(entry, TRAINING[recipe], lambda recipe=recipe: training(recipe, folder, options.tokens))
    if hasattr(signal, "alarm"):
        signal.alarm(0)
    entries = [report.content["tests"], report.content["attention"]]
    entries += report.content["generation"] + report.content["training"]
    if any("missing" in entry or "failed" in entry or "error" in entry for entry in entries):
        sys.exit(1)


def training(recipe: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Measures the training steps of a recipe.

    Args:
        recipe: sft, dpo or ppo.
        folder: what :func:`sizes.prepare` has written.
        tokens: length of a response of PPO.
    """
    found = sizes.play(recipe, EXAMPLES, folder, tokens, batches=3)
    if found.seconds is None:
        raise RuntimeError("the recipe failed")
    return {"memory": round(found.memory, 1), "batch_s": round(found.seconds, 2)}


if __name__ == "__main__":
    main()
