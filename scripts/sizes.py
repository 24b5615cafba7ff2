"""Measures time and peak memory of LLaVA-1.5-7B on this GPU.

    python scripts/sizes.py                      # everything; 15 GB of disk for random weights of its size
    python scripts/sizes.py measure sft --hidden 512 --layers 6

The script runs a few batches of the shipped recipes (configs/measure.yaml, sft.yaml, dpo.yaml, ppo.yaml). The weights
are random, so every response has the maximum length, which the table reports. The time is the wall-clock time from the
end of one batch to the end of the next, from the second batch on.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from comparisons.model import Shape, write_model
from lightning import Callback
from PIL import Image
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from safervlm.cli.main import main as safervlm
from safervlm.records import write_jsonl

GIB = 2**30
SEVEN = Shape(
    hidden=4096,
    layers=32,
    heads=32,
    intermediate=11008,
    vocabulary=32064,
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
)
ENDS: list[float] = []  # end times of the batches of the current command, in seconds


class Stopwatch(Callback):
    """Records the time at which each batch ends."""

    def note(self, *_: Any) -> None:
        """Waits for the GPU, so that pending work counts towards the batch, and appends to ``ENDS``."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ENDS.append(time.perf_counter())

    on_train_start = on_predict_start = note
    on_train_batch_end = on_predict_batch_end = note


def write_data(folder: Path, unsafe: int, safe: int) -> None:
    """Writes datasets of random images in the published format.

    Args:
        folder: receives ``unsafe/`` and ``safe/``.
        unsafe: number of unsafe images.
        safe: number of safe images.
    """
    rng = np.random.default_rng(0)
    for name, count in (("unsafe", unsafe), ("safe", safe)):
        (folder / name).mkdir()
        rows: list[dict[str, str]] = []
        for number in range(count):
            pixels = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((448, 336)).save(folder / name / f"{number}.jpg")
            shown = f"concept {number % 40}"
            what = {"category": "Violence", "unsafe_concept": shown} if name == "unsafe" else {"concept": shown}
            rows.append({"image_filename": f"{number}.jpg", **what})
        write_jsonl(folder / name / "metadata.jsonl", rows)


def write_judge(folder: Path, model: Path) -> None:
    """Writes a random judge of the size of roberta-base in the published format.

    Args:
        folder: the folder of the judge.
        model: the folder of the VLM, whose tokenizer the judge uses.
    """
    config = RobertaConfig(vocab_size=SEVEN.vocabulary, max_position_embeddings=514)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    roberta, head = RobertaModel(config, add_pooling_layer=False), torch.nn.Linear(config.hidden_size, 3)
    state = {f"roberta.{name}": value for name, value in roberta.state_dict().items()}
    state |= {f"classifier.{name}": value for name, value in head.state_dict().items()}
    torch.save(state, folder / "epoch_10.pt")


@dataclass(frozen=True)
class Played:
    """A recipe that was run.

    Attributes:
        what: the title of the row.
        count: number of examples of a batch.
        memory: peak memory of the GPU, in GiB.
        seconds: median time of a batch after the first one; None if the recipe failed.
    """

    what: str
    count: int
    memory: float
    seconds: float | None

    def __str__(self) -> str:
        """Returns the row of the table: memory, seconds of a batch, examples per second."""
        if self.seconds is None:
            return f"| {self.what} | failed | | |"
        return f"| {self.what} | {self.memory:.1f} | {self.seconds:.2f} | {self.count / self.seconds:.2f} |"


def prepare(folder: Path, hidden: int, layers: int, judge: bool) -> Shape:
    """Writes the model, the data and the judge.

    Args:
        folder: receives ``model``, ``judge``, ``unsafe`` and ``safe``.
        hidden: width of the language model.
        layers: layers of the language model.
        judge: whether the judge is needed.

    Returns:
        The sizes of the model.
    """
    shape = replace(SEVEN, hidden=hidden, layers=layers)
    write_model(shape, folder / "model", torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")
    if judge:
        write_judge(folder / "judge", folder / "model")
    write_data(folder, unsafe=400, safe=400)
    return shape


def play(
    what: str, count: int, folder: Path, tokens: int, batches: int, more: Sequence[str] = (), title: str = ""
) -> Played:
    """Runs a recipe in what :func:`prepare` has written, and measures its batches.

    Args:
        what: name of the recipe: sft, dpo, ppo, measure.
        count: number of examples of a batch.
        folder: see :func:`prepare`.
        tokens: length of a response.
        batches: number of batches; the first one is not measured.
        more: further arguments of ``safervlm``.
        title: the title of the row; by default that of a training.
    """
    title = title or f"{what.upper()}, {count} examples a step"
    print(title, file=sys.stderr, flush=True)
    line = ["predict" if what == "measure" else "fit", "--config", f"configs/{what}.yaml"]
    line += ["--model.vlm.model", str(folder / "model"), "--data.batch_size", str(count)]
    line += ["--data.folder", str(folder / "unsafe"), "--data.safe_folder", str(folder / "safe")]
    line += ["--trainer.enable_progress_bar", "false", "--trainer.callbacks", '[{"class_path": "sizes.Stopwatch"}]']
    line += ["--run", tempfile.mkdtemp(dir=folder)]
    if what == "measure":
        line += ["--data.capabilities", "[alignment]", "--model.sampling.max_new_tokens", str(tokens)]
        line += ["--data.limit", str(count * batches)]
    else:
        line += ["--trainer.max_steps", str(batches)]
    if what == "ppo":
        judge = folder / "judge"
        line += ["--model.judge.checkpoint", str(judge / "epoch_10.pt"), "--model.judge.base", str(judge)]
        line += ["--model.response_length", str(tokens)]
    del ENDS[:]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(SystemExit):
        safervlm([*line, *more])
    took = [end - start for start, end in pairwise(ENDS)]
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0
    return Played(title, count, peak, statistics.median(took[1:]) if len(took) > 1 else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the selected recipes and prints a table in Markdown.

    Args:
        arguments: the command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("sft", "dpo", "ppo", "measure")
    parser.add_argument("which", nargs="*", help=f"what to run: {', '.join(names)} (default: everything)")
    parser.add_argument("--hidden", type=int, default=SEVEN.hidden, help="width of the language model (default: 4096)")
    parser.add_argument("--layers", type=int, default=SEVEN.layers, help="layers of the language model (default: 32)")
    parser.add_argument("--tokens", type=int, default=128, help="length of a response in tokens (default: 128)")
    parser.add_argument(
        "--batches", type=int, default=4, help="batches of each recipe; the first one is not measured (default: 4)"
    )
    options = parser.parse_args(arguments)
    wrong = set(options.which) - set(names)
    if wrong:
        parser.error(f"which: {min(wrong)!r} is none of {', '.join(names)}")
    which = options.which or names
    greedy = ("--model.sampling.temperature", "0")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = prepare(folder, options.hidden, options.layers, judge="ppo" in which)
        rows = []
        for what, size, more in (
            ("sft", 32, ()),
            ("dpo", 32, ()),
            ("ppo", 32, ()),
            ("measure", 1, greedy),
            ("measure", 16, greedy),
            ("measure", 256, greedy),
            ("measure", 256, ()),
        ):
            if what not in which:
                continue
            title = f"measure, {'greedy' if more else 'sampled'}, {size} questions at once" if what == "measure" else ""
            rows.append(play(what, size, folder, options.tokens, options.batches, more, title))
            print(rows[-1], file=sys.stderr, flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"\n{date.today()}, {gpu}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"answers of {options.tokens} tokens (measure, PPO); {shape}\n")
    print("| | GPU memory, GiB | a batch, s | a second |\n|---|---|---|---|")
    print(*rows, sep="\n")
    if any(row.seconds is None for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    # The command line imports sizes.Stopwatch; run the main() of that module, so that both share ENDS.
    from sizes import main as found

    found()
