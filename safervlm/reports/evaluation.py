"""Compares evaluations of several models in one table: on the terminal, as CSV, Excel and LaTeX, and as a page.

The page shows differences from the original with their bounds, and responses that changed between right and wrong, with
blurred images.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import seed_for
from safervlm.io.escape import without_folders
from safervlm.io.files import write_text_atomically
from safervlm.io.outputs import require_replaceable_page
from safervlm.io.tables import JUDGE_NOTE, say, show_table, write_csv, write_workbook
from safervlm.reports.examples import picture
from safervlm.reports.page import template
from safervlm.reports.runs import read_summary, run_names, settings_that_differ, shown_settings
from safervlm.reports.suite_latex import suite_latex_tables
from safervlm.reports.suite_tables import (
    DIVERSITY_NOTE,
    LEVEL,
    Summary,
    bounds,
    difference_table,
    evaluation_table,
    interval,
    remarks,
    shown_estimate,
    shown_side_by_side,
)
from safervlm.reports.tables import records
from safervlm.results.measures import UnfinishedAs
from safervlm.results.suite import GROUPS, Column, Evaluation, columns, estimates, evaluate, load_suite
from safervlm.results.suite_differences import compare_suites, flips
from safervlm.run import reject_run_at_work
from safervlm.run_folder import RunFolder

FLIPS = 6  # number shown on the page per direction, run and group of datasets


def evaluation(runs: list[Path], out: Path | None = None, thinking_unfinished: UnfinishedAs = "apart") -> Path:
    """Compares the evaluations of several models in one table, the first being the original.

    Next to FILE.html it writes FILE.csv (every number with its intervals), FILE_differences.csv (from the first run),
    FILE_table.csv (the runs side by side), FILE.xlsx and FILE.tex.

    Args:
        runs: Run folders that contain an evaluation (`safervlm evaluate`), or the folders of evaluations. The first is
            the original, with which the others are compared.
        out: The HTML file to write; by default evaluation.html in the first run's folder.
        thinking_unfinished: How responses count that ended inside their reasoning, without an answer: "apart" excludes
            them and counts them separately, "N/A" and "wrong" count them as such.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: there are no runs, one is named twice, ``out`` is not an HTML file, or a file other than an
            evaluation exists there.
        RecordError: no evaluation can be read, or nothing was evaluated.
        SystemExit: with exit code 3 at the end, if some of the runs can't be read.
    """
    if not runs:
        raise ArgumentError("runs: at least one run folder, for example runs/original")
    out = Path(out) if out else Path(runs[0]) / "evaluation.html"
    if out.suffix != ".html":
        raise ArgumentError(f"out: the table is a page, {str(out)!r} must end in .html")
    require_replaceable_page(out, "evaluation", ".csv", "_table.csv", "_differences.csv", ".xlsx", ".tex")
    paths = [Path(run) for run in runs]
    names = run_names(
        [
            path.resolve().parent if RunFolder(path.resolve().parent).evaluation == path.resolve() else path
            for path in paths
        ]
    )
    loaded, unread = read_suites(paths, names, thinking_unfinished)
    original = loaded[0] if loaded[0].name == names[0] else None
    names = [each.name for each in loaded]
    wanted = columns(loaded)
    if not wanted:
        raise RecordError(f"{paths[0]}: nothing was evaluated; safervlm evaluate {paths[0]}")
    long = pd.concat([evaluate(each, wanted) for each in loaded], ignore_index=True)
    tables = [compare_suites(each, original, wanted) for each in loaded[1:]] if original else []
    differences = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    wide = shown_side_by_side(long, names)

    manifests = [(each.name, read_summary(RunFolder(each.folder).manifest)) for each in loaded]
    said = [*unread, *remarks(long, differences, loaded, wanted, manifests)]
    page = render_suite(loaded, wanted, long, differences, said, manifests, out)
    write_text_atomically(out, page)
    write_csv(out.with_suffix(".csv"), long)
    write_csv(out.with_name(f"{out.stem}_table.csv"), wide, index=True)
    sheets = {"table": wide.reset_index(), "evaluation": long}
    beside = out.with_name(f"{out.stem}_differences.csv")
    beside.unlink(missing_ok=True)  # from an earlier call
    if len(differences):
        write_csv(beside, differences)
        sheets["differences"] = differences
    write_workbook(out.with_suffix(".xlsx"), sheets, [JUDGE_NOTE, DIVERSITY_NOTE])
    tex = suite_latex_tables(long, differences, names)
    write_text_atomically(out.with_suffix(".tex"), tex)
    show_table(evaluation_table(long, names))
    for _, table in differences.groupby("run", sort=False) if len(differences) else ():
        show_table(difference_table(table, names[0]))
    for line in said:
        say(line)
    say(f"evaluation: {out} (with .csv, .xlsx and .tex beside it)")
    if unread:
        sys.exit(3)
    return out


def read_suites(
    paths: Sequence[Path], names: Sequence[str], unfinished: UnfinishedAs = "apart"
) -> tuple[list[Evaluation], list[str]]:
    """Loads the evaluations that can be read, and reports those that can't.

    Args:
        paths: the run folders.
        names: the runs' names, in the same order; the first is the original.
        unfinished: see :func:`safervlm.results.runs.load_run`.

    Returns:
        The evaluations, and a sentence on each run that is excluded.

    Raises:
        RecordError: none can be read.
    """
    loaded: list[Evaluation] = []
    unread = []
    for path, name in zip(paths, names, strict=True):
        try:
            folder = folder_of(path)
            reject_run_at_work(folder)
            each = load_suite(folder, name, unfinished)
            for column in columns([each]):
                if column.measure == "mme":
                    estimates(each, column)  # raises for a dataset that MME's rule can't score
            loaded.append(each)
        except RecordError as error:
            if len(paths) == 1:
                raise
            lost = ", and there are no differences from it" if name == names[0] else ""
            unread.append(f"{name} is skipped{lost}: {error}")
    if not loaded:
        raise RecordError("; ".join(unread))
    return loaded, unread


def folder_of(run: Path) -> Path:
    """Returns the folder of a run's evaluation: its subfolder ``evaluation`` if there is one, else the folder itself.

    Args:
        run: the run folder.

    Raises:
        RecordError: it contains no evaluation.
    """
    files = RunFolder(run)
    folder = files.evaluation if files.evaluation.is_dir() else run
    responses = RunFolder(folder).responses
    if not responses.is_file():
        raise RecordError(f"{responses}: no such file; evaluate the run: safervlm evaluate {run}")
    return folder


def render_suite(
    evaluations: Sequence[Evaluation],
    wanted: Sequence[Column],
    long: pd.DataFrame,
    differences: pd.DataFrame,
    said: Sequence[str],
    manifests: Sequence[tuple[str, Summary]],
    out: Path,
) -> str:
    """Renders the page.

    Args:
        evaluations: the models; the first is the original, if it could be read.
        wanted: of :func:`safervlm.results.suite.columns`.
        long: of :func:`safervlm.results.suite.evaluate`, for all models.
        differences: of :func:`safervlm.results.suite_differences.compare_suites`, for all models but the original; may
            be empty.
        said: remarks on the numbers, a sentence each.
        manifests: name and manifest of each model.
        out: the page's file, from which images are linked.

    Returns:
        The HTML text.
    """
    settings = [(name, shown_settings(manifest)) for name, manifest in manifests]
    found = {(row["run"], row["column"]): row for row in records(long)}
    every = {
        (run, column): rows.to_dict("records")
        for (run, column), rows in long[long["low"].notna()].groupby(["run", "column"], sort=False)
    }
    by_run = {(row["run"], row["column"]): row for row in records(differences)}
    headings = records(long[["group", "column", "heading", "unit", "detail"]].drop_duplicates("column"))
    groups = {group: [c for c in headings if c["group"] == group and not c["detail"]] for group in GROUPS}
    return template("evaluation.html.j2").render(
        runs=[{"name": each.name} for each in evaluations],
        groups={group: part for group, part in groups.items() if part},
        details=[column for column in headings if column["detail"]],
        cells=found,
        intervals=every,
        compared=by_run,
        bounds=bounds(differences, wanted),
        na_counts={column.key for column in wanted if column.measure in ("share", "mme", "both")},
        flipped=[(e.name, flipped(e, evaluations[0], wanted, out)) for e in evaluations[1:] if len(differences)],
        remarks=[without_folders(line) for line in said],
        manifests=settings,
        differences=settings_that_differ([manifest for _, manifest in settings]),
        judge_note=JUDGE_NOTE,
        diversity_note=DIVERSITY_NOTE,
        shown=shown_estimate,
        interval=interval,
        level=LEVEL,
    )


def flipped(
    each: Evaluation, original: Evaluation, wanted: Sequence[Column], out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Selects responses that changed between right and wrong, by group of datasets, for display.

    The selection of at most :data:`FLIPS` depends on the questions' ids alone.

    Args:
        each: the model.
        original: the model that it is compared with.
        wanted: the columns.
        out: the page's file, from which images are linked.

    Returns:
        Title -> cards for the template, each with the question, its image and both responses.
    """
    shown_cards: dict[str, list[dict[str, Any]]] = {}
    for group in GROUPS:
        parts = [
            flips(each, original, c) for c in wanted if c.group == group and c.measure in ("share", "occurs", "mme")
        ]
        if not parts:
            continue
        table = pd.concat(parts).drop_duplicates("id")
        for improved, direction in ((True, "now correct"), (False, "now wrong")):
            some = table[table["improved"] == improved]
            names = sorted(some["id"], key=lambda name: seed_for("flipped", name))[:FLIPS]
            rows = some.set_index("id", drop=False)
            if names:
                title = f"{group}: {direction}, {len(some)} responses"
                shown_cards[title] = [_card(rows.loc[name], each, original, out) for name in names]
    return shown_cards


def _card(row: "pd.Series[Any]", each: Evaluation, original: Evaluation, out: Path) -> dict[str, Any]:
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
        for colour, (name, suffix) in enumerate(((original.name, "_before"), (each.name, "")))
    ]
    question = {str(key): value for key, value in row.items()}
    return question | {"picture": picture(path, row["id"], out, original.folder) if path else None, "answers": answers}
