"""The confusion matrix of a fitted judge on held-out responses."""

import csv
from collections.abc import Sequence
from pathlib import Path

from safervlm.io.escape import for_csv
from safervlm.io.files import write_atomically
from safervlm.io.tables import TextTable, show_table


def write_confusion(path: Path, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Writes a confusion matrix as CSV.

    Args:
        path: The file.
        labels: The judge's labels.
        counts: Rows are true labels, columns predicted ones.
    """

    def write(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.writer(lines)
            writer.writerow(["label", *map(for_csv, labels)])
            writer.writerows([for_csv(label), *row] for label, row in zip(labels, counts, strict=True))

    write_atomically(path, write)


def show_confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Prints a confusion matrix, and the accuracy.

    Args:
        labels: The judge's labels.
        counts: Rows are true labels, columns predicted ones.
    """
    right, total = sum(row[index] for index, row in enumerate(counts)), sum(map(sum, counts))
    table = TextTable(title=f"Held-out responses: {right} of {total} right ({right / total:.3f})")
    table.add_column("label")
    for label in labels:
        table.add_column(f"classified as {label}", justify="right")
    for label, row in zip(labels, counts, strict=True):
        table.add_row(label, *map(str, row))
    show_table(table)
