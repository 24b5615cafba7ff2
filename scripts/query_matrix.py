"""Prints the progress of measurements as a table of run folders and capabilities: complete, partial, or failed."""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from safervlm.protocol import CAPABILITIES
from safervlm.records import FAILED, read_jsonl, read_torn_jsonl
from safervlm.run import finished, read_manifest


def state(run: Path) -> dict[str, str]:
    """Returns the progress of a run folder, as a text per capability.

    Args:
        run: the run folder.
    """
    failed = Counter(capability(record["id"]) for record in read_jsonl(run / FAILED)) if (run / FAILED).exists() else {}
    answered = Counter(record["capability"] for record in answers(run))
    if not answered and not failed:
        return dict.fromkeys(CAPABILITIES, f"failed: {last_line(run)}")
    states = {}
    for name in CAPABILITIES:
        if finished(run, "measure"):
            states[name] = f"complete, {answered[name]}" if answered[name] else "not asked"
        elif failed.get(name):
            states[name] = f"partial, {answered[name]} ({failed[name]} have no answer)"
        elif (run / "responses.jsonl").exists():
            states[name] = f"complete, {answered[name]}" if answered[name] else "not asked"
        else:
            states[name] = f"partial, {answered[name]}: {last_line(run)}"
    return states


def answers(run: Path) -> list[dict[str, str]]:
    """Returns the records of the merged file and of the shards; an interrupted run has the latter.

    Args:
        run: the run folder.
    """
    merged = run / "responses.jsonl"
    records = {record["id"]: record for record in read_jsonl(merged)} if merged.exists() else {}
    for shard in (run / "shards" / "responses").glob("*.jsonl"):
        records |= {record["id"]: record for record in read_torn_jsonl(shard)}
    return list(records.values())


def capability(name: str) -> str:
    """Returns the capability of a record.

    Args:
        name: the id of the record.
    """
    return name.split("/")[-2]


def command(run: Path) -> str:
    """Returns the command line that measured last.

    Args:
        run: the run folder.
    """
    stage = read_manifest(run)["stages"]["measure"]
    first: str = stage["provenance"]["command"]
    return str(stage["continued"][-1].get("command", first)) if stage.get("continued") else first


def last_line(run: Path) -> str:
    """Returns the last line of a run's log, which lies beside the run folder.

    Args:
        run: the run folder.
    """
    log = run.with_name(f"{run.name}.log")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].removeprefix("safervlm: error: ") if lines else "nothing was written"


def main() -> None:
    """Prints the table, or with --complete only sets the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--complete",
        metavar="COMMAND",
        help="print no table; exit with code 0 if this command has completed all runs, else 1",
    )
    options = parser.parse_args()
    if options.complete:
        typed = re.sub(r" --limit(?==| |$)", " --data.limit", options.complete)  # as the command line expands it
        complete = all(finished(run, "measure") and command(run) == typed for run in options.runs)
        sys.exit(0 if complete else 1)
    table = Table(title="What is measured: answers")
    for heading in ("run", *CAPABILITIES):
        table.add_column(heading, overflow="fold")
    for run in options.runs:
        table.add_row(*map(Text, (run.name, *state(run).values())))  # plain text: rich markup is not interpreted
    Console().print(table)


if __name__ == "__main__":
    main()
