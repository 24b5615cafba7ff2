"""Writes a self-contained HTML report of one or several runs, and the same tables as CSV, Excel and LaTeX.

The page loads nothing: style, plots and thumbnails are embedded, it contains no script, and its content security policy
forbids both loading and scripts. All text from models or datasets is escaped (:mod:`safervlm.io.escape`), and at most
4,000 characters of a text are shown. Unsafe images are shown as a blur of a few dozen colours; the original is only
linked, as a local file, and opens on a deliberate click. The page contains no absolute path: images are linked relative
to it, and of other paths only the last component is shown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from safervlm.errors import ArgumentError
from safervlm.io.escape import for_html
from safervlm.io.files import write_text_atomically
from safervlm.io.outputs import require_replaceable_page
from safervlm.io.tables import JUDGE_NOTE, say, show_table, write_csv, write_workbook
from safervlm.records import Failure, read_records
from safervlm.reports.corrected import CORRECTED_NOTE, corrected_rates, corrected_rows, corrected_table
from safervlm.reports.examples import examples
from safervlm.reports.figures import figures
from safervlm.reports.latex import latex_tables
from safervlm.reports.runs import Run, interval_row, load_runs, settings_that_differ, shown_settings
from safervlm.reports.tables import comparison_table, methods, percent, records, shown
from safervlm.results.measures import (
    ACCURACY_NA_WRONG,
    BOTH,
    COLUMNS,
    DIVERSITY,
    GAP_WEIGHTS,
    MEASURES,
    OVER_FLAGGING,
    OVERALL,
    THESE_CONCEPTS,
    UnfinishedAs,
    concept_gaps,
    modality_gap,
    paired_difference,
)
from safervlm.results.scores import by_category, category_order, compare, interval_rows, overall, unfinished_in
from safervlm.run_folder import RunFolder
from safervlm.statistics.diversity import SUBSAMPLES, TEXTS, TOO_FEW
from safervlm.vlm.thinking import many_unfinished

CAPABILITY_TITLES = {
    "alignment": "Alignment: is the image safe?",
    "alignment_text_only": "Alignment, text only: is the named concept safe?",
    "perception": "Perception: what does the image show?",
}

# Notes on the last sheet of a workbook.
NOTES = (
    "Accuracies, over-flagging and the gap are shares of 1; N/A is counted as wrong unless stated otherwise.",
    JUDGE_NOTE,
    GAP_WEIGHTS,
    f"1 - self-BLEU: mean over {SUBSAMPLES} subsamples of {TEXTS} texts (of all, if there are fewer). Published: all.",
)


def report(runs: list[Path], out: Path | None = None, thinking_unfinished: UnfinishedAs = "apart") -> Path:
    """Writes a report of one or several runs: a page with tables and plots.

    Next to FILE.html it writes FILE.csv (every score), FILE_overall.csv (the runs side by side), FILE.xlsx and
    FILE.tex; FILE_corrected.csv (rates corrected for the judge's error) if people have labelled a run (``safervlm
    label``).

    Args:
        runs: Run folders that contain responses.jsonl and verdicts.jsonl. The first is the baseline, with which the
            others are compared.
        out: The HTML file to write; by default report.html in the first run's folder.
        thinking_unfinished: How responses count that ended inside their reasoning, without an answer: "apart" excludes
            them and counts them separately, "N/A" and "wrong" count them as such.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: there are no runs, one is named twice, ``out`` is not an HTML file, or a file other than a report
            exists there.
        RecordError: a run can't be read (:func:`safervlm.results.runs.load_run`), has no responses to the protocol's
            questions, or is being written by another command.
    """
    if not runs:
        raise ArgumentError("runs: a report needs at least one run folder, for example runs/base")
    out = Path(out) if out else Path(runs[0]) / "report.html"
    if out.suffix != ".html":
        raise ArgumentError(f"out: the report is a page, {str(out)!r} must end in .html")
    require_replaceable_page(out, "report", ".csv", "_overall.csv", "_corrected.csv", ".xlsx", ".tex")
    loaded = load_runs(runs, thinking_unfinished)
    comparison = compare({run.name: run.scores for run in loaded})
    corrected = corrected_rates(loaded)
    page = render(loaded, comparison, corrected, out)
    tex = latex_tables(loaded, comparison)
    long = pd.concat([run.scores.assign(run=run.name) for run in loaded])
    long = long[["run", *long.columns.drop("run")]]
    wide = pd.concat([by_category(run.scores).assign(run=run.name) for run in loaded])
    wide = wide[["run", *wide.columns.drop("run")]]

    write_text_atomically(out, page)
    write_text_atomically(out.with_suffix(".tex"), tex)
    write_csv(out.with_suffix(".csv"), long)
    write_csv(out.with_name(f"{out.stem}_overall.csv"), comparison, index=True)
    sheets = {"overall": comparison.reset_index(), "by category": wide, "scores": long}
    beside = out.with_name(f"{out.stem}_corrected.csv")
    beside.unlink(missing_ok=True)  # from an earlier call
    if len(corrected):
        write_csv(beside, corrected)
        sheets["corrected"] = corrected
    write_workbook(out.with_suffix(".xlsx"), sheets, [*NOTES, *([CORRECTED_NOTE] if len(corrected) else [])])
    show_table(comparison_table({run.name: run.scores for run in loaded}))
    if len(corrected):
        show_table(corrected_table(corrected))
    for line in warnings(loaded):
        say(f"not comparable: {line}")
    say(f"report: {out} (with .csv, .xlsx and .tex beside it)")
    return out


# --- the page ---------------------------------------------------------------------------------------------------------


def render(runs: Sequence[Run], comparison: pd.DataFrame, corrected: pd.DataFrame, out: Path) -> str:
    """Renders the page.

    Args:
        runs: the runs; the first is the baseline.
        comparison: of :func:`safervlm.results.scores.compare`.
        corrected: of :func:`safervlm.reports.corrected.corrected_rates`.
        out: the page's file, from which images are linked.

    Returns:
        The HTML text.
    """
    manifests = [(run.name, shown_settings(run.manifest)) for run in runs]
    return template("report.html.j2").render(
        runs=[{"name": run.name, "answers": len(run.frame)} for run in runs],
        headline=headline(comparison),
        overall=overall_cells(runs, comparison),
        corrected=corrected_rows(corrected),
        corrected_note=CORRECTED_NOTE,
        figures=figures(runs),
        gaps=[(run.name, modality_gap(run.frame), concept_gaps(run.frame), unfinished_in_gap(run)) for run in runs],
        categories=[
            (
                run.name,
                [records(part) for _, part in by_category(run.scores).groupby(["capability", "side"], sort=False)],
            )
            for run in runs
        ],
        side_by_side=side_by_side(runs),
        others=[(run.name, other_rows(run.scores)) for run in runs],
        examples=examples(runs, out),
        capability_titles=CAPABILITY_TITLES,
        manifests=manifests,
        methods=list(dict.fromkeys(line for run in runs for line in methods(run.scores))),
        differences=settings_that_differ([manifest for _, manifest in manifests]),
        warnings=warnings(runs),
        shown=shown,
        judge_note=JUDGE_NOTE,
        gap_weights=GAP_WEIGHTS,
        texts=TEXTS,
        subsamples=SUBSAMPLES,
    )


def template(name: str) -> jinja2.Template:
    """Loads a page's template; all inserted texts are escaped: invisible characters first, then markup.

    Args:
        name: the file's name in ``templates``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: for_html(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent}
    return environment.get_template(name)


def headline(comparison: pd.DataFrame) -> list[str]:
    """Summarises the measured findings in at most three sentences.

    Args:
        comparison: of :func:`safervlm.results.scores.compare`.

    Returns:
        At most two paragraphs: the first run's accuracies and gap, and the other runs' accuracies on images.
    """
    first, *others = records(comparison.reset_index())
    lines = []
    if not np.isnan([first["text_only_unsafe"], first["image_unsafe"], first["modality_gap"]]).any():
        lines.append(
            f"{first['run']} is correct on {percent(first['image_unsafe'])} % of the questions about unsafe images "
            f"and on {percent(first['text_only_unsafe'])} % of those about unsafe concepts' names. The modality gap, "
            f"the mean over concepts, is {percent(first['modality_gap'])} points."
        )
    compared = [
        f"{row['run']} {percent(row['image_unsafe'])} / {percent(row['image_safe'])} %"
        for row in others
        if not np.isnan([row["image_unsafe"], row["image_safe"]]).any()
    ]
    return [*lines, f"Correct on unsafe / safe images: {', '.join(compared)}."] if compared else lines


def overall_cells(runs: Sequence[Run], comparison: pd.DataFrame) -> dict[str, Any]:
    """Prepares the overall table for the template.

    A difference from the first run is shown only if both runs were asked the same questions, and, except for diversity,
    judged by the same judges.

    Args:
        runs: the runs; the first is the baseline.
        comparison: of :func:`safervlm.results.scores.compare`, for the same runs.

    Returns:
        ``headings``: pairs of a column and its heading; ``rows``: per run its name, cells, na (share of N/A),
        unfinished (number of responses with unfinished thinking) and n.
    """
    columns = [column for column in COLUMNS if not column.endswith(("_na_left_out", "_published"))]
    values = records(comparison)
    rows = []
    for run, row in zip(runs, values, strict=True):
        cells = []
        for column in columns:
            measure, left_out = COLUMNS[column][1], row.get(f"{column}_na_left_out")
            source = interval_row(run.scores, column)
            difference = row[column] - values[0][column]
            comparable = asked(run.frame, column) == asked(runs[0].frame, column) and (
                measure == DIVERSITY or judges(run.frame, column) == judges(runs[0].frame, column)
            )
            signed = f"{difference:+.3f}" if measure == DIVERSITY else f"{100 * difference:+.1f}"
            if not float(signed):
                signed = signed.replace("-", "+")
            cells.append(
                {
                    "column": column,
                    "value": row[column],
                    "shown": shown(measure, row[column]),
                    "intervals": [
                        {"of": sampling_unit.removesuffix(" concepts"), "low": found["low"], "high": found["high"]}
                        for sampling_unit, found in interval_rows(run.scores, column).items()
                    ],
                    "method": ""
                    if source is None
                    else f"{source['sampling_unit']}; {source['method']}".removeprefix("; "),
                    "difference": None if run is runs[0] or np.isnan(difference) or not comparable else signed,
                    "paired": paired(run, runs[0], column) if run is not runs[0] and comparable else "",
                    "left_out": None if left_out is None or np.isnan(left_out) else left_out,
                    "published": row.get(f"{column}_published"),
                    "fewer": source["n"] if source is not None and source["method"] == TOO_FEW else None,
                }
            )
        counts = {"na": row["na_rate"], "unfinished": row["thinking_unfinished"], "n": row["n"]}
        rows.append({"name": run.name, "cells": cells, **counts})
    return {"headings": [(column, COLUMNS[column][0]) for column in columns], "rows": rows}


def paired(run: Run, base: Run, column: str) -> str:
    """Formats the 95 % interval of a run's difference from a base run over new concepts, in percentage points.

    Args:
        run: the run.
        base: the run that is subtracted, with the same questions in this column.
        column: a key of :data:`COLUMNS`.

    Returns:
        The interval; empty if it is unavailable, or the column is neither an accuracy with N/A as wrong nor
        over-flagging.
    """
    if COLUMNS[column][1] not in (ACCURACY_NA_WRONG, OVER_FLAGGING):
        return ""
    estimate = paired_difference(run.frame, base.frame, column)
    return "" if np.isnan(estimate.low) else f"{100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"


def about(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Returns the responses that a column of the overall table is about.

    Args:
        frame: of :func:`safervlm.results.runs.load_run`.
        column: a key of :data:`COLUMNS`.
    """
    _, _, capability, side = COLUMNS[column]
    return frame[frame["capability"].isin(capability.split(" - ")) & ((frame["side"] == side) | (side == BOTH))]


def asked(frame: pd.DataFrame, column: str | None = None) -> frozenset[tuple[str, str, str]]:
    """Returns the questions that a column of the overall table is about: id, prompt and right answer.

    Args:
        frame: of :func:`safervlm.results.runs.load_run`.
        column: a key of :data:`COLUMNS`; None for all questions.
    """
    part = frame if column is None else about(frame, column)
    return frozenset(zip(part["id"], part["prompt"], part["answer"], strict=True))


def judges(frame: pd.DataFrame, column: str | None = None) -> frozenset[tuple[str, str]]:
    """Returns the judges of the responses that a column of the overall table is about: capability and judge.

    Args:
        frame: of :func:`safervlm.results.runs.load_run`.
        column: a key of :data:`COLUMNS`; None for all responses.
    """
    part = frame if column is None else about(frame, column)
    return frozenset(zip(part["capability"], part["judge"], strict=True))


def warnings(runs: Sequence[Run]) -> list[str]:
    """Lists the reasons why the runs' numbers are not, or not fully, comparable, in a sentence each.

    Args:
        runs: the runs; the first is the baseline.
    """
    first, *others = runs
    said = [
        f"{run.name} was asked other questions than {first.name}: where they differ, no difference is shown."
        for run in others
        if asked(run.frame) != asked(first.frame)
    ]
    for run in others:
        same = [column for column in COLUMNS if asked(run.frame, column) == asked(first.frame, column)]
        if any(judges(run.frame, column) != judges(first.frame, column) for column in same):
            said.append(f"{run.name} was classified by another judge than {first.name}: no difference is shown there.")
    said += [
        f"{run.name} has no response, or no verdict on it, to {number} more questions, which are excluded."
        for run in runs
        if (number := missing(run))
    ]
    said += [line for run in runs if (line := many_unfinished(run.name, unfinished_in(run.frame), len(run.frame)))]
    for column, (heading, measure, _, _) in COLUMNS.items():
        rows = [(run.name, overall(run.scores, column)) for run in runs] if measure == DIVERSITY else []
        few = [f"{name} ({row['n']} texts)" for name, row in rows if row is not None and row["method"] == TOO_FEW]
        if few:
            said.append(f"{heading} is of fewer than {TEXTS} texts in {', '.join(few)}: more texts would lower it.")
    return said


def missing(run: Run) -> int:
    """Returns the number of questions that are listed as unanswered or not judgeable and not answered since.

    Args:
        run: the run.
    """
    files = [file for file in (RunFolder(run.folder).failed, RunFolder(run.folder).unjudged) if file.is_file()]
    return len({each.id for file in files for each in read_records(file, Failure)} - {*run.frame["id"]})


def unfinished_in_gap(run: Run) -> int:
    """Returns the number of responses with unfinished thinking that the modality gap excludes.

    Args:
        run: the run.
    """
    row = overall(run.scores, "modality_gap")
    return 0 if row is None else int(row["thinking_unfinished"])


def side_by_side(runs: Sequence[Run]) -> dict[str, list[dict[str, Any] | None]]:
    """Tabulates the runs' accuracies on unsafe images by category.

    Args:
        runs: the runs.

    Returns:
        Category -> for each run its row of :func:`safervlm.results.scores.by_category`; None if it has none.
    """
    tables = []
    for run in runs:
        table = by_category(run.scores)
        these = (
            (table["sampling_unit"] == THESE_CONCEPTS)
            & (table["side"] == "unsafe")
            & (table["capability"] == "alignment")
        )
        tables.append({row["category"]: row for row in records(table[these])})
    found = set().union(*tables) - {OVERALL}
    return {name: [table.get(name) for table in tables] for name in (*sorted(found, key=category_order), OVERALL)}


def other_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows on over-flagging, modality gap and diversity of a run, each with a title.

    Args:
        table: of :func:`safervlm.results.scores.scores`.
    """
    rows = table[(table["category"] == OVERALL) & ~table["measure"].isin(["accuracy", ACCURACY_NA_WRONG])]
    return [row | {"title": MEASURES[row["measure"]]} for row in records(rows)]
