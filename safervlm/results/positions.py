"""Perception with rotated options: accuracy beyond chance, and the effect of the right option's position."""

from typing import Any

import numpy as np
import pandas as pd

from safervlm.protocol import OPTIONS
from safervlm.results.measures import THESE_CONCEPTS, Counts, counted_only, proportion
from safervlm.statistics.positions import beyond_chance, positions

BEYOND_CHANCE = "accuracy beyond chance"
RIGHT_IN_ALL = "right in every order"
RECALL = "accuracy by position of the right option"
CHOSEN = "share of answers by position"
POSITION_BIAS = "position bias (SD over positions)"
BY_CHANCE = "position bias by chance"


def position_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Computes the effect of the options' order on perception.

    N/A counts as wrong; responses with unfinished thinking are excluded.

    Args:
        frame: Result of :func:`~safervlm.results.runs.load_run` with ``variants``.

    Returns:
        One row per number: measure, position (a letter, or empty), value, low, high, n (responses, or images for
        ``right in every order``). No rows unless perception was asked in several orders.
    """
    columns = ["measure", "position", "value", "low", "high", "n"]
    asked = counted_only(frame[frame["capability"] == "perception"])
    if asked["prompt_number"].nunique() < 2:
        return pd.DataFrame(columns=columns)
    letters = {letter: number for number, letter in enumerate(OPTIONS)}
    chosen, right = (asked[name].map(letters).fillna(-1).to_numpy(int) for name in ("label", "answer"))
    found = positions(chosen, right, len(OPTIONS))
    rows: list[dict[str, Any]] = [_beyond_chance(asked), _right_in_all(asked)]
    for measure, values in ((RECALL, found.recall), (CHOSEN, found.chosen)):
        for number, letter in enumerate(OPTIONS):
            n = int((right == number).sum()) if measure == RECALL else len(asked)
            rows.append({"measure": measure, "position": letter, "value": float(values[number]), "n": n})
    rows.append({"measure": POSITION_BIAS, "value": found.bias, "n": len(asked)})
    rows.append({"measure": BY_CHANCE, "value": found.bias_by_chance, "n": len(asked)})
    return pd.DataFrame(rows, columns=columns).fillna({"position": ""})


def _beyond_chance(asked: pd.DataFrame) -> dict[str, Any]:
    """Returns the accuracy over all orders, corrected so that guesses have 0; its interval is that of the accuracy."""
    counts = Counts.of(asked)
    accuracy = proportion(counts.right, counts.asked, counts, THESE_CONCEPTS)
    ends = {name: beyond_chance(getattr(accuracy, name), len(OPTIONS)) for name in ("value", "low", "high")}
    return {"measure": BEYOND_CHANCE, **ends, "n": len(asked)}


def _right_in_all(asked: pd.DataFrame) -> dict[str, Any]:
    """Returns the share of images whose right option is chosen in every order, of those asked in all."""
    counts = Counts.of(asked)
    complete = counts.asked == counts.asked.max()
    hits = np.where(counts.right == counts.asked, 1.0, 0.0)
    estimate = proportion(hits, complete.astype(np.float64), counts, THESE_CONCEPTS)
    return {
        "measure": RIGHT_IN_ALL,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": int(complete.sum()),
    }
