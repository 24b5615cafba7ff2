"""How far measurements are: a table of run folders and capabilities, complete, partial, or failed and why."""

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
    """Capability -> how far it is."""
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
    """What has been answered, in the merged file or in shards; an interrupted run has the latter."""
    merged = run / "responses.jsonl"
    records = {record["id"]: record for record in read_jsonl(merged)} if merged.exists() else {}
    for shard in (run / "shards" / "responses").glob("*.jsonl"):
        records |= {record["id"]: record for record in read_torn_jsonl(shard)}
    return list(records.values())


def capability(name: str) -> str:
    """The capability that a record's id names."""
    return name.split("/")[-2]


def command(run: Path) -> str:
    """The one that measured last."""
    stage = read_manifest(run)["stages"]["measure"]
    first: str = stage["provenance"]["command"]
    return str(stage["continued"][-1].get("command", first)) if stage.get("continued") else first


def last_line(run: Path) -> str:
    """What the run said last."""
    log = run.with_name(f"{run.name}.log")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].removeprefix("safervlm: error: ") if lines else "nothing was written"


def main() -> None:
    """Prints the table; with --complete only the exit code says whether the command has completed the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--complete", metavar="COMMAND", help="no table: exit code 0 if this command has completed them"
    )
    options = parser.parse_args()
    if options.complete:
        typed = re.sub(r" --limit(?==| |$)", " --data.limit", options.complete)  # as the command line takes it
        complete = all(finished(run, "measure") and command(run) == typed for run in options.runs)
        sys.exit(0 if complete else 1)
    table = Table(title="What is measured: answers")
    for heading in ("run", *CAPABILITIES):
        table.add_column(heading, overflow="fold")
    for run in options.runs:
        table.add_row(*map(Text, (run.name, *state(run).values())))  # as it is: no markup
    Console().print(table)


if __name__ == "__main__":
    main()
