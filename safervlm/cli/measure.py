"""``safervlm measure``: measures several VLMs, one after the other, and prints the progress of each."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safervlm.cli.sequence import finish, is_shipped, play, recipe_file, recipes, typed
from safervlm.errors import RecordError
from safervlm.io.tables import TextTable, say, show_table
from safervlm.protocol import CAPABILITIES
from safervlm.records import Failure, Response, read_records
from safervlm.run import finished, read_manifest
from safervlm.run_folder import RunFolder
from safervlm.vlm.thinking import thinking_unfinished

HELP = """usage: safervlm measure [VLM...] [OPTIONS] [ARGUMENTS of safervlm predict]

Measures VLMs with the published questions, each in its own run folder and process:
  safervlm measure llava-1.5-7b qwen2-vl-7b --limit 20

A VLM is the name of a file in configs/vlm/ without its extension, or the path of another such file. The default is all
files in configs/vlm/. In the ARGUMENTS, {} is replaced by the name of the VLM. Complete measurements are not repeated,
a failed one does not stop the others, and the same command resumes. At the end a table of VLMs and capabilities is
printed. The exit code is 1 after a failure, 3 if something has no response; 2 if the first one rejects the ARGUMENTS.

  --runs FOLDER   each VLM has the run folder FOLDER/VLM and the log FOLDER/VLM.log (default: runs/query)
  --pictograms    measure on the pictograms, by default their VLM: --config configs/pictograms/measure.yaml
"""


def measure_vlms(words: Sequence[str]) -> None:
    """Measures each VLM and prints a table of the progress.

    Args:
        words: Words of the command line after ``measure``.

    Raises:
        ArgumentError: A VLM does not exist.
        SystemExit: With exit code 1 if a measurement failed, 3 if something has no response, 2 if the first measurement
            rejects the arguments.
    """
    given = typed(words, {"runs": "runs/query"})
    pictograms = bool(given.options["pictograms"])
    overlay = ["--config", "configs/pictograms/measure.yaml"] if pictograms else []
    every = ["configs/pictograms/vlm.yaml"] if pictograms else recipes("configs/vlm")
    files = [recipe_file(name, "configs/vlm") for name in given.names or every]
    runs = [Path(given.options["runs"]) / Path(file).stem for file in files]
    failed, partial = [], []
    # A command that rejects its arguments ends the sequence only if the others have the same arguments.
    first = len(files) == 1 or (bool(given.rest) and is_shipped(files[0]))
    for file, run in zip(files, runs, strict=True):
        line = ["predict", "--config", "configs/measure.yaml", *overlay]
        line += [*(word.replace("{}", run.name) for word in given.rest), "--model.vlm", file]
        line += ["--run", str(run)]
        if has_completed(run, line):
            say(f"{run}: complete, skipped")
            continue
        say(f"{run.name}: measuring into {run}")
        run.parent.mkdir(parents=True, exist_ok=True)
        code = play(line, log=log_of(run), first=first)
        first = False
        if code == 3:
            partial.append(f"{run}: some questions have no response, see the table; the same command asks them again")
        elif code:
            failed.append(f"{run} (exit code {code}), see {log_of(run)}")
    table = TextTable("What is measured: responses")
    for heading in ("run", *CAPABILITIES):
        table.add_column(heading, overflow="fold")
    for run in runs:
        try:
            states = progress_of(run)
        except RecordError as error:
            states = dict.fromkeys(map(str, CAPABILITIES), f"failed: {error}")
        table.add_row(run.name, *states.values())
    show_table(table)
    finish(failed, partial)


def progress_of(run: Path) -> dict[str, str]:
    """Returns the progress of a measurement, as a text per capability.

    Args:
        run: Run folder.

    Raises:
        RecordError: A line of the run's files is not a record.
    """
    files = RunFolder(run)
    unanswered = read_records(files.failed, Failure) if files.failed.exists() else []
    failed = Counter(failure.question.capability for failure in unanswered)
    responses = responses_of(run)
    answered = Counter(response.question.capability for response in responses)
    inside = Counter(response.question.capability for response in responses if thinking_unfinished(response))
    if not answered and not failed:
        return dict.fromkeys(map(str, CAPABILITIES), f"failed: {last_line(run)}")
    states: dict[str, str] = {}
    for name in CAPABILITIES:
        if failed.get(name):
            states[name] = f"partial, {answered[name]} ({failed[name]} have no response)"
        elif finished(run, "measure") or files.responses.exists():
            states[name] = f"complete, {answered[name]}" if answered[name] else "not asked"
        else:
            states[name] = f"partial, {answered[name]}: {last_line(run)}"
        if inside[name]:
            states[name] += f"; thinking unfinished: {inside[name]}"
    return states


def responses_of(run: Path) -> list[Response]:
    """Returns the responses in the merged file and in the shards; an interrupted run has the latter.

    Args:
        run: Run folder.

    Raises:
        RecordError: A line is not a response.
    """
    files = RunFolder(run)
    there = read_records(files.responses, Response) if files.responses.exists() else []
    for shard in sorted((files.shards / "responses").glob("*.jsonl")):
        there += read_records(shard, Response, torn=True)
    return list({response.id: response for response in there}.values())


def has_completed(run: Path, line: Sequence[str]) -> bool:
    """Returns whether a run folder was completed by a command line, and has not been continued by another one since.

    Args:
        run: Run folder.
        line: Words of the command line.
    """
    try:
        stage = read_manifest(run)["stages"].get("measure", {})
    except RecordError:
        return False  # the measurement reports the error
    first = stage.get("provenance", {}).get("command")
    last = stage["continued"][-1].get("command", first) if stage.get("continued") else first
    return bool(stage.get("finished")) and last == " ".join(["safervlm", *line])


def log_of(run: Path) -> Path:
    """Returns the file with the output of a measurement, which is next to its run folder.

    Args:
        run: Run folder.
    """
    return run.with_name(f"{run.name}.log")


def last_line(run: Path) -> str:
    """Returns the last line of a run's log.

    Args:
        run: Run folder.
    """
    log = log_of(run)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("safervlm: error: ") if lines else "nothing was written"
