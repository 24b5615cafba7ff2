"""What may make the numbers of measurements wrong, or not comparable."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from safervlm.errors import ArgumentError
from safervlm.records import Failure, read_records
from safervlm.reports.runs import Run
from safervlm.reports.tables import NAMED, listed
from safervlm.results.common import FEWEST_IN_COMMON, common_questions
from safervlm.results.measures import COLUMNS, DIVERSITY, SHOWN
from safervlm.results.scores import overall, unfinished_in
from safervlm.run_folder import RunFolder
from safervlm.statistics.diversity import TEXTS, TOO_FEW
from safervlm.vlm.adapters import adapter_fingerprint
from safervlm.vlm.thinking import MANY, many_unfinished


def warnings(runs: Sequence[Run]) -> list[str]:
    """Lists what may make the runs' numbers wrong or not comparable: a sentence per kind, on all runs with it.

    Args:
        runs: The runs; the first is the baseline.
    """
    first, *others = runs
    said = of_questions([(run.name, run.frame) for run in others], (first.name, first.frame))
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


def of_questions(runs: Sequence[tuple[str, pd.DataFrame]], first: tuple[str, pd.DataFrame]) -> list[str]:
    """States which runs are not, or only in part, compared with the first one.

    Args:
        runs: Name of each other run, and its responses, of :func:`safervlm.results.runs.load_run`.
        first: The same of the first run.
    """
    reworded, rejudged, left_out = [], [], {}
    for name, frame in runs:
        found = [common_questions((frame, first[1]), column) for column in SHOWN]
        if any(not each.suffice for each in found if each.left_out):
            reworded.append(name)
        if any(each.suffice and not each.same_judges for each in found):
            rejudged.append(name)
        if apart := {question for each in found if each.comparable for question in each.left_out}:
            left_out[name] = len(apart)
    share = f"fewer than {100 * FEWEST_IN_COMMON:g} %"
    said = _about(
        reworded, f"asked other questions than {first[0]}: where {share} are in common, no difference is shown"
    )
    said += _about(rejudged, f"classified by another judge than {first[0]}: no difference is shown there")
    if left_out:
        parts = ", ".join(f"{number} ({name})" for name, number in left_out.items())
        said.append(f"Differences from {first[0]} are over the questions that both runs answered; left out: {parts}.")
    return said


def several_judges(frames: Mapping[str, pd.DataFrame], within: Sequence[str] = ("capability",)) -> list[str]:
    """States which runs have verdicts of several judges on questions of one kind; empty if none has.

    Args:
        frames: Name of each run -> its responses, of :func:`safervlm.results.runs.load_run`.
        within: Columns that define a kind of question.
    """
    mixed = [
        name
        for name, frame in frames.items()
        if frame[frame["judge"] != ""].groupby([*within])["judge"].nunique().gt(1).any()
    ]
    return _about(mixed, f"classified by several judges within a {within[-1]}, whose errors may differ")


def of_groups(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """States which groups have copies of one run, or runs that differ in more than their training seed.

    Args:
        groups: Name of each group -> its runs.
    """
    said = []
    for name, members in groups.items():
        texts = [tuple(sorted(zip(run.frame["id"], run.frame["response"], strict=True))) for run in members]
        if len(set(texts)) < len(members):
            said.append(f"The group {name} has runs with the same responses: they are not different training seeds.")
        if differing := _differing(members):
            shown = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
            said.append(f"The runs of the group {name} differ in more than their training seed: {shown}.")
    return said


def _differing(members: Sequence[Run]) -> list[str]:
    """Returns the settings of the runs' models and trainers that differ, apart from seeds and trained weights."""
    stages = sorted(set.union(*({*run.manifest} for run in members)))
    settings = [
        {
            f"{stage}.{key.removeprefix('settings.')}": value
            for stage in stages
            for key, value in run.manifest.get(stage, {}).items()
            if key.startswith(("settings.model.", "settings.trainer."))
            and not key.endswith((".seed", ".adapter.folder", ".adapter.sha256"))
        }
        for run in members
    ]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({each.get(key) for each in settings}) > 1]


def retrained(runs: Iterable[tuple[str, Path, Mapping[str, Mapping[str, str]]]]) -> list[str]:
    """States which runs were measured without the adapter in their folder, or before it was trained further.

    Args:
        runs: Name, folder and manifest (:func:`safervlm.reports.runs.read_summary`) of each measurement or evaluation.
    """
    changed, without = [], []
    for name, folder, manifest in runs:
        measured = manifest.get("measure", {})
        # An evaluation is inside the folder of its run. A run that was renamed may have another run's old name.
        own = folder.resolve().parent if folder.name == RunFolder(folder).evaluation.name else folder.resolve()
        adapter, named = RunFolder(own).adapter, Path(measured.get("settings.model.vlm.adapter.folder", ""))
        if measured.get("settings.model.vlm.adapter") == "null" and adapter.is_dir():
            without.append(name)
        if named.parts[-2:] == adapter.parts[-2:] and adapter.is_dir():
            with suppress(ArgumentError):  # without weights nothing was trained on
                if adapter_fingerprint(str(adapter)) != measured.get("settings.model.vlm.adapter.sha256"):
                    changed.append(name)
    said = _about(changed, "measured before the adapter in the same folder was trained on; measure again elsewhere")
    return said + _about(without, "measured without the adapter in the same folder; give --model.vlm.adapter")


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
    """Lists the measures of diversity that are computed from too few texts to be compared, one sentence each.

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
    """A sentence on runs, in which the names of more than a few come last; an empty list without runs."""
    if not names:
        return []
    if len(names) <= NAMED:
        return [f"{listed(names)} {'was' if len(names) == 1 else 'were'} {what}."]
    return [f"{len(names)} runs were {what} ({', '.join(names)})."]


def missing(run: Run) -> int:
    """Returns the number of questions that are listed as unanswered or not judgeable and have not been answered since.

    Args:
        run: The run.
    """
    files = [file for file in (RunFolder(run.folder).failed, RunFolder(run.folder).unjudged) if file.is_file()]
    return len({each.id for file in files for each in read_records(file, Failure)} - {*run.frame["id"]})
