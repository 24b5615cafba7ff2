"""Compares the CPU time of a training step with alternative implementations that compute the same loss.

    python scripts/benchmark.py                      # everything
    python scripts/benchmark.py dpo sft --repeats 3

The model is a random LLaVA in the proportions of LLaVA-1.5-7B: 576 image tokens, a prompt of about 605 tokens,
responses of about 30 tokens, and a language model head with 2 % of the work. The script measures the CPU time of its
process, so that other processes matter little; only ratios are meaningful. Every repetition runs all sides one after
the other (A B A B ...), and ratios are taken within a repetition. The sides have to agree: on the gradients before the
first measurement, and on the loss in every repetition. The collation of batches from text and images is not measured.
Each comparison is a file of ``scripts/comparisons``.

TRL is measured at its best: on a GPU its head scores only the positions of the response, on a CPU all positions. Here
it is configured to do on the CPU what it does on a GPU.
"""

import argparse
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import transformers
from comparisons.against_trl import benchmark_dpo, benchmark_sft
from comparisons.bleu import benchmark_bleu
from comparisons.generation import benchmark_measure
from comparisons.group import benchmark_group
from comparisons.model import SMALL, Shape, write_model
from comparisons.ppo import benchmark_ppo
from comparisons.sampling import benchmark_sampling
from comparisons.shared import benchmark_shared
from comparisons.timing import Row, say

WITH_A_MODEL: dict[str, Callable[[Shape, Path, int], list[Row]]] = {
    "dpo": benchmark_dpo,
    "sft": benchmark_sft,
    "ppo": benchmark_ppo,
    "shared": benchmark_shared,
    "group": benchmark_group,
    "measure": benchmark_measure,
}
WITHOUT_A_MODEL: dict[str, Callable[[int], list[Row]]] = {"sampling": benchmark_sampling, "bleu": benchmark_bleu}


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
    names = (*WITH_A_MODEL, *WITHOUT_A_MODEL)
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
        if name in WITHOUT_A_MODEL:
            rows += WITHOUT_A_MODEL[name](options.repeats)
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_model(shape, Path(folder))
            rows += WITH_A_MODEL[name](shape, Path(folder), options.repeats)
    print(f"\n{machine()}\n\n{shape}\n")
    print("| ours : theirs | speed-up (median) | min | max | target | theirs, s | ours, s |")
    print("|---|---|---|---|---|---|---|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
