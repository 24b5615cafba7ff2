"""The command ``report``: the page of measurements or the table of evaluations, depending on the run folders."""

from pathlib import Path

from safervlm.errors import ArgumentError
from safervlm.protocol import CAPABILITIES
from safervlm.records import read_jsonl
from safervlm.reports.evaluation import evaluation
from safervlm.reports.page import report
from safervlm.results.measures import UnfinishedAs
from safervlm.run import read_manifest
from safervlm.run_folder import RunFolder


def report_runs(
    runs: list[Path],
    out: Path | None = None,
    thinking_unfinished: UnfinishedAs = "apart",
    group: list[str] | None = None,
    prevalence: float = 0.5,
) -> Path:
    """Reports measurements on a page with tables and plots, or evaluations in one table; the first run is the baseline.

    Next to FILE.html it writes every number as FILE.csv and FILE.xlsx, and tables as FILE.tex. Folders that contain a
    measurement, and an evaluation in their subfolder, are reported as measurements; the evaluations are RUN/evaluation.

    Args:
        runs: Run folders of measurements or evaluations. The first is the baseline, with which the others are compared.
        out: The HTML file to write; by default report.html, or evaluation.html, in the first run's folder.
        thinking_unfinished: How responses count that ended inside their reasoning, without an answer: "apart" excludes
            them and counts them separately, "N/A" and "wrong" count them as such.
        group: Measurements that differ in their training seed only, ``NAME=PATTERN`` of run folders; may be repeated.
        prevalence: Share of unsafe images among those to be judged, for the area under the precision-recall curve of
            the log-odds.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: See :func:`safervlm.reports.page.report`; or a group is given for evaluations.
        RecordError: A run can't be read.
        SystemExit: With exit code 3 at the end, if some of the evaluations can't be read.
    """
    paths = list(map(Path, runs))
    measured = all(map(holds_measurement, paths))
    evaluated = not measured and any(map(holds_evaluation, paths))
    if not evaluated:
        return report(paths, out, thinking_unfinished, group, prevalence)
    if group:
        raise ArgumentError(f"group: {group[0]!r}: a group is of measurements, but {paths[0]} is an evaluation")
    return evaluation(paths, out, thinking_unfinished)


def holds_measurement(run: Path) -> bool:
    """Returns whether a run folder itself contains a measurement.

    Args:
        run: Run folder.
    """
    return RunFolder(run).responses.is_file() and not holds_suite(run)


def holds_evaluation(run: Path) -> bool:
    """Returns whether a run folder is that of an evaluation, or has one in its subfolder.

    Args:
        run: Run folder.
    """
    return RunFolder(run).evaluation.is_dir() or holds_suite(run)


def holds_suite(run: Path) -> bool:
    """Returns whether the responses of a run are to several datasets at once, or to none of the protocol's questions.

    Args:
        run: Run folder.

    Raises:
        RecordError: Its manifest or responses are damaged.
    """
    settings = read_manifest(run)["stages"].get("measure", {}).get("settings", {})
    if "sets" in settings.get("data", {}):  # of safervlm.data.suite.Suite
        return True
    file = RunFolder(run).responses
    return file.is_file() and all(record.get("capability") not in CAPABILITIES for record in read_jsonl(file))
