"""Writes the GPU tables of docs/benchmarks.md from the figures of scripts/gpu_check.py.

python scripts/gpu_check.py --out FOLDER
python scripts/gpu_tables.py FOLDER/gpu_check.json    # also keeps the figures in docs/gpu_check.json
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import write_between

from safervlm.io.reading import read_object

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "gpu_check.json"
# Estimates for an H100 where a figure is missing, for steps without graphs, which launch their kernels one by one:
# kernels as counted on a CPU, at 17 microseconds each.
ESTIMATES: dict[tuple[int, bool], dict[str, str]] = {
    **{(count, False): {"step_ms": "24", "kernels": "1,414"} for count in (1, 16, 64)},
    **{(count, True): {"step_ms": "47", "kernels": "2,758"} for count in (1, 16, 64)},
    (256, False): {"step_ms": "24 to 30", "kernels": "1,414"},
}
NOT_MEASURED = "not measured"
BOUND = 0.05  # largest relative difference of attention that rounding to bfloat16 explains


def cell(entry: Mapping[str, Any], name: str, estimates: Mapping[str, str]) -> str:
    """Formats a figure; an estimate is marked, and a missing figure without an estimate is reported as not measured.

    Args:
        entry: figures of a row.
        name: name of the figure.
        estimates: estimates of the row by the names of the figures.
    """
    value = entry.get(name)
    if value is not None:
        return f"{value:,.0f}" if name in ("launches", "kernels") else f"{value:.3g}"
    return f"{estimates[name]} (estimate)" if name in estimates else NOT_MEASURED


def rate(entry: Mapping[str, Any], count: int) -> str:
    """Formats the examples or questions per second.

    Args:
        entry: figures of a row, with the seconds of a batch.
        count: size of a batch.
    """
    seconds = entry.get("batch_s")
    return NOT_MEASURED if seconds is None else f"{count / seconds:.3g}"


def tables(found: Mapping[str, Any]) -> str:
    """Formats the figures as Markdown; cases without any figure or estimate are left out.

    Args:
        found: content of gpu_check.json.
    """
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"{found['date']}, {found['card']}; {versions}; responses of {found['tokens']} tokens.", ""]
    lines += ["| training | GPU memory, GiB | seconds per batch | examples per second |", "|---|---|---|---|"]
    for entry in found["training"]:
        title = f"{entry['recipe'].upper()}, {entry['examples']} examples a step"
        cells = [cell(entry, "memory", {}), cell(entry, "batch_s", {}), rate(entry, entry["examples"])]
        lines.append(f"| {' | '.join([title, *cells])} |")
    lines += ["", "| generation | GPU memory, GiB | ms per step | launches per step | kernels per step |"]
    lines[-1] += " GPU time per step, ms | responses per second |"
    lines.append("|---|---|---|---|---|---|---|")
    ordered = sorted(found["generation"], key=lambda each: (each["questions"], each["adapter"], each["sampled"]))
    lines += [row for row in map(generation_row, ordered) if row.count(NOT_MEASURED) < 6]
    return "\n".join([*lines, "", tested(found["tests"]), compared(found["attention"])])


def generation_row(entry: Mapping[str, Any]) -> str:
    """Formats the figures of a case as a row of the table.

    Args:
        entry: the case with its figures.
    """
    count, adapter = entry["questions"], entry["adapter"]
    title = f"{count} question{'s' if count > 1 else ''}"
    title += f", {entry['per_image']} per image" if entry["per_image"] > 1 else ""
    title += f", {'sampled' if entry['sampled'] else 'greedy'}{', adapter' if adapter else ''}"
    # Sampling was not estimated.
    estimates = {} if entry["sampled"] else ESTIMATES.get((count, adapter), {})
    cells = [cell(entry, name, estimates) for name in ("memory", "step_ms", "launches", "kernels", "gpu_ms")]
    return f"| {' | '.join([title, *cells, rate(entry, count)])} |"


def tested(tests: Mapping[str, Any]) -> str:
    """Describes the results of the tests marked ``gpu`` in a sentence.

    Args:
        tests: number of tests by outcome.
    """
    if "missing" in tests:
        return f"The tests marked `gpu` were not run ({tests['missing']})."
    return f"Of the tests marked `gpu`, {', '.join(f'{number} {outcome}' for outcome, number in tests.items())}."


def compared(attention: Mapping[str, Any]) -> str:
    """Describes the comparison of attention in a sentence.

    Args:
        attention: relative differences by length.
    """
    what = "Attention with one key-value head in bfloat16 against float32"
    if "missing" in attention:
        return f"{what} was not compared ({attention['missing']})."
    differences = attention["differences"]
    odd = {length: value for length, value in differences.items() if int(length) % 32 == 1}
    wrong = [length for length, value in differences.items() if not value < BOUND]
    said = f"wrong at the lengths {', '.join(wrong)}" if wrong else "rounding only"
    rest = max(value for length, value in differences.items() if length not in odd)
    return f"{what}: {said}; largest difference {max(odd.values()):.2g} at lengths 32 k + 1, {rest:.2g} at others."


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the tables into the page.

    Args:
        arguments: the command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="?", default=FIGURES, help="gpu_check.json (default: the kept one)")
    figures = parser.parse_args(arguments).figures
    text = tables(read_object(figures, "run scripts/gpu_check.py", finite=False))
    if figures.resolve() != FIGURES.resolve():
        shutil.copyfile(figures, FIGURES)
    write_between(PAGE, "gpu", text)
    print(text)


if __name__ == "__main__":
    main()
