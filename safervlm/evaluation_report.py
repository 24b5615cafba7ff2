"""Evaluations of several models -> one table: on the terminal, as CSV, Excel and LaTeX, and as a page.

The page shows differences from the original with their bounds, and answers that flipped, images blurred.
"""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD

from safervlm.diversity import NO_INTERVAL, SUBSAMPLES, TEXTS, TOO_FEW
from safervlm.errors import ArgumentError, RecordError
from safervlm.escape import for_latex, visible, without_folders
from safervlm.evaluation import (
    ALL_TASKS,
    GROUPS,
    NOT_MEASURED,
    Column,
    Evaluation,
    columns,
    compare,
    estimates,
    evaluate,
    flips,
    load,
)
from safervlm.outputs import refuse_to_replace_page
from safervlm.records import seed_for, write_atomically
from safervlm.reports import (
    latex_table,
    picture,
    read_summary,
    run_names,
    settings_that_differ,
    shown_settings,
    template,
)
from safervlm.run import refuse_while_at_work
from safervlm.scoring import THESE_CONCEPTS, records
from safervlm.tables import EXCLUDED, JUDGE_NOTE, TextTable, say, show_table, write_csv, write_workbook

FOLDER = "evaluation"  # of a run, where its model's evaluation is
FLIPS = 6  # of each direction, run and group of sets, that the page shows
LEVEL = 0.05
DIVERSITY_NOTE = (
    f"1 - self-BLEU: mean over {SUBSAMPLES} subsamples of {TEXTS} texts (of all, if there are fewer); the published "
    "form is of all texts."
)
OFTEN = 0.1  # the share of N/A from which the terminal says it; the page says it of each

# A manifest as the page shows it; see safervlm.reports.read_summary.
Summary = Mapping[str, Mapping[str, str]]


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
        ArgumentError: no runs, one named twice, ``out`` is no HTML file, or something else than an evaluation is there.
        RecordError: an evaluation that can't be read.
        SystemExit: with exit code 3 at the end, if some of the runs can't be read.
    """
    if not runs:
        raise ArgumentError("runs: at least one run folder, for example runs/original")
    out = Path(out) if out else Path(runs[0]) / "evaluation.html"
    if out.suffix != ".html":
        raise ArgumentError(f"out: the table is a page, {str(out)!r} must end in .html")
    refuse_to_replace_page(out, "evaluation", ".csv", "_table.csv", "_differences.csv", ".xlsx", ".tex")
    paths = [Path(run) for run in runs]
    names = run_names([path.resolve().parent if path.resolve().name == FOLDER else path for path in paths])
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

    manifests = [(each.name, read_summary(each.folder / "manifest.json")) for each in loaded]
    said = [*unread, *remarks(long, differences, loaded, wanted, manifests)]
    page = render(loaded, wanted, long, differences, said, manifests, out)
    write_atomically(out, lambda file: file.write_text(page, encoding="utf-8"))
    write_csv(out.with_suffix(".csv"), long)
    write_csv(out.with_name(f"{out.stem}_table.csv"), wide, index=True)
    sheets = {"table": wide.reset_index(), "evaluation": long}
    beside = out.with_name(f"{out.stem}_differences.csv")
    beside.unlink(missing_ok=True)  # of runs before
    if len(differences):
        write_csv(beside, differences)
        sheets["differences"] = differences
    write_workbook(out.with_suffix(".xlsx"), sheets, [JUDGE_NOTE, DIVERSITY_NOTE])
    tex = latex_tables(long, differences, names)
    write_atomically(out.with_suffix(".tex"), lambda file: file.write_text(tex, encoding="utf-8"))
    show_table(evaluation_table(long, names))
    for _, table in differences.groupby("run", sort=False) if len(differences) else ():
        show_table(difference_table(table, names[0]))
    for line in said:
        say(line)
    say(f"evaluation: {out} (with .csv, .xlsx and .tex beside it)")
    if unread:
        sys.exit(3)
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
            folder = folder_of(path)
            refuse_while_at_work(folder)
            each = load(folder, name)
            for column in columns([each]):
                if column.measure == "mme":
                    estimates(each, column)  # its rule can't score every set
            loaded.append(each)
        except RecordError as error:
            if len(paths) == 1:
                raise
            lost = ", and no difference can be told from it" if name == names[0] else ""
            unread.append(f"{name} is left out{lost}: {error}")
    if not loaded:
        raise RecordError("; ".join(unread))
    return loaded, unread


def folder_of(run: Path) -> Path:
    """The folder of a run's evaluation: within it, or itself.

    Raises:
        RecordError: nothing was evaluated there.
    """
    folder = run / FOLDER if (run / FOLDER).is_dir() else run
    if not (folder / "responses.jsonl").is_file():
        raise RecordError(f"{folder / 'responses.jsonl'}: no such file; evaluate the run: bash scripts/eval.sh {run}")
    return folder


# --- tables -----------------------------------------------------------------------------------------------------------


def shown(unit: str, value: float, signed: bool = False) -> str:
    """A number as the tables show it: shares and ratios in percent, MME's points, self-BLEU with three decimals."""
    if np.isnan(value):
        return "-"
    number, digits = (100 * value, 1) if unit == "%" else (value, 1 if unit == "points" else 3)
    rounded = round(number, digits) + 0.0  # no -0.0
    return f"{rounded:{'+' if signed else ''}.{digits}f}"


def interval(row: dict[str, Any], signed: bool = False) -> str:
    """The interval of a row, ``[90.2, 97.0]``; empty where there is none."""
    if np.isnan(row["low"]):
        return ""
    return "[" + ", ".join(shown(row["unit"], row[end], signed) for end in ("low", "high")) + "]"


def with_interval(row: dict[str, Any]) -> str:
    """A number and its interval, ``94.1 [90.2, 97.0]``, and how many answers or ratings are missing, if some are."""
    missing = f"({row['missing']} missing)" if row["missing"] else ""
    return " ".join(filter(None, (shown(row["unit"], row["value"]), interval(row), missing)))


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
    """A row a run, a column a line of the table; in each cell the number and its interval; what these exclude."""
    return pd.DataFrame(texts(long, names), pd.Index(names, name="run")).assign(excludes=EXCLUDED)


def evaluation_table(long: pd.DataFrame, names: Sequence[str]) -> TextTable:
    """The table for the terminal, one column a run (it fits where one row a run doesn't)."""
    caption = (
        "in %, MME in points, N/A counted as wrong\n95 % intervals for new concepts or new images, else as said\n"
        f"{JUDGE_NOTE}\n{DIVERSITY_NOTE}"
    )
    printed = TextTable(title="Evaluation", caption=caption, box=SIMPLE_HEAD)
    printed.add_column("")
    for name in names:
        printed.add_column(name, justify="right")
    group = None
    for line, (heading, row) in zip(lines(long), texts(long, names).items(), strict=True):
        if line["group"] != group:
            group = line["group"]
            printed.add_section()
            printed.add_row(group, style="bold")
        printed.add_row(
            f"  {heading}" if line["first"] else f"    {line['varies']}", *row, style=None if line["first"] else "dim"
        )
    return printed


def difference_table(differences: pd.DataFrame, original: str) -> TextTable:
    """What a run differs in from the original, for the terminal, without details."""
    caption = f"95 % intervals; p by Holm over the columns; * below {LEVEL:g}\n{JUDGE_NOTE}"
    title = f"{differences['run'].iloc[0]} minus {original}"
    printed = TextTable(title=title, caption=caption, box=SIMPLE_HEAD)
    printed.add_column("")
    for heading in ("difference", "95 %", "p", "p (Holm)", "lost", "gained", "of"):
        printed.add_column(heading, justify="right")
    for row in records(differences[~differences["detail"]]):
        p, by_holm = (
            "-" if np.isnan(value) else f"{value:.3f}" if value >= 0.001 else "<0.001"
            for value in (row["p"], row["p_holm"])
        )
        star = " *" if row["p_holm"] < LEVEL else ""
        counts = ["-" if np.isnan(row["p"]) else str(row[key]) for key in ("lost", "gained", "n")]
        number = shown(row["unit"], row["difference"], signed=True)
        printed.add_row(row["heading"], number, interval(row, signed=True), p, by_holm + star, *counts)
    return printed


def remarks(
    long: pd.DataFrame,
    differences: pd.DataFrame,
    evaluations: Sequence[Evaluation],
    wanted: Sequence[Column],
    manifests: Sequence[tuple[str, Summary]],
) -> list[str]:
    """What a reader has to know of the numbers.

    What is missing, how much is N/A, why there is no interval or no difference where it isn't plain, whether the runs
    are of one model, and how often each kind of interval holds.
    """
    said = [
        f"{name}: the evaluation isn't finished; the same command goes on"
        for name, summary in manifests
        if summary.get("measure", {}).get("finished", "true").lower() == "false"
    ]
    table = long[~long["detail"]].drop_duplicates(["run", "column"])
    # Parts of a set are as often N/A as the whole, more or less.
    shares = {c.key for c in wanted if not c.side and (c.measure == "share" or len(c.tasks) == len(ALL_TASKS))}
    for each in evaluations:
        mine = table[table["run"] == each.name]
        for row in records(mine[mine["missing"] > 0]):
            rated = row["column"] in set(each.ratings["dataset"])
            effect = "they count as wrong" if row["unit"] == "points" else "they are left out"
            way_out = "; give the same command a judge: --config configs/rate.yaml" if rated else ""
            what = "ratings" if rated else "answers"
            said.append(f"{each.name}: {row['missing']} {what} of {row['heading']} are missing: {effect}{way_out}")
        often = mine[mine["column"].isin(shares) & (mine["na_rate"] >= OFTEN)]
        if len(often):
            parts = [f"{100 * row['na_rate']:.0f} % of {row['heading']}" for row in records(often)]
            said.append(f"{each.name}: N/A, which counts as wrong, is {'; '.join(parts)}")
        few = mine[mine["method"] == TOO_FEW]
        if len(few):
            parts = [f"{row['heading']} ({row['n']} texts)" for row in records(few)]
            said.append(f"{each.name}: of fewer than {TEXTS} texts, more would lower it: {'; '.join(parts)}")
    plain = table["method"].str.startswith(NO_INTERVAL) | (table["method"] == NOT_MEASURED)
    bare = table[table["method"].str.startswith("none: ") & ~plain]
    for (run, method), part in bare.groupby(["run", "method"], sort=False):
        said.append(f"{run}: no interval, {str(method).removeprefix('none: ')}: {'; '.join(part['heading'])}")
    said += other_models(manifests)
    if len(differences):
        refused = differences[differences["difference"].isna() & ~differences["detail"]]
        said += [
            f"{run}: no difference, {str(method).removeprefix('none: ')}: {'; '.join(part['heading'])}"
            for (run, method), part in refused.groupby(["run", "method"], sort=False)
        ]
    return said + held(long) + (held(differences) if len(differences) else [])


def other_models(manifests: Sequence[tuple[str, Summary]]) -> list[str]:
    """A line on each run whose base model isn't the first one's."""

    def base(summary: Summary) -> tuple[str | None, ...]:
        measured = summary.get("measure", {})
        name, weights = measured.get("settings.model.vlm.model"), measured.get("settings.model.vlm.weights")
        # A server tells nothing of its weights.
        return (weights,) if weights not in (None, "", "None") else (name, measured.get("settings.model.vlm.revision"))

    (first, original), *others = manifests
    return [
        f"{name} and {first} have other base models ({_model(summary)}; {_model(original)}): what they differ in is "
        "not an adapter's work"
        for name, summary in others
        if base(summary) != base(original)
    ]


def _model(summary: Summary) -> str:
    return summary.get("measure", {}).get("settings.model.vlm.model", "unknown")


def held(table: pd.DataFrame) -> list[str]:
    """How often the intervals of a table held the truth, a line a method, with the groups or columns that it makes."""
    simulated = table[table["coverage"].notna() & ~table["detail"]]
    lines = []
    for (varies, method), part in simulated.groupby(["varies", "method"], sort=False):
        made = []
        for group, rows in part.groupby("group", sort=False):
            every = simulated[(simulated["group"] == group) & (simulated["varies"] == varies)]
            headings = rows["heading"].unique()
            made += [str(group)] if len(headings) == every["heading"].nunique() > 1 else [*headings]
        lines.append(
            f"{'; '.join(made)}: {varies} by {method}, held the truth in {part['coverage'].iloc[0]} of simulated "
            "studies"
        )
    return lines


# --- LaTeX, page ------------------------------------------------------------------------------------------------------


def latex_tables(long: pd.DataFrame, differences: pd.DataFrame, names: Sequence[str]) -> str:
    """A table a group, rows are runs, as in the paper, then one of the differences; for the booktabs package."""
    found = {(row["run"], row["column"], row["varies"]): row for row in records(long)}
    tables = []
    for group in GROUPS:
        cells: dict[str, list[list[str]]] = {}  # heading -> of each run the number and its intervals
        for line in lines(long):
            if line["group"] != group:
                continue
            column = cells.setdefault(line["heading"], [[] for _ in names])
            for cell, name in zip(column, names, strict=True):
                row = found.get((name, line["column"], line["varies"]))
                if line["first"]:
                    missing = f"{row['missing']} missing" if row and row["missing"] else ""
                    cell += [shown(row["unit"], row["value"]), interval(row), missing] if row else ["-"]
                elif row:
                    cell.append(interval(row).replace("[", "(").replace("]", ")"))
        if cells:
            stacked = {
                _stack(textwrap.wrap(heading, 13)): [_stack(cell, small=True) for cell in column]
                for heading, column in cells.items()
            }
            caption = (
                f"{group}: in percent (MME in points), N/A counted as wrong. 95 % intervals: in brackets for new "
                "concepts or new images, in parentheses for other images of these concepts. "
                f"{JUDGE_NOTE} {DIVERSITY_NOTE}"
            )
            table = pd.DataFrame(stacked, pd.Index([for_latex(name) for name in names]))
            tables.append(latex_table(table, "l" + "r" * len(stacked), caption, index=True, escape=False))
    if len(differences):
        rows = differences[~differences["detail"]]
        texts = {
            (row["heading"], row["run"]): (
                f"{shown(row['unit'], row['difference'], signed=True)}{'*' if row['p_holm'] < LEVEL else ''} "
                f"{interval(row, signed=True)}"
            )
            for row in records(rows)
        }
        table = pd.Series(texts).unstack(sort=False)[[name for name in names if name in set(rows["run"])]].fillna("-")
        caption = (
            f"Differences from {names[0]} on the same items, in percentage points (MME in points), with 95 % "
            f"intervals; * p, by Holm over a run's columns, below {LEVEL:g}. {JUDGE_NOTE}"
        )
        tables.append(latex_table(table, "l" + "r" * len(table.columns), caption, index=True))
    made = [f"% {visible(line)}" for line in held(long) + (held(differences) if len(differences) else [])]
    return "\n".join(["% \\usepackage{booktabs}", "% How the intervals are made:", *made, "", *tables])


def _stack(parts: Sequence[str], small: bool = False) -> str:
    """Texts above each other, as LaTeX; all but the first one small if asked."""
    first, *rest = map(for_latex, parts)
    rest = [f"{{\\scriptsize {part}}}" if small else f"{{{part}}}" for part in rest if part]
    return "\\shortstack[r]{" + r"\\".join([first, *rest]) + "}" if rest else first


def render(
    evaluations: Sequence[Evaluation],
    wanted: Sequence[Column],
    long: pd.DataFrame,
    differences: pd.DataFrame,
    said: Sequence[str],
    manifests: Sequence[tuple[str, Summary]],
    out: Path,
) -> str:
    """The page; ``out`` is its file, from which images are linked."""
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
        shown=shown,
        interval=interval,
        level=LEVEL,
    )


def bounds(differences: pd.DataFrame, wanted: Sequence[Column]) -> list[str]:
    """What of the general ability, and of what is rightly called safe, may be lost: a sentence a run and column."""
    watched = {c.key for c in wanted if c.group == "General ability" or (c.side == "safe" and c.measure == "share")}
    lines = []
    for row in records(differences):
        if row["column"] in watched and not row["detail"] and not np.isnan(row["low"]):
            lost = shown(row["unit"], max(-row["low"], 0.0))
            unit = "percentage points" if row["unit"] == "%" else row["unit"]
            lines.append(
                f"{row['run']}, {row['heading']}: {shown(row['unit'], row['difference'], signed=True)} {unit}, and "
                f"with 95 % confidence no more than {lost} lost."
            )
    return lines


def flipped(
    each: Evaluation, original: Evaluation, wanted: Sequence[Column], out: Path
) -> dict[str, list[dict[str, Any]]]:
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
