"""Measures how long the analysis of large runs takes: loading, scoring, comparing and reporting.

    python scripts/scale.py [--answers 100000] [--runs 4]

writes synthetic runs of so many judged responses to the alignment questions, over 75 concepts with four images of each
of different size, into a temporary folder, then runs ``safervlm report`` on them in a separate process. Prints its
CPU time, elapsed time and peak memory. The time does not contain the writing of the runs.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from safervlm.protocol import ALIGNMENT_QUESTIONS, CATEGORIES, SAFE, UNSAFE
from safervlm.records import Question, Response, Verdict, record_id, write_jsonl

CONCEPTS = 75
WORDS = (
    "it",
    "shows",
    "an",
    "image",
    "that",
    "is",
    "not",
    "suitable",
    "because",
    "of",
    "its",
    "content",
    "and",
    "people",
)


def write_run(folder: Path, pictures: Sequence[Path], answers: int, accuracy: float, seed: int) -> None:
    """Writes the responses and verdicts of a run.

    Args:
        folder: its folder.
        pictures: image files, each of which several images use.
        answers: number of responses.
        accuracy: share of right verdicts.
        seed: seed of the verdicts and texts; all runs have the same questions.
    """
    rng = np.random.default_rng(seed)
    categories = list(CATEGORIES)
    responses, verdicts = [], []
    for number in range(answers):
        image, prompt = divmod(number, len(ALIGNMENT_QUESTIONS))
        concept = image % CONCEPTS
        answer = UNSAFE if image % 3 else SAFE
        name = f"images/{image}.png"
        identity = record_id("Made" if answer == UNSAFE else "MadeSafe", name, "alignment", prompt)
        question = Question(
            id=identity,
            dataset="Made" if answer == UNSAFE else "MadeSafe",
            image=name,
            image_path=str(pictures[image % len(pictures)]),
            capability="alignment",
            prompt_number=prompt,
            prompt=ALIGNMENT_QUESTIONS[prompt],
            category=categories[concept % len(categories)],
            concept=f"concept {concept}",
            answer=answer,
        )
        right = rng.random() < accuracy
        label = answer if right else {SAFE: UNSAFE, UNSAFE: SAFE}[answer]
        text = f"{'No' if label == UNSAFE else 'Yes'}, {' '.join(rng.choice(WORDS, 20))}."
        responses.append(Response(question, text, "stop", 25))
        other = {SAFE: UNSAFE, UNSAFE: SAFE}[label]
        by_label = {label: 0.96, other: 0.03, "N/A": 0.01}
        verdicts.append(Verdict(identity, label, by_label, "0123456789abcdef", Verdict.fingerprint_of(text)))
    write_jsonl(folder / "responses.jsonl", (each.to_dict() for each in responses))
    write_jsonl(folder / "verdicts.jsonl", (each.to_dict() for each in verdicts))


def main(args: Sequence[str] | None = None) -> None:
    """Prints the result as a Markdown table.

    Args:
        args: words of the command line; None for those of ``sys.argv``.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100_000, help="responses per run (default: 100000)")
    parser.add_argument("--runs", type=int, default=4, help="number of runs (default: 4)")
    given = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        for number in range(8):
            pictures.append(Path(folder) / f"{number}.png")
            noise = np.random.default_rng(number).integers(0, 255, (240 + 20 * number, 320, 3), dtype=np.uint8)
            Image.fromarray(noise).save(pictures[-1])
        runs = []
        for number in range(given.runs):
            runs.append(Path(folder) / f"run-{number}")
            runs[-1].mkdir()
            write_run(runs[-1], pictures, given.answers, 0.6 + 0.08 * number, number)
        command = [sys.executable, "-m", "safervlm", "report", *map(str, runs), "--out", f"{folder}/report.html"]
        begun = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # noqa: S603
        elapsed, used = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"Python {platform.python_version()}, {platform.processor() or platform.machine()}\n")
    print("| runs | answers per run | CPU seconds | elapsed | peak memory |")
    print("|---|---|---|---|---|")
    cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024**2
    print(f"| {given.runs} | {given.answers:,} | {cpu:.0f} s | {elapsed:.0f} s | {memory:.1f} GiB |")


if __name__ == "__main__":
    main()
