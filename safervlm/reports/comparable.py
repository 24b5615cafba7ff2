"""Which numbers of two measurements may be subtracted, and why others may not."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from safervlm.errors import ArgumentError
from safervlm.records import Failure, read_records
from safervlm.reports.runs import Run
from safervlm.reports.tables import NAMED, listed
from safervlm.results.measures import COLUMNS, DIVERSITY, asked, judges
from safervlm.results.scores import overall, unfinished_in
from safervlm.run_folder import RunFolder
from safervlm.statistics.diversity import TEXTS, TOO_FEW
from safervlm.vlm.adapters import adapter_fingerprint
from safervlm.vlm.thinking import MANY, many_unfinished


def comparable(frame: pd.DataFrame, base: pd.DataFrame, column: str) -> bool:
    """Returns whether two runs may be subtracted: the same questions and, except for diversity, the same judges.

    Args:
        frame: The run, a result of :func:`safervlm.results.runs.load_run`.
        base: The run that is subtracted.
        column: A key of :data:`COLUMNS`.
    """
    if asked(frame, column) != asked(base, column):
        return False
    return COLUMNS[column][1] == DIVERSITY or judges(frame, column) == judges(base, column)


def warnings(runs: Sequence[Run]) -> list[str]:
    """Lists what may make the runs' numbers wrong or not comparable: a sentence on each kind, about all its runs.

    Args:
        runs: The runs; the first is the baseline.
    """
    first, *others = runs
    reworded = [run.name for run in others if asked(run.frame) != asked(first.frame)]
    said = _about(reworded, f"asked other questions than {first.name}: where they differ, no difference is shown")
    rejudged = [
        run.name
        for run in others
        if any(
            asked(run.frame, column) == asked(first.frame, column)
            and judges(run.frame, column) != judges(first.frame, column)
            for column in COLUMNS
        )
    ]
    said += _about(rejudged, f"classified by another judge than {first.name}: no difference is shown there")
    said += several_judges({run.name: run.frame for run in runs})
    said += unfinished_thinking({run.name: (unfinished_in(run.frame), len(run.frame)) for run in runs})
    said += retrained((run.name, run.folder, run.manifest) for run in runs)
    lost = {run.name: number for run in runs if (number := missing(run))}
    if len(lost) == 1:
        ((name, number),) = lost.items()
        said.append(f"{name} has no response, or no verdict on it, to {number} more questions, which are excluded.")
    elif lost:
        parts = ", ".join(f"{number} of {name}" for name, number in lost.items())
        said.append(f"Questions without a response, or without a verdict on it, are excluded: {parts}.")
    return said


def several_judges(frames: Mapping[str, pd.DataFrame], within: Sequence[str] = ("capability",)) -> list[str]:
    """States which runs have verdicts of several judges on questions of one kind; empty if none has.

    Args:
        frames: Name of each run -> its responses, of :func:`safervlm.results.runs.load_run`.
        within: Columns that make a kind.
    """
    mixed = [
        name
        for name, frame in frames.items()
        if frame[frame["judge"] != ""].groupby([*within])["judge"].nunique().gt(1).any()
    ]
    return _about(mixed, f"classified by several judges within a {within[-1]}, whose errors may differ")


def retrained(runs: Iterable[tuple[str, Path, Mapping[str, Mapping[str, str]]]]) -> list[str]:
    """States which runs were measured with an adapter that was trained on since; empty if there is none.

    Args:
        runs: Name, folder and manifest (:func:`safervlm.reports.runs.read_summary`) of each measurement or evaluation.
    """
    changed = []
    for name, folder, manifest in runs:
        measured = manifest.get("measure", {})
        # An evaluation is inside the folder of its run. A run that was renamed may have another run's old name.
        own = folder.resolve().parent if folder.name == RunFolder(folder).evaluation.name else folder.resolve()
        adapter, named = RunFolder(own).adapter, Path(measured.get("settings.model.vlm.adapter.folder", ""))
        if named.parts[-2:] == adapter.parts[-2:] and adapter.is_dir():
            with suppress(ArgumentError):  # without weights nothing was trained on
                if adapter_fingerprint(str(adapter)) != measured.get("settings.model.vlm.adapter.sha256"):
                    changed.append(name)
    return _about(changed, "measured before the adapter in the same folder was trained on; measure again elsewhere")


def unfinished_thinking(counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """States in which runs many responses ended inside their reasoning; empty if there are none.

    Args:
        counts: Name of each run -> number of these responses, and of all.
    """
    many = {name: line for name, numbers in counts.items() if (line := many_unfinished(name, *numbers))}
    if len(many) < 2:
        return list(many.values())
    parts = ", ".join(f"{name} {counts[name][0]} of {counts[name][1]}" for name in many)
    return [
        f"thinking unfinished in more than {100 * MANY:g} % of the responses, which have no answer; increase "
        f"sampling.max_new_tokens ({parts})"
    ]


def few_texts(runs: Sequence[Run]) -> list[str]:
    """Lists the measures of diversity that are of too few texts to be compared, in a sentence each.

    Args:
        runs: The runs.
    """
    said = []
    for column, (heading, measure, _, _) in COLUMNS.items():
        rows = [(run.name, overall(run.scores, column)) for run in runs] if measure == DIVERSITY else []
        texts = {name: row["n"] for name, row in rows if row is not None}
        few = {name: row["n"] for name, row in rows if row is not None and row["method"] == TOO_FEW}
        if few and len({*texts.values()}) == 1:
            number = texts.popitem()[1]
            said.append(
                f"{heading} is computed from {number} texts: that of {TEXTS} texts, as in larger runs, would be lower."
            )
        elif few:
            named = ", ".join(f"{name} ({number} texts)" for name, number in few.items())
            said.append(f"{heading} is computed from fewer than {TEXTS} texts in {named}: more texts would lower it.")
    return said


def _about(names: Sequence[str], what: str) -> list[str]:
    """A sentence on runs, in which the names of more than a few come last; none without runs."""
    if not names:
        return []
    if len(names) <= NAMED:
        return [f"{listed(names)} {'was' if len(names) == 1 else 'were'} {what}."]
    return [f"{len(names)} runs were {what} ({', '.join(names)})."]


def missing(run: Run) -> int:
    """Returns the number of questions that are listed as unanswered or not judgeable and not answered since.

    Args:
        run: The run.
    """
    files = [file for file in (RunFolder(run.folder).failed, RunFolder(run.folder).unjudged) if file.is_file()]
    return len({each.id for file in files for each in read_records(file, Failure)} - {*run.frame["id"]})
