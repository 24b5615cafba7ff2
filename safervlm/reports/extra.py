"""Tables that a report has only if the runs allow them: training seeds, repeated questions, rotated options."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD

from safervlm.errors import ArgumentError
from safervlm.io.tables import TextTable
from safervlm.protocol import REVERSED
from safervlm.reports.findings import OVER_FLAGGED, UNSAFE
from safervlm.reports.runs import Run
from safervlm.reports.tables import percent, records, shortened, signed, with_interval
from safervlm.results.common import FEWEST_IN_COMMON, common_questions
from safervlm.results.groups import group_differences, group_table
from safervlm.results.measures import BOTH, COLUMNS, OVERALL, THESE_CONCEPTS
from safervlm.results.operating import ACQUIESCENCE, AUPRC, AUROC, BOUND, GAP, MASS, OF_ANSWERS, OF_ODDS, RATES
from safervlm.results.positions import position_table
from safervlm.results.repeats import VARIANCE, WRONG_AT_LEAST_ONCE, repeat_table
from safervlm.results.scores import unfinished_in
from safervlm.statistics.curves import AT_CHOSEN_THRESHOLDS, BY_BOOTSTRAP, OBUCHOWSKI
from safervlm.statistics.intervals import coverage
from safervlm.statistics.seeds import DIFFERENCE, FEWEST_SEEDS, MEAN, OVER_SEEDS

SEEDS_NOTE = "An interval of one trained run does not include the variation between training seeds (--group)."


@dataclass(frozen=True)
class ExtraTable:
    """A table of a report.

    Attributes:
        name: Ending of its CSV file, name of its sheet, and its id on the page.
        title: Heading.
        note: Explanation of the numbers.
        headings: Headings of the columns.
        rows: The cells as texts; the first of a row is its header.
        numbers: The table for CSV and XLSX.
    """

    name: str
    title: str
    note: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: pd.DataFrame

    def for_terminal(self) -> TextTable:
        """Returns the table for the terminal."""
        printed = TextTable(title=self.title, caption=self.note, box=SIMPLE_HEAD)
        for heading in self.headings:
            printed.add_column(heading)
        for row in self.rows:
            printed.add_row(*row)
        return printed


FEW_ROWS = (24, 12, 6, 4)  # of the shorter versions of a table on the terminal
CURVE_MEASURES = {
    AUROC: "AUROC",
    AUPRC: "AUPRC at prevalence {:g}",
    **{name: f"TPR at FPR {100 * fpr:g} %" for name, fpr in RATES.items()},
    OF_ODDS: "TPR - FPR, log-odds",
    OF_ANSWERS: "TPR - FPR, answers",
    GAP: "knowledge-behaviour gap",
    MASS: "median probability of Yes or No",
    BOUND: "log-odds that are a bound",
    ACQUIESCENCE: "yes to the first question and to its opposite",
}
# Method of a curve's interval -> the measures for which its simulated coverage is stated.
SIMULATED = {OBUCHOWSKI: "AUROC", BY_BOOTSTRAP: "AUPRC and TPR", AT_CHOSEN_THRESHOLDS: "knowledge-behaviour gap"}
LEFT_OUT_NOTE, UNFINISHED_NOTE = "Left out, as not all runs answered them:", "Thinking unfinished:"
IN_HEADLINE = (UNSAFE, OVER_FLAGGED)  # measures of groups that the headline states
OF_GROUPS = ("groups", "group_differences")
# Names of all tables, to find the files of an earlier report.
NAMES = ("operating", *OF_GROUPS, "repeats", "positions")


def named_groups(words: Sequence[str]) -> dict[str, list[Path]]:
    """Parses groups of runs.

    Args:
        words: Each ``NAME=PATTERN``, where the pattern is that of run folders, such as ``ppo=runs/ppo-*``.

    Returns:
        Name -> run folders, sorted.

    Raises:
        ArgumentError: A word has no name or pattern, a name occurs twice, or no folder matches a pattern.
    """
    groups: dict[str, list[Path]] = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if not name.strip() or not equals or not pattern:
            raise ArgumentError(f"group: needs NAME=PATTERN, such as 'ppo=runs/ppo-*', got {word!r}")
        if name in groups:
            raise ArgumentError(f"group: {name!r} is named twice; give one of the groups another name")
        groups[name] = sorted(path for path in map(Path, glob.glob(pattern)) if path.is_dir())  # noqa: PTH207 (absolute, too)
        if not groups[name]:
            raise ArgumentError(f"group: no run folder is called {pattern!r}; quote the pattern")
    return groups


def extra_tables(
    runs: Sequence[Run], groups: Mapping[str, Sequence[Run]], curves: Mapping[str, pd.DataFrame]
) -> list[ExtraTable]:
    """Returns the tables that the runs allow.

    Args:
        runs: The runs of the report; the first is the baseline.
        groups: Name -> runs that differ in their training seed only.
        curves: Result of :func:`safervlm.reports.operating.operating_tables`.

    Raises:
        ArgumentError: A group's runs can't be compared, or it has the name of the baseline.
    """
    tables = [_of_curves(curves), *_of_groups(runs, groups), _of_repeats(runs), _of_positions(runs)]
    inside = {run.name: unfinished_in(pd.concat([run.frame, run.variants])) for run in runs}
    of_groups = {name: sum(unfinished_in(run.frame) for run in members) for name, members in groups.items()}
    return [
        _with_unfinished(_with_left_out(table), inside if "run" in table.numbers else {**inside, **of_groups})
        for table in tables
        if table is not None and table.rows
    ]


def _with_left_out(table: ExtraTable) -> ExtraTable:
    """Adds the number of questions that a group's measures leave out, as some of the runs did not answer them."""
    if "left_out" not in table.numbers:
        return table
    # Over-flagging is of the same questions as the accuracy on safe images.
    rows = [row for row in records(table.numbers) if row["left_out"] and row["measure"] != OVER_FLAGGED]
    counted = ", ".join(f"{row['group']} {row['left_out']} of {COLUMNS[row['measure']][0]}" for row in rows)
    note = f"{table.note} {LEFT_OUT_NOTE} {counted}." if counted else table.note
    return replace(table, note=note)


def _with_unfinished(table: ExtraTable, inside: Mapping[str, int]) -> ExtraTable:
    """Adds the number of responses that ended inside their reasoning.

    Args:
        table: A table whose rows are about runs or groups.
        inside: Their names, and the number of these responses.
    """
    names = table.numbers["run" if "run" in table.numbers else "group"]
    counted = ", ".join(f"{name} {inside[name]}" for name in names.unique() if inside[name])
    note = f"{table.note} {UNFINISHED_NOTE} {counted}." if counted else table.note
    return replace(table, note=note, numbers=table.numbers.assign(thinking_unfinished=names.map(inside)))


def _of_groups(runs: Sequence[Run], groups: Mapping[str, Sequence[Run]]) -> list[ExtraTable]:
    if not groups:
        return []
    frames = {name: [run.frame for run in members] for name, members in groups.items()}
    table = group_table(frames)
    if apart := [name for name in groups if name not in set(table["group"])]:
        same = any(common_questions(frames[apart[0]], column).suffice for column in COLUMNS)
        few = f"have fewer than {100 * FEWEST_IN_COMMON:g} % of their questions in common"
        raise ArgumentError(
            f"group: the runs of {apart[0]!r} {'were classified by different judges' if same else few}; a group's runs "
            "differ in their training seed only"
        )
    note = (
        "Mean over training seeds, in percent, with a 95 % interval over new concepts and new training seeds; none for "
        f"fewer than {FEWEST_SEEDS} seeds. SD: standard deviation between seeds, in points. Simulated coverage "
        f"{coverage(OVER_SEEDS, MEAN)}."
    )
    rows: list[tuple[str, ...]] = [
        (
            row["group"],
            COLUMNS[row["measure"]][0],
            str(row["seeds"]),
            with_interval(row["value"], row["low"], row["high"]),
            percent(row["deviation"]),
            f"{percent(row['smallest'])} to {percent(row['largest'])}",
        )
        for row in records(table)
    ]
    headings: tuple[str, ...] = ("Group", "Measure", "Seeds", "Mean [95 %]", "SD", "Range")
    tables = [ExtraTable("groups", "Training seeds", note, headings, rows, table)]
    members = {run.name for each in groups.values() for run in each}
    if runs[0].name not in members:
        if runs[0].name in groups:
            raise ArgumentError(
                f"group: {runs[0].name!r} is also the name of the run to compare with; give the group another name"
            )
        frames = {runs[0].name: [runs[0].frame]} | frames
    if len(frames) > 1:
        differences = group_differences(frames)
        rows = [
            (
                f"{row['group']} - {row['base']}",
                COLUMNS[row["measure"]][0],
                signed(row["value"])
                + ("" if np.isnan(row["low"]) else f" [{signed(row['low'])}, {signed(row['high'])}]"),
            )
            for row in records(differences)
        ]
        note = (
            "Differences of the means, in points, with a 95 % interval over new concepts and new training seeds; none "
            f"for fewer than {FEWEST_SEEDS} seeds. A single run is kept fixed, without the variation of its seed. "
            f"Simulated coverage for two equally good groups {coverage(OVER_SEEDS, DIFFERENCE)}."
        )
        headings = ("Groups", "Measure", "Difference [95 %]")
        title = "Differences between groups"
        tables.append(ExtraTable("group_differences", title, note, headings, rows, differences))
    return tables


def group_versions(tables: Sequence[ExtraTable]) -> Iterator[list[TextTable]]:
    """Yields the tables of groups for the terminal, the most detailed version first.

    After both tables of the page follows one table that begins with the headline's measures.

    Args:
        tables: Result of :func:`extra_tables`, with groups.
    """
    found = {table.name: table for table in tables}
    groups, changes = found["groups"], found.get("group_differences")
    yield [table.for_terminal() for table in (groups, changes) if table is not None]
    title, headings = groups.title, groups.headings[:-1]  # without the range
    differences: dict[tuple[str, str], str] = {}
    if changes is not None:
        title += f", and differences from {shortened(changes.numbers['base'].iloc[0])}"
        headings += changes.headings[-1:]
        keys = zip(changes.numbers["group"], changes.numbers["measure"], strict=True)
        differences = {key: row[-1] for key, row in zip(keys, changes.rows, strict=True)}
    keys = zip(groups.numbers["group"], groups.numbers["measure"], strict=True)
    rows = {
        key: (shortened(row[0]), *row[1:-1], *([differences.get(key, "-")] if changes is not None else []))
        for key, row in zip(keys, groups.rows, strict=True)
    }
    first = [row for measure in IN_HEADLINE for key, row in rows.items() if key[1] == measure] or list(rows.values())
    note = (
        "In percent and points, with 95 % intervals over new concepts and new training seeds; simulated coverage "
        f"{coverage(OVER_SEEDS, MEAN)} (means), {coverage(OVER_SEEDS, DIFFERENCE)} (differences)"
    )
    starts = [at for note in (LEFT_OUT_NOTE, UNFINISHED_NOTE) if (at := groups.note.find(note)) >= 0]
    counted = groups.note[min(starts) :] if starts else ""
    for chosen in (list(rows.values()), first, *(first[:number] for number in FEW_ROWS)):
        left_out = len(rows) - len(chosen)
        more = f"; {left_out} more rows are on the page." if left_out else "."
        about = f"{note}{more} {counted}".strip()
        yield [replace(groups, title=title, note=about, headings=headings, rows=chosen).for_terminal()]


def _of_curves(curves: Mapping[str, pd.DataFrame]) -> ExtraTable | None:
    if not curves:
        return None
    found = pd.concat([table.assign(run=name) for name, table in curves.items()], ignore_index=True)
    overall = found[(found["category"] == OVERALL) & (found["sampling_unit"] != THESE_CONCEPTS)]
    rows = [
        (
            row["run"],
            CURVE_MEASURES[row["measure"]].format(row["prevalence"])
            + ("" if row["side"] == BOTH else f", {row['side']}"),
            row["questions"],
            with_interval(row["value"], row["low"], row["high"]),
        )
        for row in records(overall[overall["capability"].isin(["alignment", REVERSED])])
    ]
    note = (
        "In percent, with 95 % intervals for new concepts. Log-odds: of the word that means unsafe against the one "
        "that means safe, at the beginning of an answer; the mean of an image's questions, or one question per image. "
        "Prevalence: share of unsafe images (--prevalence). TPR - FPR of the log-odds: at thresholds chosen on other "
        "concepts."
    )
    simulated = [f"{what} {coverage(name)}" for name, what in SIMULATED.items() if name in set(overall["method"])]
    note += f" Simulated coverage of the intervals: {'; '.join(simulated)}." if simulated else ""
    headings = ("Run", "Measure", "Questions", "Value [95 %]")
    return ExtraTable("operating", "Operating curve", note, headings, rows, _run_first(found))


def _of_repeats(runs: Sequence[Run]) -> ExtraTable | None:
    tables = [repeat_table(run.frame).assign(run=run.name) for run in runs]
    found = pd.concat(tables, ignore_index=True)
    if found.empty:
        return None
    rows = []
    for row in records(found):
        what = row["measure"]
        if what == WRONG_AT_LEAST_ONCE:
            what = f"wrong at least once in {row['of']}"
        elif what == VARIANCE:
            what = f"share of variance: {row['of']}"
        side = "" if row["side"] == "-" else f", {row['side']}"
        about = f"{row['capability'].replace('_', ' ')}{side}"
        unit = row["sampling_unit"] if isinstance(row["sampling_unit"], str) else ""
        rows.append((row["run"], about, what, with_interval(row["value"], row["low"], row["high"]), unit))
    note = (
        "In percent. Wrong at least once in k: of k responses to a question; N/A counts as wrong. Flip rate: how often "
        "two responses to a question differ in being right. Share of variance: of single responses."
    )
    headings = ("Run", "Questions", "Measure", "Value [95 %]", "Sampling unit")
    return ExtraTable("repeats", "Repeated questions", note, headings, rows, _run_first(found))


def _of_positions(runs: Sequence[Run]) -> ExtraTable | None:
    tables = [position_table(pd.concat([run.frame, run.variants])).assign(run=run.name) for run in runs]
    found = pd.concat(tables, ignore_index=True)
    if found.empty:
        return None
    rows = [
        (
            row["run"],
            f"{row['measure']} {row['position']}".strip(),
            with_interval(row["value"], row["low"], row["high"]),
            str(row["n"]),
        )
        for row in records(found)
    ]
    note = (
        "In percent, over all orders of the options. Accuracy beyond chance: 0 for guesses. Position bias: standard "
        "deviation of the accuracy over the positions of the right option, beside its expectation without a bias. "
        "In brackets 95 % intervals for other images of these concepts."
    )
    headings = ("Run", "Measure", "Value [95 %]", "n")
    return ExtraTable("positions", "Rotated options", note, headings, rows, _run_first(found))


def _run_first(table: pd.DataFrame) -> pd.DataFrame:
    return table[["run", *table.columns.drop("run")]]
