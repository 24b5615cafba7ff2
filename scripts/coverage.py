"""Simulates the coverage of SaferVLM's 95 % intervals on the clusters of the real datasets.

    python scripts/coverage.py [--repetitions 2000] [--seed 0] [--write safervlm/coverage.csv]

prints Markdown tables. Each repetition samples every concept's rate from a beta distribution with the given mean and
intra-concept correlation. It simulates one response per image, or five with an intra-image correlation of .5, and
computes the intervals as the scores do. For *these concepts* the true value is the mean of the sampled rates, weighted
by the number of images (for names, of responses). For *new concepts* it is the mean of the distribution. The two rates
of the modality gap are sampled independently or from one quantile ("tied"), with five responses per name and one per
image. The designs of the tables of MME and LLaVABench are described above these tables.
``scripts/simulations`` has a file for each kind of study.

``--write`` also writes the lowest and the highest coverage of each method, for the captions of tables. 2,000
repetitions take about 10 minutes on one core, 200 a tenth of that.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from simulations.gaps import gaps
from simulations.ratios import ratios
from simulations.runs import runs
from simulations.shares import shares
from simulations.sides import sides
from simulations.studies import Found, header
from simulations.sums import sums


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated experiments per cell (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--write", type=Path, help="CSV file for the lowest and highest coverage of each method")
    arguments = parser.parse_args()
    found: Found = defaultdict(list)
    repetitions, seed = arguments.repetitions, arguments.seed
    print(f"Coverage of a nominal .95 (mean length); {repetitions} repetitions per cell, seed {seed}.")
    for number, table in enumerate((shares, gaps, sums, ratios, runs, sides)):
        print()
        for line in table(repetitions, np.random.default_rng((seed, number)), found):
            print(line, flush=True)
    print("\nLowest and highest of each method:\n")
    print(header("method", "part", "lowest", "highest", "cells"))
    summary = [(*key, f"{min(x):.3f}", f"{max(x):.3f}", str(len(x))) for key, x in found.items()]
    for row in summary:
        print("| " + " | ".join(row) + " |")
    if arguments.write:
        with arguments.write.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("method", "part", "lowest", "highest", "cells"), *summary])


if __name__ == "__main__":
    main()
