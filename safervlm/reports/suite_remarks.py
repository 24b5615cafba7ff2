"""Remarks that a reader needs to interpret the numbers of evaluations, one sentence each."""

from collections.abc import Sequence

import pandas as pd

from safervlm.reports.comparable import retrained, several_judges, unfinished_thinking
from safervlm.reports.suite_tables import Summary
from safervlm.reports.tables import NAMED, listed, records
from safervlm.results.mme import ALL_TASKS
from safervlm.results.scores import unfinished_in
from safervlm.results.suite import Evaluation
from safervlm.results.suite_columns import Column
from safervlm.results.suite_estimates import NOT_MEASURED
from safervlm.statistics.diversity import NO_INTERVAL, TEXTS, TOO_FEW

OFTEN = 0.1  # share of N/A from which a remark reports it; the page reports every share


def suite_warnings(
    long: pd.DataFrame, evaluations: Sequence[Evaluation], manifests: Sequence[tuple[str, Summary]]
) -> list[str]:
    """Lists what may make the numbers wrong: one sentence per kind, about all runs that it concerns.

    The kinds are unfinished evaluations, other base models, several judges, unfinished thinking and missing responses.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        evaluations: The runs.
        manifests: Name and manifest of each run.
    """
    at_work = [
        name for name, summary in manifests if summary.get("measure", {}).get("finished", "true").lower() == "false"
    ]
    said = [f"{listed(at_work)}: the evaluation isn't finished; the same command resumes"] if at_work else []
    said += other_models(manifests)
    folders = {each.name: each.folder for each in evaluations}
    said += retrained((name, folders[name], summary) for name, summary in manifests)
    said += several_judges({each.name: each.answers for each in evaluations}, ("capability", "dataset"))
    every = {each.name: pd.concat([each.answers, each.unfinished]) for each in evaluations}
    said += unfinished_thinking({name: (unfinished_in(frame), len(frame)) for name, frame in every.items()})
    return said + missing_responses(long, evaluations)


def suite_remarks(
    long: pd.DataFrame, differences: pd.DataFrame, evaluations: Sequence[Evaluation], wanted: Sequence[Column]
) -> list[str]:
    """Lists further remarks on the numbers, in a sentence each.

    They state the share of N/A, unexpected reasons why an interval or a difference is missing, and self-BLEU of few
    texts.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`; may be empty.
        evaluations: The runs.
        wanted: The columns.
    """
    said = []
    table = long[~long["detail"]].drop_duplicates(["run", "column"])
    # Only columns over a whole dataset: the share of N/A is similar in its parts.
    shares = {c.key for c in wanted if not c.side and (c.measure == "share" or len(c.tasks) == len(ALL_TASKS))}
    for each in evaluations:
        mine = table[table["run"] == each.name]
        often = mine[mine["column"].isin(shares) & (mine["na_rate"] >= OFTEN)]
        if len(often):
            parts = [f"{100 * row['na_rate']:.0f} % of {row['heading']}" for row in records(often)]
            said.append(f"{each.name}: N/A, which counts as wrong, is {'; '.join(parts)}")
    plain = table["method"].str.startswith(NO_INTERVAL) | (table["method"] == NOT_MEASURED)
    bare = table[table["method"].str.startswith("none: ") & ~plain]
    for (run, method), part in bare.groupby(["run", "method"], sort=False):
        said.append(f"{run}: no interval, {str(method).removeprefix('none: ')}: {'; '.join(part['heading'])}")
    if len(differences):
        excluded = differences[differences["difference"].isna() & ~differences["detail"]]
        said += [
            f"{run}: no difference, {str(method).removeprefix('none: ')}: {'; '.join(part['heading'])}"
            for (run, method), part in excluded.groupby(["run", "method"], sort=False)
        ]
    few = long[~long["detail"] & (long["method"] == TOO_FEW)]
    by_text: dict[str, list[str]] = {}
    for run, rows in few.groupby("run", sort=False):
        text = "; ".join(f"{row['heading']} ({row['n']} texts)" for row in records(rows))
        by_text.setdefault(text, []).append(str(run))
    what = f"of fewer than {TEXTS} texts, more would lower it"
    said += [
        f"{listed(names)}: {what}: {text}" if len(names) <= NAMED else f"{what}: {text} ({', '.join(names)})"
        for text, names in by_text.items()
    ]
    return said


def missing_responses(long: pd.DataFrame, evaluations: Sequence[Evaluation]) -> list[str]:
    """Lists the missing responses and ratings, one sentence for each effect.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        evaluations: The runs.
    """
    table = long[~long["detail"] & (long["missing"] > 0)].drop_duplicates(["run", "column"])
    by_effect: dict[str, list[str]] = {}
    for each in evaluations:
        rated = set(each.ratings["dataset"])
        for row in records(table[table["run"] == each.name]):
            what = "ratings" if row["column"] in rated else "responses"
            effect = f"{what} are missing: they {'count as wrong' if row['unit'] == 'points' else 'are excluded'}"
            effect += "; add a judge to the same command: --config configs/rate.yaml" if row["column"] in rated else ""
            by_effect.setdefault(effect, []).append(f"{each.name}: {row['missing']} of {row['heading']}")
    return [f"{effect} ({'; '.join(parts)})" for effect, parts in by_effect.items()]


def other_models(manifests: Sequence[tuple[str, Summary]]) -> list[str]:
    """States which runs have another base model than the first one; empty if none has.

    Args:
        manifests: Name and manifest of each run; at least one.
    """

    def base(summary: Summary) -> tuple[str | None, ...]:
        measured = summary.get("measure", {})
        name, weights = measured.get("settings.model.vlm.model"), measured.get("settings.model.vlm.weights")
        # Without known weights, as with a server, compare the model's name and revision.
        return (weights,) if weights not in (None, "", "None") else (name, measured.get("settings.model.vlm.revision"))

    (first, original), *others = manifests
    differ = [(name, summary) for name, summary in others if base(summary) != base(original)]
    if not differ:
        return []
    models = "; ".join(map(_model, [*(summary for _, summary in differ), original]))
    names = listed([*(name for name, _ in differ), first])
    return [f"{names} have other base models ({models}): not all of their difference is due to an adapter"]


def _model(summary: Summary) -> str:
    return summary.get("measure", {}).get("settings.model.vlm.model", "unknown")
