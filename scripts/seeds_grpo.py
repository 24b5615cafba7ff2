"""Trains the pictograms of several seeds by PPO and GRPO, or with a budget for over-flagging, and writes docs/seeds.md.

python scripts/seeds_grpo.py [--budget] [--out FOLDER]

Uses the pictograms, base models and judges of ``scripts/seeds.py`` with the same ``--out``, and creates those that are
missing. The runs are in ``FOLDER/seed-0/runs/on-policy`` and so on, one after another, so that their CPU times are
comparable; existing results are reused. The tables are written between markers in docs/seeds.md. The exit code is 1 if
a bound of GRPO is met by less than 2 points, or over-flagging is more than 2 points above the budget.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pages import write_between
from seeds import COLUMNS, MARGIN, PAGE, SEEDS

from safervlm.cli.demo import MEASURE
from safervlm.results.runs import load_run
from safervlm.results.scores import compare, scores

LEAST = 90.0  # accuracy of PPO and GRPO on unsafe and on safe images, in percent; that of the demo
SHORT = ("--trainer.max_epochs", "1")  # a third of the recipe: a policy in training flags more safe images
# The budgets by name of the run; that of ``without`` is never reached, so only the share is logged.
BUDGETS = {"without": 0.99, "with": 0.10, "strict": 0.05}

# Of each run: its recipe and its further arguments.
Recipe = tuple[str, tuple[str, ...]]
OBJECTIVES: dict[str, Recipe] = {"ppo": ("ppo", ()), "grpo": ("grpo", ())}
GUARDED: dict[str, Recipe] = {
    name: ("grpo", (*SHORT, "--model.budget", str(budget))) for name, budget in BUDGETS.items()
}


@dataclass
class Result:
    """A trained run.

    Attributes:
        scores: percentages on the test split, by the columns of :func:`safervlm.results.scores.compare`.
        seconds: CPU time of training (user time of its process), in seconds.
        share: percentage of the latest safe images of the training that were called unsafe, at its end; None without
            a budget, as for the following attributes.
        highest: the highest such percentage during training.
        multiplier: the budget's Lagrange multiplier at the end.
    """

    scores: "pd.Series[float]"
    seconds: float
    share: float | None
    highest: float | None
    multiplier: float | None


def play(place: Path, *arguments: str) -> float:
    """Runs a command of safervlm and returns its CPU time (user time).

    Args:
        place: the working directory.
        arguments: what follows ``safervlm``.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "safervlm", *arguments]
    with (place / "on-policy.log").open("a") as log:
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=place, check=True, stdout=log, stderr=log, env=variables)  # noqa: S603
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def result(place: Path, seed: str, name: str, recipe: str, further: tuple[str, ...]) -> Result:
    """Trains and measures one run; existing results are reused.

    Args:
        place: the folder of the seed.
        seed: the seed of the training and of the responses.
        name: the name of the run.
        recipe: ``ppo`` or ``grpo``.
        further: further arguments of the training.
    """
    run = f"runs/on-policy/{name}"
    timed = place / f"{run}.seconds"
    same = ("--seed_everything", seed, "--run", run)
    if not timed.is_file():
        shutil.rmtree(place / run, ignore_errors=True)  # a resumed training would lack the time before its start
        configs = [f"configs/{recipe}.yaml", f"configs/pictograms/{recipe}.yaml"]
        seconds = play(place, "fit", *(word for config in configs for word in ("--config", config)), *same, *further)
        timed.write_text(f"{seconds}\n")
    play(place, *MEASURE.split(), "--model.vlm.adapter", f"{run}/adapter", *same)
    table = pd.read_csv(place / run / "metrics.csv").groupby("metric")["value"]
    last, most = table.last(), table.max()
    guarded = "train/over_flagging" in last
    return Result(
        scores=100 * compare({name: scores(load_run(place / run))}).loc[name].astype("float64"),
        seconds=float(timed.read_text()),
        share=100 * last["train/over_flagging"] if guarded else None,
        highest=100 * most["train/over_flagging"] if guarded else None,
        multiplier=last["train/budget_multiplier"] if guarded else None,
    )


def results(out: Path, runs: dict[str, Recipe]) -> dict[str, dict[str, Result]]:
    """Trains and measures runs with each seed.

    Args:
        out: the parent folder of the seeds' folders.
        runs: the runs.

    Returns:
        The results by seed and name.
    """
    found: dict[str, dict[str, Result]] = {}
    for seed in SEEDS:
        place = out / f"seed-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        play(place, "pictograms", "--seed", seed)
        found[seed] = {name: result(place, seed, name, *recipe) for name, recipe in runs.items()}
    return found


def row(*cells: str | float | None) -> str:
    """Formats a row of a Markdown table, numbers with one decimal."""
    shown = ("-" if cell is None else cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells)
    return f"| {' | '.join(shown)} |"


def objectives_table(found: dict[str, dict[str, Result]]) -> str:
    """Formats the results of PPO and GRPO.

    Args:
        found: the results by seed and objective.
    """
    columns = COLUMNS | {"over_flagging": "over-flagging"}
    lines = [row("seed", "run", *columns.values(), "CPU time, s"), "|---|---|" + "---:|" * (len(columns) + 1)]
    for seed, runs in found.items():
        for name, each in runs.items():
            lines.append(row(seed, name, *(each.scores[column] for column in columns), each.seconds))
    ratio = sum(runs["grpo"].seconds for runs in found.values()) / sum(runs["ppo"].seconds for runs in found.values())
    return "\n".join([*lines, "", f"CPU time of GRPO, divided by PPO's, over all seeds: {ratio:.2f}."])


def budget_table(found: dict[str, dict[str, Result]]) -> str:
    """Formats the results without and with a budget.

    Args:
        found: the results by seed and by name of :data:`BUDGETS`.
    """
    heads = (
        "seed",
        "budget",
        "over-flagging: highest",
        "end of training",
        "test split",
        "image, unsafe",
        "image, safe",
    )
    lines = [row(*heads, "multiplier", "CPU time, s"), "|---|---|" + "---:|" * 7]
    for seed, runs in found.items():
        for name, each in runs.items():
            budget = "none" if name == "without" else f"{100 * BUDGETS[name]:.0f} %"
            test = (each.scores[column] for column in ("over_flagging", "image_unsafe", "image_safe"))
            lines.append(row(seed, budget, each.highest, each.share, *test, each.multiplier, each.seconds))
    return "\n".join(lines)


def missed(found: dict[str, dict[str, Result]]) -> list[str]:
    """Returns the bounds that are missed, in words.

    Args:
        found: the results by seed and name.
    """
    bounds: list[tuple[str, float, float]] = []  # in words, the value, and the smallest one that is allowed
    for seed, runs in found.items():
        if "grpo" in runs:
            sides = ("image_unsafe", "image_safe")
            bounds += [(f"{seed}: grpo, {side}", runs["grpo"].scores[side], LEAST + MARGIN) for side in sides]
        for name in ("with", "strict") if "with" in runs else ():
            shares = {"end of training": runs[name].share, "test split": runs[name].scores["over_flagging"]}
            least = -100 * BUDGETS[name] - MARGIN
            bounds += [
                (f"{seed}: {name}, minus over-flagging, {place}", -each, least) for place, each in shares.items()
            ]
    return [
        f"{name}: {value:.1f}, at least {least:.1f} is needed" for name, value, least in bounds if not value >= least
    ]


def main() -> int:
    """Trains, measures and writes a table; returns 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", action="store_true", help="GRPO without and with a budget instead of PPO and GRPO")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="parent folder of the seeds' folders")
    given = parser.parse_args()
    found = results(given.out, GUARDED if given.budget else OBJECTIVES)
    name, table = ("budget", budget_table(found)) if given.budget else ("grpo", objectives_table(found))
    write_between(PAGE, name, table)
    print(table)
    words = missed(found)
    for line in words:
        print(line, file=sys.stderr)
    return int(bool(words))


if __name__ == "__main__":
    sys.exit(main())
