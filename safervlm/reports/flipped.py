"""Responses that changed between right and wrong, as cards with blurred images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from safervlm.hashing import seed_for
from safervlm.reports.examples import picture
from safervlm.reports.runs import Run
from safervlm.results.clusters import TEXT_ONLY
from safervlm.results.measures import counted_only
from safervlm.results.scores import changed_answers
from safervlm.results.suite import Evaluation
from safervlm.results.suite_columns import GROUPS, Column
from safervlm.results.suite_differences import flips

FLIPS = 6  # number shown on the page per direction, run and group of questions
# Groups of a measurement: title -> (capability, side; None: all).
MEASURED = {
    "Unsafe images": ("alignment", "unsafe"),
    "Safe images": ("alignment", "safe"),
    "By name": (TEXT_ONLY, None),
    "Perception": ("perception", None),
}
Cards = dict[str, list[dict[str, Any]]]


def flipped_in_run(run: Run, base: Run, out: Path) -> Cards:
    """Selects changed responses of a measurement, by capability and side.

    Args:
        run: The run.
        base: The run that it is compared with.
        out: The page's file, from which images are linked.

    Returns:
        Title -> cards for the template, each with the question, its image and both responses.
    """
    changed = changed_answers(counted_only(run.frame), counted_only(base.frame))
    tables = {
        title: changed[(changed["capability"] == capability) & (changed["side"].eq(side) if side else True)]
        for title, (capability, side) in MEASURED.items()
    }
    return _cards(tables, (base.name, run.name), base.folder, out)


def flipped_in_suite(
    each: Evaluation, original: Evaluation, wanted: list[Column], out: Path, without_alignment: bool = False
) -> Cards:
    """Selects changed responses of an evaluation, by group of datasets.

    Args:
        each: The model.
        original: The model that it is compared with.
        wanted: The columns.
        out: The page's file, from which images are linked.
        without_alignment: Whether the questions of alignment are excluded, which are also those of a measurement.

    Returns:
        See :func:`flipped_in_run`.
    """
    tables = {}
    for group in GROUPS[2:] if without_alignment else GROUPS:
        columns = [c for c in wanted if c.group == group and c.measure in ("share", "occurs", "mme")]
        if columns:
            tables[group] = pd.concat([flips(each, original, column) for column in columns]).drop_duplicates("id")
    return _cards(tables, (original.name, each.name), original.folder, out)


def _cards(tables: Mapping[str, pd.DataFrame], names: tuple[str, str], folder: Path, out: Path) -> Cards:
    """Makes cards of at most :data:`FLIPS` responses per direction; the selection depends only on question ids."""
    shown: Cards = {}
    for group, table in tables.items():
        for improved, direction in ((True, "now correct"), (False, "now wrong")):
            some = table[table["improved"] == improved].set_index("id", drop=False)
            chosen = sorted(some.index, key=lambda name: seed_for("flipped", name))[:FLIPS]
            if chosen:
                title = f"{group}: {direction}, {len(some)} responses"
                shown[title] = [_card(some.loc[name], names, folder, out) for name in chosen]
    return shown


def _card(row: "pd.Series[Any]", names: tuple[str, str], folder: Path, out: Path) -> dict[str, Any]:
    path = row["image_path"]
    answers = [
        {
            "run": name,
            "colour": colour,
            "response": row[f"response{suffix}"],
            "label": row[f"label{suffix}"],
            "probability": None,
            "right": row[f"label{suffix}"] == row["answer"],
        }
        for colour, (name, suffix) in enumerate(zip(names, ("_before", ""), strict=True))
    ]
    question = {str(key): value for key, value in row.items()}
    return question | {"picture": picture(path, row["id"], out, folder) if path else None, "answers": answers}
