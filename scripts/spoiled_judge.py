"""Shows that labels of people correct for a bad judge, on two measured runs with deliberately wrong verdicts.

    python scripts/spoiled_judge.py BASE ALIGNED [--draws 100] [--labels 100]

BASE and ALIGNED are run folders of a measurement before and after alignment, such as ``runs/demo/original`` and
``runs/demo/ppo``; they are read, not changed. In each draw a random share of the verdicts is replaced by another label:
15 % of BASE's, 30 % of ALIGNED's, so that the judge is worse after alignment. The judge's probabilities are exchanged
with the labels, so it is as sure of its errors as of the rest. The unspoiled judge stands in for the person, who labels
a sample of each run.

Prints a Markdown table: for each rate, and for the differences, the unspoiled value, the range of the spoiled judge's
values, and the number of draws in which its plain interval over new concepts, and the corrected intervals (for this run
and over new concepts), contain the unspoiled value, of those that have an interval. The exit code is 1 if a corrected
interval for this run contains it in fewer than 90 % of the draws.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from safervlm.labelling.plan import Plan, labelable
from safervlm.protocol import LABELS
from safervlm.results.common import sums_by_concept
from safervlm.results.corrected import GAP, RATES, LabelledRun, corrected, corrected_differences
from safervlm.results.measures import COLUMNS, modality_gap
from safervlm.results.runs import load_run
from safervlm.statistics.intervals import interval_new_concepts

SPOILED = (0.15, 0.30)  # shares of the verdicts before and after alignment
LEAST = 0.9
ENDS = ("low_run", "high_run", "low_new", "high_new")


def spoiled(rows: pd.DataFrame, share: float, rng: np.random.Generator) -> pd.DataFrame:
    """Replaces verdicts by another label of the same capability, sampled at random.

    Args:
        rows: of :func:`~safervlm.labelling.plan.labelable`.
        share: share of the verdicts to replace.
        rng: random generator.
    """
    rows = rows.copy()
    labels, probabilities = rows["label"].tolist(), rows["probabilities"].tolist()
    for place in np.flatnonzero(rng.random(len(rows)) < share):
        old = labels[place]
        # N/A is rare, and a judge seldom classifies an answer as N/A.
        others = [label for label in LABELS[rows["capability"].iloc[place]] if label not in (old, "N/A")]
        new = str(rng.choice(others))
        labels[place] = new
        exchanged = {old: new, new: old}
        probabilities[place] = {exchanged.get(name, name): value for name, value in probabilities[place].items()}
    return rows.assign(label=labels, probabilities=probabilities)


def rates_of(rows: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Returns each rate as the tables show it without labels: value, lower and upper end over new concepts.

    Args:
        rows: of :func:`~safervlm.labelling.plan.labelable`.
    """
    gap = modality_gap(rows)
    found = {GAP: (gap.value, gap.low, gap.high)}
    for rate in RATES:
        if rate in COLUMNS and rate != GAP:
            sums = sums_by_concept([rows], rate)
            if len(sums.answers):
                right = sums.hits[0]
                ends = interval_new_concepts(right, sums.answers, categories=sums.strata) or (np.nan, np.nan)
                found[rate] = float(right.sum() / sums.answers.sum()), *ends
    return found


def count(inside: npt.NDArray[np.float64]) -> str:
    """Returns in how many draws an interval contains the value, and of how many if not all have an interval.

    Args:
        inside: (draws,) 1 if it contains the value, else 0; NaN if there is no interval.
    """
    there = inside[~np.isnan(inside)]
    text = f"{there.sum():.0f}" if len(there) == len(inside) else f"{there.sum():.0f} of {len(there)}"
    return text if len(there) else "-"


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        args: words of the command line; None for those of ``sys.argv``.

    Raises:
        SystemExit: a corrected interval contains the unspoiled value too seldom.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="the run before, and the one after alignment")
    parser.add_argument("--draws", type=int, default=100, help="how often verdicts are spoiled (default: 100)")
    parser.add_argument("--labels", type=int, default=100, help="labels per run (default: 100)")
    given = parser.parse_args(args)
    frames = [labelable(load_run(run)) for run in given.runs]
    true = [rates_of(frame) for frame in frames]
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    truths = {
        (name, rate): values[rate][0] for name, values in zip(("before", "after"), true, strict=True) for rate in values
    }
    truths |= {("difference", rate): true[1][rate][0] - true[0][rate][0] for rate in true[1] if rate in true[0]}
    for draw in range(given.draws):
        labelled = []
        plain: dict[tuple[str, str], tuple[float, float]] = {}
        for name, frame, share in zip(("before", "after"), frames, SPOILED, strict=True):
            rows = spoiled(frame, share, np.random.default_rng((draw, len(labelled))))
            plan = Plan.make(rows, given.labels, seed=draw)
            people = dict(zip(frame["id"], frame["label"], strict=True))
            labelled.append(LabelledRun.of(rows, {each: people[each] for each in plan.sampled}))
            plain |= {(name, rate): (low, high) for rate, (_, low, high) in rates_of(rows).items()}
        tables = {
            "before": corrected(labelled[0]),
            "after": corrected(labelled[1]),
            "difference": corrected_differences(labelled[1], labelled[0]),
        }
        for name, table in tables.items():
            for rate, row in table.set_index("rate")[["value", *ENDS]].astype(float).iterrows():
                key = name, str(rate)
                if key in truths:
                    ends = [
                        plain.get(key, (np.nan, np.nan)),
                        *zip(row[list(ENDS[::2])], row[list(ENDS[1::2])], strict=True),
                    ]
                    inside = [np.nan if np.isnan(low) else float(low <= truths[key] <= high) for low, high in ends]
                    found.setdefault(key, []).append((row["value"], *inside))
    shares = ", then ".join(f"{100 * share:g} %" for share in SPOILED)
    print(f"{given.draws} draws, {given.labels} labels per run; spoiled verdicts: {shares}.\n")
    print("| | rate | unspoiled | spoiled judge | plain interval | corrected, this run | corrected, new concepts |")
    print("|---|---|---|---|---|---|---|")
    seldom = 0
    for (name, rate), draws in found.items():
        values, plains, this_run, new = (np.array(column) for column in zip(*draws, strict=True))
        counted = [count(each) for each in (plains, this_run, new)]
        print(
            f"| {name} | {RATES[rate][0]} | {100 * truths[name, rate]:.1f} | {100 * values.min():.1f} to "
            f"{100 * values.max():.1f} | {' | '.join(counted)} |"
        )
        seldom += this_run.mean() < LEAST
    if seldom:
        sys.exit(1)


if __name__ == "__main__":
    main()
