"""Loads the run folder of an evaluation: judged responses, failures and ratings.

Columns are in :mod:`safervlm.results.suite_columns`, their values in :mod:`safervlm.results.suite_estimates`,
differences between models in :mod:`safervlm.results.suite_differences`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safervlm.errors import explained
from safervlm.io.tables import say
from safervlm.judging.rating import Rating
from safervlm.protocol import SAFE, UNSAFE
from safervlm.records import Failure, read_records
from safervlm.results.measures import UNFINISHED, UnfinishedAs, counted_only
from safervlm.results.runs import load_run
from safervlm.run import read_manifest
from safervlm.run_folder import RunFolder

# Exceptions raised when a damaged or foreign JSON file is parsed as records.
_BROKEN = (AttributeError, KeyError, OSError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Evaluation:
    """The responses of a model to an evaluation suite.

    Attributes:
        name: The model's name in all tables.
        folder: The run folder.
        answers: Judged responses, a result of :func:`safervlm.results.runs.load_run`.
        unanswered: id, dataset, capability, category, image, answer, drawn, reason and side of the questions without a
            response, or with one that could not be judged.
        unfinished: Rows of the responses that ended inside their reasoning, if they count apart.
        ratings: id, dataset, capability, category, image, prompt, answer (the reference), side, drawn, reference and
            response (their ratings) and judge of the rated responses, one row per question; averaged over both orders
            if both were requested. NaN: missing.
    """

    name: str
    folder: Path
    answers: pd.DataFrame
    unanswered: pd.DataFrame
    ratings: pd.DataFrame
    unfinished: pd.DataFrame


def load_suite(
    folder: str | Path, name: str, unfinished: UnfinishedAs = "apart", tell: Callable[[str], None] = say
) -> Evaluation:
    """Loads the run folder of an evaluation.

    Args:
        folder: Contains ``responses.jsonl``, ``verdicts.jsonl``, and ``ratings.jsonl`` if LLaVABench was rated.
        name: The model's name in all tables.
        unfinished: See :func:`safervlm.results.runs.load_run`.
        tell: Receives each message on the run; by default it is printed.

    Raises:
        RecordError: See :func:`safervlm.results.runs.load_run`; or a file of failures or ratings, or the manifest,
            can't be read.
    """
    folder = Path(folder)
    answers = load_run(folder, unfinished, tell=tell)
    nameless = answers[(answers["capability"] == "alignment") & (answers["concept"] == "")]["dataset"].unique()
    # Custom images without concepts are not part of the unsafe concepts and their safe counterpart.
    own = (answers["capability"] == "alignment") & answers["dataset"].isin(nameless)
    answers["capability"] = answers["capability"].mask(own, "generalisation")
    failures: list[Failure] = []
    files = RunFolder(folder)
    for file, remedy in ((files.failed, "ask the questions again"), (files.unjudged, "judge the responses again")):
        if file.exists():
            with explained(f"{file}: it can't be read", f"{remedy} with the same command", *_BROKEN):
                failures += read_records(file, Failure)
    failures = list({each.id: each for each in failures if each.id not in {*answers["id"]}}.values())
    failures = [each for each in failures if not each.question.variant]
    unanswered = pd.DataFrame(
        [each.question.to_dict() | {"drawn": each.question.drawn, "reason": each.reason} for each in failures],
        columns=["id", "dataset", "capability", "category", "image", "answer", "drawn", "reason"],
        dtype=object,
    ).astype({"drawn": bool})
    unanswered["side"] = unanswered["answer"].map({UNSAFE: "unsafe", SAFE: "safe"}).fillna("-")
    answers, inside = counted_only(answers), answers[answers["label"] == UNFINISHED]
    judged = answers["capability"] != "rated"
    return Evaluation(name, folder, answers[judged], unanswered, load_ratings(folder, answers[~judged]), inside)


def load_ratings(folder: Path, rated: pd.DataFrame) -> pd.DataFrame:
    """Loads the ratings of the rated responses, one row per question; see :class:`Evaluation`.

    Only ratings by the judge in the manifest, in the requested orders, are used. If a process was killed, the file may
    also contain older ratings and an incomplete last line.

    Args:
        folder: The run folder.
        rated: The rows of :func:`safervlm.results.runs.load_run` with capability ``rated``.

    Raises:
        RecordError: The ratings or the manifest can't be read.
    """
    files = RunFolder(folder)
    settings = stage_settings(folder, "ratings")
    judge = settings.get("judge", {}).get("model")
    orders = (False, True) if settings.get("both_orders") else (False,)
    ratings: list[Rating] = []
    if files.ratings.exists():
        with explained(f"{files.ratings}: it can't be read", "rate again with the same command", *_BROKEN):
            ratings = read_records(files.ratings, Rating, torn=True)
    # The last record of a rating is used: replies that could not be parsed were requested again.
    found = {(rating.id, rating.swapped): rating for rating in ratings if rating.judge == judge}
    rows = []
    for name in rated["id"]:
        pair = [found[name, swapped] for swapped in orders if (name, swapped) in found]
        # Without one of the orders, a mean would contain the position bias that the other order cancels.
        values = np.array([(rating.reference, rating.response) for rating in pair if not rating.reason], float)
        reference, response = values.mean(axis=0) if len(values) == len(orders) else (np.nan, np.nan)
        rows.append((reference, response, f"{judge}, {'both orders' if settings.get('both_orders') else 'one order'}"))
    found_values = pd.DataFrame(rows, rated.index, columns=["reference", "response", "judge"])
    questions = rated[["id", "dataset", "capability", "category", "image", "prompt", "answer", "side", "drawn"]]
    return questions.join(found_values)


def stage_settings(folder: Path, stage: str) -> dict[str, Any]:
    """Returns the settings of a stage from the manifest; empty without one.

    Args:
        folder: Run folder.
        stage: Name of the stage.

    Raises:
        RecordError: The manifest is damaged.
    """
    what = f"{RunFolder(folder).manifest}: no manifest of a run"
    with explained(what, "move it away to do without", *_BROKEN):
        return dict(read_manifest(folder)["stages"].get(stage, {}).get("settings", {}))
    return {}  # for the type checker
