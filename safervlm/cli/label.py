"""``safervlm label``: people label a sample of a run's responses, on the terminal or in a sheet."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.escape import for_terminal
from safervlm.io.names import normal_name, not_empty
from safervlm.io.tables import TextTable, say, show_table, write_csv
from safervlm.labelling.labels import LabelFile, complete_raters, labels_of_people, majority
from safervlm.labelling.plan import Plan, labelable, read_plan, write_plan
from safervlm.labelling.sheets import read_sheet, write_sheets
from safervlm.labelling.summary import ACCURACY_OF_JUDGE, ALPHA, CONFUSION, ECE, summary
from safervlm.protocol import NOT_APPLICABLE, OPTIONS, SAFE, UNSAFE
from safervlm.ranges import in_range
from safervlm.records import write_jsonl
from safervlm.reports.tables import records
from safervlm.results.runs import load_run
from safervlm.run import locked
from safervlm.run_folder import RunFolder

Way = Literal["terminal", "sheet", "summary"]
LABELS, SEED = 100, 0  # defaults of a new sample
# Measures of a summary that are printed; its file contains all of them.
TITLES = {
    ALPHA: "Krippendorff's alpha",
    ACCURACY_OF_JUDGE: "accuracy of the judge",
    ECE: "calibration error of the judge",
    CONFUSION: "judge and people",
}
KEYS = {SAFE: "1", UNSAFE: "2", NOT_APPLICABLE: "0"} | {option: option.lower() for option in OPTIONS}
SKIP, QUIT = "s", "q"


def label(
    run: Path,
    using: Way = "terminal",
    labels: int | None = None,
    seed: int | None = None,
    rater: str = "rater 1",
    read: Path | None = None,
) -> None:
    """Lets people label a sample of a run's responses; the labels correct rates for the judge's error.

    The sample is stratified by capability, side, verdict and the judge's confidence. A person sees question and answer,
    but not the verdict, model, right answer or image. Labels are written to labels.jsonl in the run folder immediately,
    and the same command resumes. If at least one person has labelled the whole sample, safervlm report shows corrected
    rates. The agreement of the people with each other and with the judge is written to labels-summary.csv.

    Args:
        run: The folder of a measurement with verdicts.
        using: Where to label.
        labels: Number of responses to sample, by default 100; the sample is larger if needed, because at least five
            responses of each stratum are labelled.
        seed: Seed of the sample, by default 0.
        rater: Name of the person; several may label the same sample.
        read: Filled sheet of labels (.csv or .xlsx) to read.

    Raises:
        ArgumentError: The run has another sample, or an argument is out of its range.
        RecordError: The run, its labels or the sheet can't be read, or the run has changed since the sample was made.
    """
    in_range(least=1, labels=labels)
    in_range(least=0, seed=seed)
    rater = normal_name(not_empty("rater", rater))
    run = Path(run)
    with locked(run):
        rows = labelable(load_run(run))
        plan = planned(run, rows, labels, seed, make=using != "summary" or read is not None)
        with LabelFile(run, rows, plan) as file:
            if read is not None:
                found = read_sheet(Path(read), rows, plan, file, rater)
                for name, given in found.items():
                    file.append(name, given, rater)
                say(f"{read}: {len(found)} new labels by {rater!r}")
            elif using == "sheet":
                for sheet in (RunFolder(run).label_sheet, RunFolder(run).label_sheet.with_suffix(".xlsx")):
                    if sheet.exists():
                        say(f"{sheet}: already exists and is kept; remove it to write an empty one")
                for sheet in write_sheets(run, rows, plan, file):
                    say(f"{sheet}: fill in its column label, then `safervlm label {run} --read FILE --rater NAME`")
            elif using == "terminal":
                ask_for_labels(rows, plan, file, rater)
            elif not file.by_rater:
                say(f"{run}: nobody has labelled yet")
            show_state(run, rows, plan, file)


def planned(run: Path, rows: pd.DataFrame, labels: int | None, seed: int | None, make: bool) -> Plan:
    """Returns the run's sample; makes and writes one if there is none.

    Args:
        run: Run folder.
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        labels: Number of labels; None: as in the existing sample.
        seed: Seed; None: as in the existing sample.
        make: Whether to make a sample if there is none.

    Raises:
        ArgumentError: There is another sample.
        RecordError: The run has no response that can be labelled, has changed since the sample was made, or has no
            sample and none is to be made.
    """
    files = RunFolder(run)
    if rows.empty:
        raise RecordError(f"{files.responses}: no response to label; measure the protocol's questions in the run")
    plan = read_plan(run, rows)
    if plan is None:
        if files.labels.is_file():
            raise RecordError(
                f"{files.labels}: labels without {files.labels_plan.name}; restore that file, or move the labels away"
            )
        if not make:
            raise RecordError(
                f"{files.labels_plan}: no such file: nothing is labelled yet; `safervlm label {run}` begins"
            )
        plan = Plan.make(rows, LABELS if labels is None else labels, SEED if seed is None else seed)
        write_plan(run, plan)
        more = "" if len(plan.sampled) <= plan.labels else ": at least 5 of a stratum, or all, are labelled"
        say(
            f"{files.labels_plan}: {len(plan.sampled)} of {len(rows)} responses sampled, in {len(plan.sizes)} strata"
            f"{more}"
        )
    for name, given, there in (("labels", labels, plan.labels), ("seed", seed, plan.seed)):
        if given not in (None, there):
            raise ArgumentError(
                f"{name}: {files.labels_plan} was made with {there}, got {given}, which needs a new sample; give "
                f"{there}, or move it and {files.labels.name} away"
            )
    return plan


def ask_for_labels(rows: pd.DataFrame, plan: Plan, file: LabelFile, rater: str) -> None:
    """Asks a person for the labels that are missing, one after the other.

    Args:
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        plan: The run's sample.
        file: The run's labels.
        rater: Name of the person.
    """
    texts = rows.set_index("id")
    done = file.by_rater.get(rater, {})
    left = [name for name in plan.sampled if name not in done]
    for number, name in enumerate(left, len(plan.sampled) - len(left) + 1):
        keys = {KEYS[each]: each for each in file.allowed(name)}
        print(f"\n--- {number} of {len(plan.sampled)} ---")
        for title, column in (("Question", "prompt"), ("Answer", "response")):
            print(f"{title}: {for_terminal(texts.at[name, column], lines=True) or '(empty)'}")
        given = key_pressed(keys)
        if given == QUIT:
            return
        if given != SKIP:
            file.append(name, keys[given], rater)


def key_pressed(keys: dict[str, str]) -> str:
    """Prompts until a person types one of the keys.

    Args:
        keys: Key -> label.

    Returns:
        The key, ``s`` (skip) or ``q`` (quit, also at the end of the input).
    """
    shown = ", ".join(f"{key} {name}" for key, name in (keys | {SKIP: "skip for now", QUIT: "quit"}).items())
    while True:
        try:
            typed = input(f"{shown}: ").strip().casefold()
        except EOFError:
            return QUIT
        if typed in keys or typed in (SKIP, QUIT):
            return typed


def show_state(run: Path, rows: pd.DataFrame, plan: Plan, file: LabelFile) -> None:
    """Prints how many labels each person has given and how people and judge agree; writes ``labels-summary.csv``.

    Args:
        run: Run folder.
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        plan: The run's sample.
        file: The run's labels.
    """
    for rater, given in file.by_rater.items():
        say(f"{rater}: {len(given)} of {len(plan.sampled)} labelled")
    write_for_judges(run, rows, plan, file)
    table = summary(rows, plan, file.by_rater)
    if table.empty:
        return
    write_csv(RunFolder(run).labels_summary, table)
    complete = len(complete_raters(file.by_rater, plan))
    raters = "1 rater" if complete == 1 else f"{complete} raters"
    caption = (
        "Shares are of all responses, by the weights of the strata; in brackets 95 % intervals for other samples of "
        f"labels. Labels are those of {raters}"
    )
    printed = TextTable(title="People and judge", caption=caption)
    for heading in ("", "judge", "people", "labels", "value"):
        printed.add_column(heading, justify="right" if heading in ("labels", "value") else "left")
    for line in records(table[table["category"] == ""]):
        if line["measure"] in TITLES and (line["measure"] != CONFUSION or line["labels"]):
            value = "-" if np.isnan(line["value"]) else f"{line['value']:.3f}"  # alpha, undefined for equal labels
            value += "" if np.isnan(line["low"]) else f" [{line['low']:.3f}, {line['high']:.3f}]"
            title = f"{line['capability']}: {TITLES[line['measure']]}"
            printed.add_row(title, line["judge"], line["people"], line["labels"], value)
    show_table(printed)
    say(f"summary, also by category: {RunFolder(run).labels_summary}")


def write_for_judges(run: Path, rows: pd.DataFrame, plan: Plan, file: LabelFile) -> None:
    """Writes the labelled texts as training data for judges: one file for alignment, one for perception.

    The labels are those that correct the rates; if nobody has labelled the whole sample yet, the labels of all raters.

    Args:
        run: Run folder.
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        plan: The run's sample.
        file: The run's labels.
    """
    people = labels_of_people(file.by_rater, plan) or majority(file.by_rater)
    labelled = rows[rows["id"].isin(list(people))]
    seen = labelled["capability"] == "perception"
    for judge, own in (("alignment", labelled[~seen]), ("perception", labelled[seen])):
        pairs = zip(own["id"], own["response"], strict=True)
        lines = [{"id": name, "text": text, "label": people[name]} for name, text in pairs]
        if lines:
            write_jsonl(RunFolder(run).labelled_texts(judge), lines)
