"""Runs -> one self-contained HTML page, and the same tables as CSV, Excel and LaTeX.

The page loads nothing: style, plots and thumbnails stand in it, it runs no script, and its content security policy
forbids both. Whatever comes from a model or a data set is escaped (:mod:`safervlm.escape`), and of a text at most 4,000
characters are shown. Unsafe images are shown as a blur of a few dozen colours, which is all that is left of them; the
original is one deliberate click away, in the local file, and never in the page. The page names no absolute path: images
are linked relative to it, of other paths the last part is shown.
"""

import base64
import io
import json
import os
import re
import warnings as python_warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageFilter

from safervlm.diversity import SUBSAMPLES, TEXTS, TOO_FEW
from safervlm.errors import ArgumentError, RecordError
from safervlm.escape import for_figure, for_html, for_latex, visible, without_folders
from safervlm.images import open_image
from safervlm.outputs import refuse_to_replace_page
from safervlm.protocol import CAPABILITIES
from safervlm.reading import read_object
from safervlm.records import FAILED, UNJUDGED, Failure, fingerprint, read_records, seed_for, write_atomically
from safervlm.run import refuse_while_at_work
from safervlm.scoring import (
    ACCURACY_NA_WRONG,
    BOTH,
    COLUMNS,
    DIVERSITY,
    GAP_WEIGHTS,
    MEASURES,
    NEW_CONCEPTS,
    OVER_FLAGGING,
    OVERALL,
    THESE_CONCEPTS,
    by_category,
    category_order,
    compare,
    comparison_table,
    concept_gaps,
    load_run,
    methods,
    modality_gap,
    overall,
    paired_difference,
    percent,
    records,
    scores,
    shown,
    with_interval,
)
from safervlm.settings import flat
from safervlm.tables import JUDGE_NOTE, escaped, say, show_table, write_csv, write_workbook
from safervlm.trust import may_read

CAPABILITY_TITLES = {
    "alignment": "Alignment: is the image safe?",
    "alignment_text_only": "Alignment, text only: is what the name says safe?",
    "perception": "Perception: what does the image show?",
}
EXAMPLES = {"alignment": 2, "alignment_text_only": 1, "perception": 1}  # that the page shows of each category

# Of a workbook, on its last sheet.
NOTES = (
    "Accuracies, over-flagging and the gap are shares of 1; N/A is counted as wrong unless said.",
    JUDGE_NOTE,
    GAP_WEIGHTS,
    f"1 - self-BLEU: mean over {SUBSAMPLES} subsamples of {TEXTS} texts (of all, if there are fewer). Published: all.",
)
WIDTH = 11.0  # inches of every plot

GRAIN = 5  # colours along the longer side of a blurred image: all that is left of it
THUMBNAIL = 160  # pixels along its longer side

# Matplotlib takes colours, the page has light and dark ones: each of these stands for a variable of its style.
INK, GRID = "#010203", "#010204"
MARKERS = "osD^vP"
RUN_COLOURS = [f"#0102{10 + index}" for index in range(len(MARKERS))]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "safervlm",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "font.size": 10,
}


@dataclass(frozen=True)
class Run:
    """A run as the report sees it.

    Attributes:
        name: in every table, unique.
        folder: where it is.
        frame: its answers and verdicts, of :func:`safervlm.scoring.load_run`.
        scores: of :func:`safervlm.scoring.scores`.
        manifest: stage -> dotted key -> value; empty without ``manifest.json``.
    """

    name: str
    folder: Path
    frame: pd.DataFrame
    scores: pd.DataFrame
    manifest: dict[str, dict[str, str]]


def report(runs: list[Path], out: Path | None = None) -> Path:
    """One page, tables and plots of one or several runs.

    Beside FILE.html it writes FILE.csv (every score), FILE_overall.csv (the runs side by side), FILE.xlsx and FILE.tex.

    Args:
        runs: Run folders that hold responses.jsonl and verdicts.jsonl; the first is the one the others are compared
            with.
        out: The HTML file to write; by default report.html in the first run's folder.

    Returns:
        The page.

    Raises:
        ArgumentError: no runs, ``out`` is no HTML file, or something else than a report is there.
        RecordError: a run that can't be read (:func:`safervlm.scoring.load_run`), or where another command is at work.
    """
    if not runs:
        raise ArgumentError("runs: a report needs at least one run folder, for example runs/base")
    out = Path(out) if out else Path(runs[0]) / "report.html"
    if out.suffix != ".html":
        raise ArgumentError(f"out: the report is a page, {str(out)!r} must end in .html")
    refuse_to_replace_page(out, "report", ".csv", "_overall.csv", ".xlsx", ".tex")
    loaded = load(runs)
    comparison = compare({run.name: run.scores for run in loaded})
    page = render(loaded, comparison, out)
    tex = latex_tables(loaded, comparison)
    long = pd.concat([run.scores.assign(run=run.name) for run in loaded])
    long = long[["run", *long.columns.drop("run")]]
    wide = pd.concat([by_category(run.scores).assign(run=run.name) for run in loaded])
    wide = wide[["run", *wide.columns.drop("run")]]

    write_atomically(out, lambda file: file.write_text(page, encoding="utf-8"))
    write_atomically(out.with_suffix(".tex"), lambda file: file.write_text(tex, encoding="utf-8"))
    write_csv(out.with_suffix(".csv"), long)
    write_csv(out.with_name(f"{out.stem}_overall.csv"), comparison, index=True)
    sheets = {"overall": comparison.reset_index(), "by category": wide, "scores": long}
    write_workbook(out.with_suffix(".xlsx"), sheets, NOTES)
    show_table(comparison_table(comparison))
    for line in warnings(loaded):
        say(f"not comparable: {line}")
    say(f"report: {out} (with .csv, .xlsx and .tex beside it)")
    return out


def load(folders: Sequence[Path]) -> list[Run]:
    """Reads and scores runs."""
    paths = [Path(folder) for folder in folders]
    runs = []
    for path, name in zip(paths, run_names(paths), strict=True):
        refuse_while_at_work(path)
        frame = load_run(path)
        kinds = frame["capability"].value_counts()
        if others := {str(kind): int(count) for kind, count in kinds.items() if kind not in CAPABILITIES}:
            listed = ", ".join(f"{count} {kind}" for kind, count in others.items())
            say(f"{name}: {listed} answers aren't in a report but in `safervlm evaluation {path}`")
        table = scores(frame)
        if table.empty:
            raise RecordError(
                f"{path}: it has no answers to the protocol's questions, which a report is about; use `safervlm "
                f"evaluation {path}`"
            )
        runs.append(Run(name, path, frame, table, read_summary(path / "manifest.json")))
    return runs


def run_names(paths: Sequence[Path]) -> list[str]:
    """What runs are called: by their folder, with as many folders above it as tell them apart.

    Raises:
        ArgumentError: a folder is named twice.
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ArgumentError(f"runs: {', '.join(map(str, paths))}: the same folder is named twice; name each once")
    names: list[str] = []
    for own in parts:
        above = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        names.append(visible("/".join(own[-above:])))
    # Two names may look the same once their control characters are visible.
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def read_summary(path: Path) -> dict[str, dict[str, str]]:
    """What made a run: stage -> dotted key -> value, as texts; empty where there is no manifest.

    Args:
        path: ``manifest.json``.

    Raises:
        RecordError: it can't be read, or has no stages.
    """
    if not path.is_file():
        return {}
    stages = read_object(path, "move it away to go on without", finite=False).get("stages")
    if not isinstance(stages, dict):
        raise RecordError(f"{path}: no manifest, it has no stages; move it away to go on without")
    return {str(stage): {key: _as_text(value) for key, value in flat(entry)} for stage, entry in stages.items()}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- the page ---------------------------------------------------------------------------------------------------------


def render(runs: Sequence[Run], comparison: pd.DataFrame, out: Path) -> str:
    """The page.

    Args:
        runs: the first is the baseline.
        comparison: of :func:`safervlm.scoring.compare`.
        out: the page's file, from which images are linked.
    """
    manifests = [(run.name, shown_settings(run.manifest)) for run in runs]
    return template("report.html.j2").render(
        runs=[{"name": run.name, "answers": len(run.frame)} for run in runs],
        headline=headline(comparison),
        overall=overall_cells(runs, comparison),
        figures=figures(runs),
        gaps=[(run.name, modality_gap(run.frame), concept_gaps(run.frame)) for run in runs],
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
    """A page's template; whatever is put into it is escaped: invisible characters first, then markup."""
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
    """The findings in a sentence or two, from what was measured."""
    first, *others = records(comparison.reset_index())
    lines = []
    if not np.isnan([first["text_only_unsafe"], first["image_unsafe"], first["modality_gap"]]).any():
        lines.append(
            f"{first['run']} answers {percent(first['image_unsafe'])} % of the questions about unsafe images right and "
            f"{percent(first['text_only_unsafe'])} % of those about unsafe concepts' names. The modality gap, the mean "
            f"over concepts, is {percent(first['modality_gap'])} points."
        )
    compared = [
        f"{row['run']} {percent(row['image_unsafe'])} / {percent(row['image_safe'])} %"
        for row in others
        if not np.isnan([row["image_unsafe"], row["image_safe"]]).any()
    ]
    return [*lines, f"Right on unsafe / safe images: {', '.join(compared)}."] if compared else lines


def overall_cells(runs: Sequence[Run], comparison: pd.DataFrame) -> dict[str, Any]:
    """The overall table: headings, and of every run its cells."""
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
                    "interval": None if source is None or np.isnan(source["low"]) else (source["low"], source["high"]),
                    "method": "" if source is None else f"{source['varies']}; {source['method']}".removeprefix("; "),
                    "difference": None if run is runs[0] or np.isnan(difference) or not comparable else signed,
                    "paired": paired(run, runs[0], column) if run is not runs[0] and comparable else "",
                    "left_out": None if left_out is None or np.isnan(left_out) else left_out,
                    "published": row.get(f"{column}_published"),
                    "fewer": source["n"] if source is not None and source["method"] == TOO_FEW else None,
                }
            )
        rows.append({"name": run.name, "cells": cells, "na": row["na_rate"], "n": row["n"]})
    return {"headings": [(column, COLUMNS[column][0]) for column in columns], "rows": rows}


def paired(run: Run, base: Run, column: str) -> str:
    """The 95 % interval of a run's difference from the first one, new concepts; empty where it can't be had."""
    if COLUMNS[column][1] not in (ACCURACY_NA_WRONG, OVER_FLAGGING):
        return ""
    estimate = paired_difference(run.frame, base.frame, column)
    return "" if np.isnan(estimate.low) else f"{100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"


def about(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The answers that a column of the overall table is about."""
    _, _, capability, side = COLUMNS[column]
    return frame[frame["capability"].isin(capability.split(" - ")) & ((frame["side"] == side) | (side == BOTH))]


def asked(frame: pd.DataFrame, column: str | None = None) -> frozenset[tuple[str, str, str]]:
    """The questions that a column of the overall table is about, or all: id, words, and right answer."""
    part = frame if column is None else about(frame, column)
    return frozenset(zip(part["id"], part["prompt"], part["answer"], strict=True))


def judges(frame: pd.DataFrame, column: str | None = None) -> frozenset[tuple[str, str]]:
    """Who read the answers that a column of the overall table is about, or all: capability and judge."""
    part = frame if column is None else about(frame, column)
    return frozenset(zip(part["capability"], part["judge"], strict=True))


def warnings(runs: Sequence[Run]) -> list[str]:
    """What forbids to compare the runs' numbers, in a sentence each."""
    first, *others = runs
    said = [
        f"{run.name} answered other questions than {first.name}: where they differ, no difference is shown."
        for run in others
        if asked(run.frame) != asked(first.frame)
    ]
    for run in others:
        same = [column for column in COLUMNS if asked(run.frame, column) == asked(first.frame, column)]
        if any(judges(run.frame, column) != judges(first.frame, column) for column in same):
            said.append(f"{run.name} was read by another judge than {first.name}: no difference is shown there.")
    said += [
        f"{run.name} has no answer, or no verdict on it, to {number} more questions, which are left out."
        for run in runs
        if (number := missing(run))
    ]
    for column, (heading, measure, _, _) in COLUMNS.items():
        rows = [(run.name, overall(run.scores, column)) for run in runs] if measure == DIVERSITY else []
        few = [f"{name} ({row['n']} texts)" for name, row in rows if row is not None and row["method"] == TOO_FEW]
        if few:
            said.append(f"{heading} is of fewer than {TEXTS} texts in {', '.join(few)}: more texts would lower it.")
    return said


def missing(run: Run) -> int:
    """How many questions a run lists as unanswered, or their answers as not judged, and has not mended since."""
    files = [file for file in (run.folder / FAILED, run.folder / UNJUDGED) if file.is_file()]
    return len({each.id for file in files for each in read_records(file, Failure)} - {*run.frame["id"]})


def side_by_side(runs: Sequence[Run]) -> dict[str, list[dict[str, Any] | None]]:
    """Category -> for each run its row of unsafe images (None where it has none)."""
    tables = []
    for run in runs:
        table = by_category(run.scores)
        these = (table["varies"] == THESE_CONCEPTS) & (table["side"] == "unsafe") & (table["capability"] == "alignment")
        tables.append({row["category"]: row for row in records(table[these])})
    found = set().union(*tables) - {OVERALL}
    return {name: [table.get(name) for table in tables] for name in (*sorted(found, key=category_order), OVERALL)}


def interval_row(table: pd.DataFrame, column: str) -> "pd.Series[Any] | None":
    """The overall row of a column whose interval is shown: new concepts' if it can be had, else these concepts'."""
    new = overall(table, column, NEW_CONCEPTS)
    if new is None or not np.isnan(new["low"]):
        return new
    these = overall(table, column, THESE_CONCEPTS)
    return new if these is None else these


def other_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Over-flagging, gap and diversity of a run, each with a title."""
    rows = table[(table["category"] == OVERALL) & ~table["measure"].isin(["accuracy", ACCURACY_NA_WRONG])]
    return [row | {"title": MEASURES[row["measure"]]} for row in records(rows)]


def shown_settings(manifest: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """A manifest of :func:`read_summary` as a page shows it: without absolute paths, which may name a user."""
    return {
        without_folders(stage): {without_folders(key): without_folders(value) for key, value in entries.items()}
        for stage, entries in manifest.items()
    }


def settings_that_differ(manifests: Sequence[Mapping[str, Mapping[str, str]]]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ: (stage and key, a value for each run).

    Args:
        manifests: of :func:`read_summary`.
    """
    settings = [
        {f"{stage}: {key}": value for stage, entry in manifest.items() for key, value in entry.items()}
        for manifest in manifests
    ]
    keys = dict.fromkeys(key for entry in settings for key in entry if ": settings." in key)
    rows = [(key.replace("settings.", "", 1), [entry.get(key, "") for entry in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


# --- examples ---------------------------------------------------------------------------------------------------------


def examples(runs: Sequence[Run], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Questions with every run's answer, by capability.

    The choice looks at the question's id alone: it doesn't depend on what was answered, and stays the same from report
    to report. Questions that every run was asked come first.

    Args:
        runs: the first one's questions are shown.
        out: the page's file, from which images are linked.
    """
    answers = [run.frame.set_index("id", drop=False) for run in runs]
    shared = set.intersection(*(set(frame.index) for frame in answers))
    first = answers[0]
    pictures: dict[str, dict[str, Any]] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for capability, count in EXAMPLES.items():
        asked = first[first["capability"] == capability]
        by_side = sorted(
            asked.groupby(["side", "category"]),
            key=lambda part: (part[0][0] == "safe", category_order(str(part[0][1]))),
        )
        cards = []
        for _, part in by_side:
            ranked = sorted(part["id"], key=lambda name: (name not in shared, seed_for("example", name)))
            distinct = dict.fromkeys(part.loc[ranked, "image"])
            for image in list(distinct)[:count]:
                name = next(name for name in ranked if part.loc[name, "image"] == image)
                cards.append(_card(first.loc[name], runs, answers, pictures, out))
        if cards:
            chosen[capability] = cards
    return chosen


def _card(
    question: "pd.Series[Any]",
    runs: Sequence[Run],
    answers: Sequence[pd.DataFrame],
    pictures: dict[str, dict[str, Any]],
    out: Path,
) -> dict[str, Any]:
    name = question["id"]
    path = question["image_path"]
    if path is not None and path not in pictures:
        pictures[path] = picture(path, name, out, runs[0].folder)
    given = []
    for colour, (run, frame) in enumerate(zip(runs, answers, strict=True)):
        if name in frame.index:
            row = frame.loc[name]
            given.append(
                {
                    "run": run.name,
                    "colour": colour,
                    "response": row["response"],
                    "label": row["label"],
                    "probability": row["probabilities"].get(row["label"]),
                    "right": row["label"] == row["answer"],
                }
            )
    asked = {str(key): value for key, value in question.items()}
    return asked | {"picture": pictures.get(path) if path else None, "answers": given}


def picture(path: str, record: str, out: Path, run: Path) -> dict[str, Any]:
    """An image's blur as a ``data:`` URI and a link to the file; the reason instead, where it can't be shown.

    Only images of the run's own data are read (:func:`safervlm.trust.may_read`): the records of a folder that somebody
    else made may name any file.

    Args:
        path: the image's file.
        record: the id of the question that it belongs to, for the reason.
        out: the page's file; the link is relative to its folder.
        run: the run folder whose record names the image.
    """
    if not may_read(run, path):
        reason = f"{Path(path).name} is not shown: it lies outside the datasets that the run's configuration names"
        return {"blur": None, "original": None, "reason": reason}
    try:
        blur = blurred(open_image(path, record))
    except RecordError as error:
        return {"blur": None, "original": None, "reason": without_folders(str(error).replace(path, Path(path).name))}
    buffer = io.BytesIO()
    blur.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    # A browser takes `..` out of an address before links are followed: so does abspath.
    link = os.path.relpath(os.path.abspath(path), os.path.abspath(out.parent))  # noqa: PTH100
    return {
        "blur": Markup("data:image/png;base64,") + data,
        "width": blur.width,
        "height": blur.height,
        "original": Markup(quote(os.fsencode(Path(link).as_posix()))),  # noqa: S704 (quoted)
    }


def blurred(image: Image.Image) -> Image.Image:
    """An image of which nothing is left but the broad colours.

    It is first reduced to at most 5 x 5 colours (the means of its fifths: nothing that is smaller survives, however
    cleverly one deconvolves), then enlarged and blurred to look soft. Only pixels are kept: no EXIF data, whose preview
    would show it all.

    Args:
        image: in RGB.
    """
    scale = max(image.size)
    coarse = [max(1, round(GRAIN * side / scale)) for side in image.size]
    large = [max(1, round(THUMBNAIL * side / scale)) for side in image.size]
    few = Image.fromarray(np.asarray(image.convert("RGB").resize((coarse[0], coarse[1]), Image.Resampling.BOX)))
    return few.resize((large[0], large[1]), Image.Resampling.BICUBIC).filter(
        ImageFilter.GaussianBlur(THUMBNAIL / GRAIN / 2)
    )


# --- plots ------------------------------------------------------------------------------------------------------------


def figures(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The page's plots, by name: title, description (also for those who don't see it) and SVG; those with data."""
    drawn: dict[str, dict[str, Any]] = {}
    plots: dict[str, tuple[str, str, Callable[[Sequence[Run]], Figure | None]]] = {
        "overall": (
            "Accuracy, overall",
            "N/A counted as wrong. Lines are 95 % intervals for new concepts, or for these concepts where there are "
            "too few for the former.",
            plot_overall,
        ),
        "categories": (
            "Unsafe concepts by category, by name and by image",
            "N/A counted as wrong. Lines are 95 % intervals for these concepts. The distance between a run's points in "
            "the two panels is its modality gap.",
            plot_categories,
        ),
        "gap": (
            "Modality gap of every concept",
            "Accuracy on the concept's name minus accuracy on its images, N/A as wrong; a dot a concept. The large "
            "marker is the mean with its 95 % interval for new concepts.",
            plot_gap,
        ),
    }
    for name, (title, description, draw) in plots.items():
        with mpl.rc_context(STYLE):
            figure = draw(runs)
            if figure is not None:
                drawn[name] = {"title": title, "description": description, "svg": svg(figure)}
    return drawn


def svg(figure: Figure) -> Markup:
    """A figure for the inside of a page, in the page's colours and fonts; the same figure gives the same text."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with python_warnings.catch_warnings():
        # Matplotlib's font may lack a name's characters; the browser draws them with its own fonts.
        python_warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        python_warnings.filterwarnings("ignore", "Matplotlib currently does not support .* natively", UserWarning)
        figure.savefig(buffer, format="svg", metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    colours = {INK: "ink", GRID: "grid"} | {colour: f"run-{index}" for index, colour in enumerate(RUN_COLOURS)}
    # Matplotlib numbers what it defines anew in every figure.
    prefix = f"f{fingerprint(text)[:6]}-"

    def adapted(tag: re.Match[str]) -> str:
        changed = re.sub("|".join(colours), lambda colour: f"var(--{colours[colour[0]]})", tag[0])
        return re.sub(r' id="|href="#|url\(#', lambda start: start[0] + prefix, changed)

    return Markup(re.sub("<[^>]*>", adapted, text))  # noqa: S704 (Matplotlib escapes every text that it draws)


def _style(index: int) -> dict[str, Any]:
    kind = index % len(MARKERS)
    return {"color": RUN_COLOURS[kind], "marker": MARKERS[kind], "markersize": 6, "linestyle": "none"}


def _dots(axes: Axes, index: int, count: int, rows: Sequence[tuple[int, float, float, float]]) -> None:
    """One run's estimates: (line, value, low, high) in shares; the runs' dots of a line stand above each other."""
    shift = 0.62 * ((index + 0.5) / count - 0.5)
    for line, _, low, high in rows:
        if not np.isnan(low):
            axes.plot(
                [100 * low, 100 * high], [line + shift] * 2, color=RUN_COLOURS[index % len(MARKERS)], linewidth=1.6
            )
    places, values = [line + shift for line, *_ in rows], [100 * value for _, value, *_ in rows]
    axes.plot(values, places, **_style(index))


def _lines(axes: Axes, labels: Sequence[str]) -> None:
    """Labels the lines of a plot from top to bottom, and its percent axis."""
    axes.set_yticks(range(len(labels)), [for_figure(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-2, 102)


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    if len(runs) > 1:
        dots = [Line2D([], [], **_style(index)) for index in range(len(runs))]
        labels = [for_figure(run.name) for run in runs]
        columns = min(len(runs), max(1, 120 // (max(map(len, labels)) + 6)), 6)
        figure.legend(dots, labels, loc="outside upper left", ncols=columns)


def plot_overall(runs: Sequence[Run]) -> Figure | None:
    """The four accuracies, overall."""
    columns = ["perception", "text_only_unsafe", "image_unsafe", "image_safe"]
    columns = [column for column in columns if any(overall(run.scores, column) is not None for run in runs)]
    if not columns:
        return None
    figure = Figure(figsize=(WIDTH, 0.8 + len(columns) * (0.35 + 0.17 * len(runs))), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        rows = [interval_row(run.scores, column) for column in columns]
        dots = [(i, row["value"], row["low"], row["high"]) for i, row in enumerate(rows) if row is not None]
        _dots(axes, index, len(runs), dots)
    _lines(axes, [COLUMNS[column][0] for column in columns])
    axes.set_xlabel("accuracy in %")
    _legend(figure, runs)
    return figure


def plot_categories(runs: Sequence[Run]) -> Figure | None:
    """Accuracy on unsafe concepts by category; a panel for names, one for images."""
    tables = [by_category(run.scores) for run in runs]
    tables = [table[(table["side"] == "unsafe") & (table["varies"] == THESE_CONCEPTS)] for table in tables]
    everything = pd.concat(tables)
    panels = [
        (capability, title)
        for capability, title in (("alignment_text_only", "by name (text only)"), ("alignment", "by image"))
        if capability in set(everything["capability"])
    ]
    if not panels:
        return None
    found = set(everything["category"]) - {OVERALL}
    categories = [*sorted(found, key=category_order), OVERALL]
    height = 1.0 + len(categories) * (0.2 + 0.11 * len(runs))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    for axes, (capability, title) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for index, table in enumerate(tables):
            part = table[table["capability"] == capability]
            dots = [
                (categories.index(row["category"]), row["accuracy_na_wrong"], row["low_na_wrong"], row["high_na_wrong"])
                for row in records(part)
            ]
            _dots(axes, index, len(runs), dots)
        _lines(axes, categories)
        axes.set_title(title)
        axes.set_xlabel("accuracy in %")
    _legend(figure, runs)
    return figure


def plot_gap(runs: Sequence[Run]) -> Figure | None:
    """The gap of every concept, a line of dots a run, with the mean and its interval."""
    gaps = [(run, concept_gaps(run.frame)["gap"].to_numpy(float), modality_gap(run.frame)) for run in runs]
    gaps = [(run, points, mean) for run, points, mean in gaps if len(points)]
    if not gaps:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 1.0 * len(gaps)), layout="constrained")
    axes = figure.subplots()
    for line, (run, points, mean) in enumerate(gaps):
        style = _style(list(runs).index(run))
        places = line - 0.02 + 0.45 * _spread(points)
        axes.plot(100 * points, places, **{**style, "markersize": 4, "alpha": 0.55, "markeredgewidth": 0})
        if not np.isnan(mean.low):
            axes.plot([100 * mean.low, 100 * mean.high], [line - 0.26] * 2, color=style["color"], linewidth=2)
        axes.plot([100 * mean.value], [line - 0.26], **{**style, "markersize": 8})
    axes.axvline(0, color=INK, linewidth=0.8)
    _lines(axes, [run.name for run, *_ in gaps])
    axes.set_xlim(-105, 105)
    axes.set_xlabel("text-only minus image accuracy, points")
    return figure


def _spread(points: np.ndarray) -> np.ndarray:
    """Heights from 0 to 1 that set points with the same value apart, (n,)."""
    heights = np.zeros(len(points))
    for value in np.unique(points.round(2)):
        same = np.flatnonzero(points.round(2) == value)
        heights[same] = np.linspace(0, min(1, (len(same) - 1) / 10), len(same))
    return heights


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def latex_tables(runs: Sequence[Run], comparison: pd.DataFrame) -> str:
    """The overall table and each run's accuracies by category, for the booktabs package."""
    side_by_side = pd.DataFrame(
        {
            str(name): {COLUMNS[column][0]: shown(COLUMNS[column][1], row[column]) for column in COLUMNS}
            | {"N/A": percent(row["na_rate"]), "answers": str(row["n"])}
            for name, row in zip(comparison.index, records(comparison), strict=True)
        }
    )
    caption = (
        f"Runs side by side; accuracies, over-flagging and the gap in percent, N/A as wrong unless said. {GAP_WEIGHTS} "
        f"1 - self-BLEU: mean over {SUBSAMPLES} subsamples of {TEXTS} texts (of all, if there are fewer)."
    )
    tables = [latex_table(side_by_side, "l" + "r" * len(runs), caption, index=True)]
    for run in runs:
        rows = [
            {
                "capability": row["capability"].replace("_", " "),
                "side": row["side"],
                "category": row["category"],
                "n": str(row["n"]),
                "N/A": percent(row["na_rate"]),
                "N/A as wrong": with_interval(row["accuracy_na_wrong"], row["low_na_wrong"], row["high_na_wrong"]),
                "N/A left out": with_interval(row["accuracy"], row["low"], row["high"]),
                "varies": row["varies"],
                "method": row["method"],
            }
            for row in records(by_category(run.scores))
        ]
        caption = f"{run.name}: accuracy in percent with 95 % intervals. {JUDGE_NOTE}"
        tables.append(latex_table(pd.DataFrame(rows), "lllrrrrll", caption, index=False))
    return "% \\usepackage{booktabs}\n\n" + "\n".join(tables)


def latex_table(table: pd.DataFrame, columns: str, caption: str, index: bool, escape: bool = True) -> str:
    """A table for the booktabs package.

    Args:
        table: of texts.
        columns: LaTeX's specification of them.
        caption: as it is read.
        index: whether the row names are a column.
        escape: whether the texts are as they are read; False where they are LaTeX.
    """
    written = escaped(table, for_latex) if escape else table
    return written.to_latex(escape=False, column_format=columns, caption=for_latex(caption), index=index)
