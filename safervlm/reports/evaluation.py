"""The report of evaluations of several models: on the terminal, as a page, CSV, Excel and LaTeX."""

import sys
from pathlib import Path

from safervlm.errors import ArgumentError
from safervlm.io.files import write_text_atomically
from safervlm.io.outputs import require_replaceable_page
from safervlm.io.tables import JUDGE_NOTE, write_csv, write_workbook
from safervlm.reports.contents import Contents
from safervlm.reports.evaluated import compare_evaluations
from safervlm.reports.page import render
from safervlm.reports.runs import run_names
from safervlm.reports.suite_latex import suite_latex_tables
from safervlm.reports.suite_tables import DIVERSITY_NOTE, evaluation_tables, shown_side_by_side
from safervlm.reports.terminal import closing_line, say_report
from safervlm.results.measures import UnfinishedAs
from safervlm.run_folder import RunFolder


def evaluation(runs: list[Path], out: Path | None = None, thinking_unfinished: UnfinishedAs = "apart") -> Path:
    """Reports the evaluations of several models, the first being the original.

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
        ArgumentError: There are no runs, one is named twice, ``out`` is not an HTML file, or a file other than an
            evaluation exists there.
        RecordError: No evaluation can be read, or nothing was evaluated.
        SystemExit: With exit code 3 at the end, if some of the runs can't be read.
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
    compared = compare_evaluations(paths, names, thinking_unfinished)
    long, differences, names = compared.long, compared.differences, compared.names
    wide = shown_side_by_side(long, names)
    contents = Contents("evaluation", evaluated=compared)
    page, tex = render(contents, out), suite_latex_tables(long, differences, names)
    write_text_atomically(out, page)
    tables = [out.with_suffix(".csv"), out.with_name(f"{out.stem}_table.csv")]
    write_csv(tables[0], long)
    write_csv(tables[1], wide, index=True)
    sheets = {"table": wide.reset_index(), "evaluation": long}
    beside = out.with_name(f"{out.stem}_differences.csv")
    beside.unlink(missing_ok=True)  # from an earlier call
    if len(differences):
        write_csv(beside, differences)
        tables.append(beside)
        sheets["differences"] = differences
    write_workbook(out.with_suffix(".xlsx"), sheets, [JUDGE_NOTE, DIVERSITY_NOTE])
    write_text_atomically(out.with_suffix(".tex"), tex)
    say_report(
        contents.headline,
        ([each] for each in evaluation_tables(long, differences, names)),
        contents.warnings,
        contents.results,
        contents.remarks,
        closing_line("evaluation", out, [*tables, out.with_suffix(".xlsx"), out.with_suffix(".tex")]),
    )
    if compared.unread:
        sys.exit(3)
    return out
