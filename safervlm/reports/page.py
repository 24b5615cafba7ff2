"""Writes a self-contained HTML report of one or several runs, and the same tables as CSV, Excel and LaTeX.

The page loads nothing: style, plots and thumbnails are embedded, it contains no script, and its content security policy
forbids both loading and scripts. All text from models or datasets is escaped (:mod:`safervlm.io.escape`), and at most
4,000 characters of a text are shown. Unsafe images are shown as a blur of a few dozen colours; the original is only
linked, as a local file, and opens on a deliberate click. The page contains no absolute path: images are linked relative
to it, and of other paths only the last component is shown.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.escape import for_html, without_folders
from safervlm.io.files import write_text_atomically
from safervlm.io.outputs import require_replaceable_page
from safervlm.io.tables import BESIDE_CORRECTED, JUDGE_NOTE, write_csv, write_workbook
from safervlm.ranges import in_range
from safervlm.reports.calibration_plot import calibration_plot
from safervlm.reports.contents import Contents
from safervlm.reports.corrected import CORRECTED_NOTE, corrected_rates, labelled_runs
from safervlm.reports.curve_plot import curve_plot
from safervlm.reports.evaluated import Evaluations, compare_evaluations, evaluated_sections
from safervlm.reports.examples import examples
from safervlm.reports.extra import NAMES, OF_GROUPS, SEEDS_NOTE, extra_tables, group_versions, named_groups
from safervlm.reports.first_screen import first_screen
from safervlm.reports.flipped import Cards, flipped_in_run, flipped_in_suite
from safervlm.reports.latex import latex_tables
from safervlm.reports.measured import measured_sections
from safervlm.reports.operating import operating_tables
from safervlm.reports.runs import Run, load_runs, settings_of
from safervlm.reports.suite_tables import DIVERSITY_NOTE
from safervlm.reports.tables import comparison_tables, methods, percent, shown
from safervlm.reports.terminal import closing_line, say_report
from safervlm.results.measures import GAP_WEIGHTS, UnfinishedAs
from safervlm.results.scores import by_category, compare
from safervlm.run_folder import RunFolder

CAPABILITY_TITLES = {
    "alignment": "Alignment: is the image safe?",
    "alignment_text_only": "Alignment, text only: is the named concept safe?",
    "perception": "Perception: what does the image show?",
}

# Notes on the last sheet of a workbook.
NOTES = (
    "Accuracies, over-flagging and the gap are shares of 1; N/A is counted as wrong unless stated otherwise.",
    GAP_WEIGHTS,
    DIVERSITY_NOTE,
    SEEDS_NOTE,
)

# Files and sheets that a report has only if they have content.
OPTIONAL = ("corrected", "evaluation", "differences", *NAMES)


def report(
    runs: list[Path],
    out: Path | None = None,
    thinking_unfinished: UnfinishedAs = "apart",
    group: list[str] | None = None,
    prevalence: float = 0.5,
) -> Path:
    """Writes a report of one or several runs: a page with tables and plots.

    Next to FILE.html it writes FILE.csv (every score), FILE_overall.csv (the runs side by side), FILE.xlsx and
    FILE.tex; FILE_corrected.csv (rates corrected for the judge's error) if people have labelled a run (``safervlm
    label``). If the run folders contain evaluations (``safervlm evaluate``), the page reports them, too; their numbers
    are in FILE_evaluation.csv and FILE_differences.csv.

    Args:
        runs: Run folders that contain responses.jsonl and verdicts.jsonl. The first is the baseline, with which the
            others are compared.
        out: The HTML file to write; by default report.html in the first run's folder.
        thinking_unfinished: How responses count that ended inside their reasoning, without an answer: "apart" excludes
            them and counts them separately, "N/A" and "wrong" count them as such.
        group: Runs that differ in their training seed only, each ``NAME=PATTERN`` of run folders, such as
            ``ppo=runs/ppo-*``. They are reported like the others, with their means and differences and intervals over
            training seeds (FILE_groups.csv, FILE_group_differences.csv).
        prevalence: Share of unsafe images among those to be judged, for the area under the precision-recall curve of
            the log-odds.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: There are no runs, one is named twice, ``out`` is not an HTML file, a file other than a report
            exists there, a group is invalid, or ``prevalence`` is not between 0 and 1.
        RecordError: A run can't be read (:func:`safervlm.results.runs.load_run`), has no responses to the protocol's
            questions, or is being written by another command.
    """
    in_range(above=0, below=1, prevalence=prevalence)
    members = named_groups(group or [])
    there = {Path(run).resolve() for run in runs}
    runs = [*runs, *(run for each in members.values() for run in each if run.resolve() not in there)]
    if not runs:
        raise ArgumentError("runs: a report needs at least one run folder, for example runs/base")
    out = Path(out) if out else Path(runs[0]) / "report.html"
    if out.suffix != ".html":
        raise ArgumentError(f"out: the report is a page, {str(out)!r} must end in .html")
    optional = {name: out.with_name(f"{out.stem}_{name}.csv") for name in OPTIONAL}
    endings = (".csv", "_overall.csv", *(f"_{name}.csv" for name in optional), ".xlsx", ".tex")
    require_replaceable_page(out, "report", *endings)
    notices: list[str] = []
    rejected: list[str] = []
    loaded = load_runs(runs, thinking_unfinished, notices.append)
    by_folder = {run.folder.resolve(): run for run in loaded}
    groups = {name: [by_folder[folder.resolve()] for folder in each] for name, each in members.items()}
    evaluations = evaluations_of(loaded, thinking_unfinished, rejected.append)
    summaries: list[str] = []
    curves = operating_tables(loaded, prevalence, summaries.append)
    labelled = labelled_runs(loaded, rejected.append)
    contents = Contents(
        "report",
        loaded,
        corrected_rates(labelled, loaded[0].name),
        evaluations,
        extra_tables(loaded, groups, curves),
        curve_plot(loaded, curves),
        calibration_plot(labelled, [run.name for run in loaded]),
        rejected,
        summaries,
        notices,
        groups={name: [run.name for run in each] for name, each in groups.items()},
    )
    comparison = compare({run.name: run.scores for run in loaded})
    page, tex = render(contents, out), latex_tables(loaded, comparison, contents.corrected)
    long = pd.concat([run.scores.assign(run=run.name) for run in loaded])
    long = long[["run", *long.columns.drop("run")]]
    wide = pd.concat([by_category(run.scores).assign(run=run.name) for run in loaded])
    wide = wide[["run", *wide.columns.drop("run")]]

    write_text_atomically(out, page)
    write_text_atomically(out.with_suffix(".tex"), tex)
    tables = [out.with_suffix(".csv"), out.with_name(f"{out.stem}_overall.csv")]
    write_csv(tables[0], long)
    write_csv(tables[1], comparison, index=True)
    sheets = {"overall": comparison.reset_index(), "by category": wide, "scores": long}
    more = {"corrected": contents.corrected, "differences": contents.differences}
    more |= {table.name: table.numbers for table in contents.extra}
    if contents.evaluated is not None:
        more["evaluation"] = contents.evaluated.long
    for name, file in optional.items():
        file.unlink(missing_ok=True)  # from an earlier call
        if len(more.get(name, ())):
            write_csv(file, more[name])
            tables.append(file)
            sheets[name] = more[name]
    about_the_judge = (BESIDE_CORRECTED, CORRECTED_NOTE) if len(contents.corrected) else (JUDGE_NOTE,)
    write_workbook(out.with_suffix(".xlsx"), sheets, [*NOTES, *about_the_judge])
    compared = ([each] for each in comparison_tables({run.name: run.scores for run in loaded}, contents.corrected))
    also = "" if evaluations is None else " of measurements and evaluations"
    say_report(
        contents.headline,
        group_versions(contents.extra) if groups else compared,
        contents.warnings,
        contents.results,
        contents.remarks,
        closing_line(f"report{also}", out, [*tables, out.with_suffix(".xlsx"), out.with_suffix(".tex")]),
    )
    return out


def evaluations_of(runs: Sequence[Run], unfinished: UnfinishedAs, tell: Callable[[str], None]) -> Evaluations | None:
    """Compares the evaluations in the folders of measurements; None if there are none, or none can be read.

    Args:
        runs: The measurements; the first is the baseline.
        unfinished: See :func:`safervlm.results.runs.load_run`.
        tell: Receives the message if they can't be read.
    """
    there = [run for run in runs if RunFolder(RunFolder(run.folder).evaluation).responses.is_file()]
    if not there:
        return None
    try:
        return compare_evaluations([run.folder for run in there], [run.name for run in there], unfinished)
    except RecordError as error:
        tell(f"the evaluations are not reported: {error}")
        return None


# --- the page ---------------------------------------------------------------------------------------------------------


def render(contents: Contents, out: Path) -> str:
    """Renders the page.

    Args:
        contents: Content of the page.
        out: The page's file, from which images are linked.

    Returns:
        The HTML text.
    """
    runs, evaluated = contents.runs, contents.evaluated
    names = [run.name for run in runs] if runs else evaluated.names if evaluated else []
    manifests = {run.name: dict(run.manifest) for run in runs}
    for name, manifest in evaluated.manifests if evaluated else ():
        prefix = "evaluation, " if runs else ""
        manifests.setdefault(name, {}).update({f"{prefix}{stage}": dict(entry) for stage, entry in manifest.items()})
    ways = [line for run in runs for line in methods(run.scores)] + (evaluated.methods if evaluated else [])
    chosen = examples(runs, out) if runs else {}
    comparison = compare({run.name: run.scores for run in runs})
    long = bool(contents.curve and evaluated)
    return template("report.html.j2").render(
        command=contents.command,
        runs=[{"name": name} for name in names],
        first=first_screen(contents.headline, contents.stated, contents.differences, contents.groups),
        warnings=[without_folders(line) for line in contents.warnings],
        remarks=[without_folders(line) for line in (*contents.results, *contents.remarks)],
        # With curves and evaluations the page would be longer than six screens.
        measured=measured_sections(runs, comparison, contents.corrected, long) if runs else None,
        evaluated=evaluated_sections(evaluated, beside_measurements=bool(runs)) if evaluated else None,
        flipped=[(name, flipped(contents, name, out)) for name in names[1:]],
        examples={CAPABILITY_TITLES[capability]: cards for capability, cards in chosen.items()},
        groups=[table for table in contents.extra if table.name in OF_GROUPS],
        extra=[table for table in contents.extra if table.name not in OF_GROUPS],
        curve=contents.curve,
        calibration=contents.calibration,
        settings=settings_of(list(manifests.items())),
        methods=list(dict.fromkeys(ways)),
        shown=shown,
        judge_note=JUDGE_NOTE,
        beside_corrected=BESIDE_CORRECTED if len(contents.corrected) else JUDGE_NOTE,
        seeds_note=SEEDS_NOTE,
        gap_weights=GAP_WEIGHTS,
        diversity_note=DIVERSITY_NOTE,
    )


def flipped(contents: Contents, name: str, out: Path) -> Cards:
    """Selects the responses of a run that changed between right and wrong, for display.

    Args:
        contents: What the page reports.
        name: The run's name.
        out: The page's file, from which images are linked.
    """
    cards: Cards = {}
    for run in contents.runs:
        if run.name == name:
            cards |= flipped_in_run(run, contents.runs[0], out)
    if contents.evaluated is not None and contents.evaluated.original is not None:
        original, wanted = contents.evaluated.original, contents.evaluated.wanted
        for each in contents.evaluated.evaluations:
            if each.name == name and each is not original:
                cards |= flipped_in_suite(each, original, wanted, out, without_alignment=bool(contents.runs))
    return cards


def template(name: str) -> jinja2.Template:
    """Loads a page's template; all inserted texts are escaped: invisible characters first, then markup.

    Args:
        name: The file's name in ``templates``.
    """

    def escaped(value: Any) -> Any:
        return for_html(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent}
    return environment.get_template(name)
