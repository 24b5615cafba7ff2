"""Evaluations of several models -> one table: on the terminal, as CSV, Excel and LaTeX, and as a page.

The page shows differences from the original with their bounds, and answers that flipped, images blurred.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from safervlm.evaluation import (
    GROUPS,
    NOT_MEASURED,
    Column,
    Evaluation,
    columns,
    compare,
    evaluate,
    flips,
    load,
)
from safervlm.records import RecordError, seed_for, write_atomically
from safervlm.reports import latex_table, picture, read_summary, run_names, settings_that_differ, template
from safervlm.scoring import THESE_CONCEPTS, records, write_workbook

FOLDER = "evaluation"  # of a run, where its model's evaluation is
FLIPS = 6  # of each direction, run and group of sets, that the page shows
LEVEL = 0.05


def evaluation(runs: list[Path], out: Path | None = None) -> Path:
    """One table of the evaluations of several models: the original, and what was made of it.

    Beside FILE.html it writes FILE.csv (every number with its intervals), FILE_differences.csv (from the first run),
    FILE_table.csv (the runs side by side), FILE.xlsx and FILE.tex.

    Args:
        runs: Run folders with an evaluation in them (scripts/eval.sh), or the folders of evaluations; the first is the
            original, which the others are compared with.
        out: The HTML file to write; by default evaluation.html in the first run's folder.

    Returns:
        The page.

    Raises:
        ValueError: no runs, one named twice, or ``out`` is no HTML file.
        RecordError: an evaluation that can't be read.
    """
    if not runs:
        raise ValueError("runs: at least one run folder, for example runs/original")
    out = Path(out) if out else Path(runs[0]) / "evaluation.html"
    if out.suffix != ".html":
        raise ValueError(f"out: the table is a page, {str(out)!r} must end in .html")
    paths = [Path(run) for run in runs]
    names = run_names([path.parent if path.name == FOLDER else path for path in paths])
    loaded, unread = read(paths, names)
    original = loaded[0] if loaded[0].name == names[0] else None
    names = [each.name for each in loaded]
    wanted = columns(loaded)
    if not wanted:
        raise RecordError(f"{paths[0]}: nothing was evaluated; bash scripts/eval.sh {paths[0]}")
    long = pd.concat([evaluate(each, wanted) for each in loaded], ignore_index=True)
    tables = [compare(each, original, wanted) for each in loaded[1:]] if original else []
    differences = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    wide = side_by_side(long, names)

    said = [*unread, *remarks(long, differences, loaded)]
    page = render(loaded, wanted, long, differences, said).encode("utf-8", "replace")
    write_atomically(out, lambda file: file.write_bytes(page))
    write_atomically(out.with_suffix(".csv"), lambda file: long.to_csv(file, index=False))
    write_atomically(out.with_name(f"{out.stem}_table.csv"), lambda file: wide.to_csv(file))
    sheets = {"table": wide.reset_index(), "evaluation": long}
    beside = out.with_name(f"{out.stem}_differences.csv")
    beside.unlink(missing_ok=True)  # of runs before
    if len(differences):
        write_atomically(beside, lambda file: differences.to_csv(file, index=False))
        sheets["differences"] = differences
    write_workbook(out.with_suffix(".xlsx"), sheets)
    latex = latex_tables(long, names)
    write_atomically(out.with_suffix(".tex"), lambda file: file.write_text(latex, encoding="utf-8"))
    console = Console()
    console.print(evaluation_table(long, names))
    for _, table in differences.groupby("run", sort=False) if len(differences) else ():
        console.print(difference_table(table, names[0]))
    for line in said:
        print(line)
    print(f"evaluation: {out} (with .csv, .xlsx and .tex beside it)")
    return out


def read(paths: Sequence[Path], names: Sequence[str]) -> tuple[list[Evaluation], list[str]]:
    """The evaluations that can be read, and a line on each that can't.

    Raises:
        RecordError: none can.
    """
    loaded: list[Evaluation] = []
    unread = []
    for path, name in zip(paths, names, strict=True):
        try:
            loaded.append(load(folder_of(path), name))
        except RecordError as error:
            if len(paths) == 1:
                raise
            lost = ", and no difference can be told from it" if name == names[0] else ""
            unread.append(f"{name} is left out{lost}: {error}")
    if not loaded:
        raise RecordError("; ".join(unread))
    return loaded, unread


def folder_of(run: Path) -> Path:
    """The folder of a run's evaluation: within it, or itself."""
    return run / FOLDER if (run / FOLDER).is_dir() else run


# --- tables -----------------------------------------------------------------------------------------------------------


def shown(unit: str, value: float, signed: bool = False) -> str:
    """A number as the tables show it: shares and ratios in percent, MME's points, self-BLEU with three decimals."""
    if np.isnan(value):
        return "-"
    sign = "+" if signed else ""
    if unit == "%":
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.1f}" if unit == "points" else f"{value:{sign}.3f}"


def interval(row: dict[str, Any], signed: bool = False) -> str:
    """The interval of a row, ``[90.2, 97.0]``; empty where there is none."""
    if np.isnan(row["low"]):
        return ""
    return "[" + ", ".join(shown(row["unit"], row[end], signed) for end in ("low", "high")) + "]"


def with_interval(row: dict[str, Any]) -> str:
    """A number and its interval, ``94.1 [90.2, 97.0]``."""
    return f"{shown(row['unit'], row['value'])} {interval(row)}".strip()


def lines(long: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of the table, without details: group, column, heading, varies, and whether it is a column's first.

    A column has a line with its number and the interval for new concepts or new images, and, where there is one, a
    line with the interval for these concepts.
    """
    measured = long.groupby("column")["method"].transform(lambda methods: (methods != NOT_MEASURED).any())
    rows = long[~long["detail"] & ~(measured & (long["method"] == NOT_MEASURED))]
    rows = rows.drop_duplicates(["column", "varies"])
    rank = rows.groupby("column", sort=False).ngroup() * 2 + (rows["varies"] == THESE_CONCEPTS)
    rows = rows.assign(first=rows["varies"] != THESE_CONCEPTS).iloc[rank.argsort(kind="stable")]
    return records(rows[["group", "column", "heading", "varies", "first"]])


def texts(long: pd.DataFrame, names: Sequence[str]) -> dict[str, list[str]]:
    """Heading of a line -> its cell for each run."""
    found = {(row["run"], row["column"], row["varies"]): row for row in records(long)}
    table = {}
    for line in lines(long):
        rows = [found.get((name, line["column"], line["varies"])) for name in names]
        heading = line["heading"] if line["first"] else f"{line['heading']}: {line['varies']}"
        cell = with_interval if line["first"] else interval
        table[heading] = [(row and cell(row)) or "-" for row in rows]
    return table


def side_by_side(long: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A row a run, a column a line of the table; in each cell the number and its interval."""
    return pd.DataFrame(texts(long, names), pd.Index(names, name="run"))


def evaluation_table(long: pd.DataFrame, names: Sequence[str]) -> Table:
    """The table for the terminal, one column a run (it fits where one row a run doesn't)."""
    caption = "in %, MME in points, N/A counted as wrong\n95 % intervals for new concepts or new images, else as said"
    printed = Table(title="Evaluation", caption=caption, box=SIMPLE_HEAD)
    printed.add_column("")
    for name in names:
        printed.add_column(name, justify="right")
    group = None
    for line, (heading, row) in zip(lines(long), texts(long, names).items(), strict=True):
        if line["group"] != group:
            group = line["group"]
            printed.add_section()
            printed.add_row(str(group), style="bold")
        printed.add_row(
            f"  {heading}" if line["first"] else f"    {line['varies']}", *row, style=None if line["first"] else "dim"
        )
    return printed


def difference_table(differences: pd.DataFrame, original: str) -> Table:
    """What a run differs in from the original, for the terminal, without details."""
    caption = f"95 % intervals; p by Holm over the columns; * below {LEVEL:g}"
    title = f"{differences['run'].iloc[0]} minus {original}"
    printed = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    printed.add_column("")
    for heading in ("difference", "95 %", "p (Holm)", "lost", "gained", "of"):
        printed.add_column(heading, justify="right")
    for row in records(differences[~differences["detail"]]):
        p = "-" if np.isnan(row["p_holm"]) else f"{row['p_holm']:.3f}" if row["p_holm"] >= 0.001 else "<0.001"
        star = " *" if row["p_holm"] < LEVEL else ""
        counts = ["-" if np.isnan(row["p"]) else str(row[key]) for key in ("lost", "gained", "n")]
        number = shown(row["unit"], row["difference"], signed=True)
        printed.add_row(row["heading"], number, interval(row, signed=True), p + star, *counts)
    return printed


def remarks(long: pd.DataFrame, differences: pd.DataFrame, evaluations: Sequence[Evaluation]) -> list[str]:
    """What a reader has to know of the numbers.

    What is missing, why there is no difference where it isn't plain, and how often each kind of interval holds.
    """
    said = []
    for each in evaluations:
        missing = long[(long["run"] == each.name) & (long["missing"] > 0) & ~long["detail"]].drop_duplicates("column")
        for row in records(missing):
            what = "ratings" if row["column"] in set(each.ratings["dataset"]) else "answers"
            effect = "they count as wrong" if row["unit"] == "points" else "they are left out"
            said.append(f"{each.name}: {row['missing']} {what} of {row['heading']} are missing: {effect}")
    if len(differences):
        refused = differences[differences["difference"].isna() & ~differences["detail"]]
        said += [
            f"{run}, {', '.join(part['heading'])}: no difference, {str(method).removeprefix('none: ')}"
            for (run, method), part in refused.groupby(["run", "method"], sort=False)
        ]
    return said + held(long) + (held(differences) if len(differences) else [])


def held(table: pd.DataFrame) -> list[str]:
    """How often the intervals of a table held the truth, a line a method."""
    simulated = table[table["coverage"].notna()].drop_duplicates(["varies", "method"])
    return [
        f"{row['varies']}: {row['method']}; held the truth in {row['coverage']} of simulated studies"
        for row in records(simulated)
    ]


# --- LaTeX, page ------------------------------------------------------------------------------------------------------


def latex_tables(long: pd.DataFrame, names: Sequence[str]) -> str:
    """A table a group, rows are runs, as in the paper; for the booktabs package."""
    wide = side_by_side(long, names)
    tables = []
    of_line = dict(zip(wide.columns, lines(long), strict=True))
    for group in GROUPS:
        part = [heading for heading, line in of_line.items() if line["group"] == group]
        if part:
            caption = (
                f"{group}: in percent (MME in points), N/A counted as wrong; 95 % intervals, for new concepts or new "
            )
            caption += "images unless said. "
            made = held(long[(long["group"] == group) & ~long["detail"]])
            caption += " ".join(f"{line[0].upper()}{line[1:]}." for line in made)
            tables.append(latex_table(wide[part], "l" + "r" * len(part), caption, index=True))
    return "% \\usepackage{booktabs}\n\n" + "\n".join(tables)


def render(
    evaluations: Sequence[Evaluation],
    wanted: Sequence[Column],
    long: pd.DataFrame,
    differences: pd.DataFrame,
    said: Sequence[str],
) -> str:
    """The page."""
    found = {(row["run"], row["column"]): row for row in records(long)}
    every = {
        (run, column): rows.to_dict("records")
        for (run, column), rows in long[long["low"].notna()].groupby(["run", "column"], sort=False)
    }
    by_run = {(row["run"], row["column"]): row for row in records(differences)}
    headings = records(long[["group", "column", "heading", "unit", "detail"]].drop_duplicates("column"))
    groups = {group: [c for c in headings if c["group"] == group and not c["detail"]] for group in GROUPS}
    manifests = [(each.name, read_summary(each.folder / "manifest.json")) for each in evaluations]
    return template("evaluation.html.j2").render(
        runs=[{"name": each.name, "folder": str(each.folder)} for each in evaluations],
        groups={group: part for group, part in groups.items() if part},
        details=[column for column in headings if column["detail"]],
        cells=found,
        intervals=every,
        compared=by_run,
        bounds=bounds(evaluations, differences),
        flipped=[(e.name, flipped(e, evaluations[0], wanted)) for e in evaluations[1:] if len(differences)],
        remarks=said,
        manifests=manifests,
        differences=settings_that_differ([manifest for _, manifest in manifests]),
        shown=shown,
        interval=interval,
        level=LEVEL,
    )


def bounds(evaluations: Sequence[Evaluation], differences: pd.DataFrame) -> list[str]:
    """What of the general ability may be lost, in a sentence a run and column."""
    lines = []
    for row in records(differences):
        if row["group"] == "General ability" and not row["detail"] and not np.isnan(row["low"]):
            lost = shown(row["unit"], max(-row["low"], 0.0))
            unit = "points" if row["unit"] in ("%", "points") else ""
            lines.append(
                f"{row['run']}, {row['heading']}: {shown(row['unit'], row['difference'], signed=True)} {unit} against "
                f"{evaluations[0].name}; each by itself, with 95 % confidence no more than {lost} {unit} are lost."
            )
    return lines


def flipped(each: Evaluation, original: Evaluation, wanted: Sequence[Column]) -> dict[str, list[dict[str, Any]]]:
    """Answers that turned right or wrong, by group of sets; which are shown depends on their ids alone."""
    shown_cards: dict[str, list[dict[str, Any]]] = {}
    for group in GROUPS:
        parts = [
            flips(each, original, c) for c in wanted if c.group == group and c.measure in ("share", "occurs", "mme")
        ]
        if not parts:
            continue
        table = pd.concat(parts).drop_duplicates("id")
        for gained, title in ((True, "turned right"), (False, "turned wrong")):
            some = table[table["gained"] == gained]
            names = sorted(some["id"], key=lambda name: seed_for("flipped", name))[:FLIPS]
            rows = some.set_index("id", drop=False)
            if names:
                title = f"{group}: {title}, {len(some)} answers"
                shown_cards[title] = [_card(rows.loc[name], each, original) for name in names]
    return shown_cards


def _card(row: "pd.Series[Any]", each: Evaluation, original: Evaluation) -> dict[str, Any]:
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
    return question | {"picture": picture(path, row["id"]) if path else None, "answers": answers}
