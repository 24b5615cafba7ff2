"""Labelled responses: the data that a judge is fitted on."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safervlm.data.loaders import Collator, limited
from safervlm.data.module import Parts, SaferData, name_field
from safervlm.data.tables import TABLES, read_delimited
from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import seed_for
from safervlm.io.names import normal_name, path_text
from safervlm.io.reading import numbered_jsonl
from safervlm.io.tables import TextTable, show_table
from safervlm.protocol import LABELS, Capability
from safervlm.ranges import in_range
from safervlm.records import Example, Question


@dataclass(frozen=True, slots=True)
class LabelCollator:
    """Collates labelled responses into a batch for a judge.

    Attributes:
        labels: Labels that the judge distinguishes, in the order of its outputs.
    """

    labels: tuple[str, ...]

    def __call__(self, answers: Sequence[Example]) -> tuple[list[str], Tensor]:
        """Returns the texts and the indices of their labels (int64 tensor of shape (n,)).

        Args:
            answers: Labelled responses (see :func:`read_labelled`).

        Raises:
            RecordError: An example does not have exactly one text, or its label is not in ``labels``.
        """
        for answer in answers:
            if len(answer.completions) != 1 or answer.question.answer not in self.labels:
                raise RecordError(
                    f"{answer.question.id}: no response labelled {', '.join(self.labels)}; a judge is trained with "
                    "safervlm.data.labelled.LabelledAnswers"
                )
        numbers = torch.tensor([self.labels.index(answer.question.answer) for answer in answers])
        return [answer.completions[0] for answer in answers], numbers


def read_labelled(path: str | Path, labels: Sequence[str]) -> list[Example]:
    """Reads labelled responses.

    Args:
        path: CSV, TSV or JSONL file with the columns ``label`` and ``text`` (or ``response``). Other columns are
            ignored.
        labels: Labels that may occur.

    Returns:
        One example per row. The label is its question's ``answer``, the text its only completion. Ids are
        ``{file}/{row}``, with rows counted from 1, excluding a table's header.

    Raises:
        RecordError: A file or column is missing or a label is unknown (the message names file and line), the file has
            another ending, or there are no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"data.answers: no file {str(path)!r}; name a CSV or JSONL of labelled responses")
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise RecordError(
            f"data.answers: {str(path)!r} is none of {', '.join(TABLES)}; write the responses as one of them"
        )
    # Question requires a capability; the value has no effect here.
    capability: Capability = "perception" if tuple(labels) == LABELS["perception"] else "alignment"
    known = {normal_name(label): label for label in labels}
    answers = []
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    rows = numbered_jsonl(path) if kind == ".jsonl" else read_delimited(path, TABLES[kind])
    for row, (number, record) in enumerate(rows, 1):
        where = f"{path}, line {number}"
        label = name_field(record, ["label"], where)
        if label not in known:
            raise RecordError(
                f"{where}: unknown label {label!r}; write one of {', '.join(labels)}, or set model.labels"
            )
        label = known[label]
        text = record.get("text", record.get("response"))
        if "response" in record and record["response"] != text:
            raise RecordError(f"{where}: has both 'text' and 'response', which differ: remove one of them")
        if not isinstance(text, str):  # an empty response is valid
            raise RecordError(f"{where}: the field 'text' or 'response' must contain the response, got {text!r}")
        question = Question(f"{path.name}/{row}", path.name, str(row), None, capability, 0, "", "", "", label)
        answers.append(Example(question, (text,)))
    if not answers:
        raise RecordError(f"data.answers: {path} has no rows; it needs one labelled response per row")
    return answers


class LabelledAnswers(SaferData):
    """Labelled responses to fit a judge on, with a held-out validation split.

    Whether a response is held out depends on the seed and on its text, not on the order of the rows. Equal texts are
    always in the same split.

    Args:
        answers: CSV, TSV or JSONL file with the columns ``label`` and ``text`` (or ``response``).
        held_out: Expected fraction of responses in the validation split. Each response is assigned independently.
        collator: Function that turns examples into a batch. The command line sets the judge's collator, which also
            defines the labels.
        batch_size: Number of responses per step and process.
        num_workers: Number of processes that prepare batches in advance. Text needs none.
        seed: Seed of the validation split and of the training order.
        limit: Maximum number of responses per label in each of the two splits. None uses all.

    Raises:
        ArgumentError: A number is outside its range.
    """

    def __init__(
        self,
        answers: str,
        held_out: float = 0.2,
        collator: Collator | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(collator, batch_size, num_workers, seed)
        self.limit = limit
        limited((), limit, hash)
        in_range("data", above=0, below=1, held_out=held_out)
        self.answers = path_text("data.answers", answers)
        self.held_out = held_out

    def load(self) -> Parts:
        """Reads the file and splits it into training and validation examples.

        Raises:
            RecordError: A row can't be used (the message names it), or one of the two splits is empty.
        """
        parts = Parts()
        for answer in read_labelled(self.answers, self._labels):
            # Seeds have 63 bits: the quotient is uniform in [0, 1).
            draw = seed_for(self.seed, "held out", answer.completions[0]) / 2**63
            (parts.validation if draw < self.held_out else parts.train).append(answer)
        for name, part in ("train on", parts.train), ("hold out", parts.validation):
            if not part:
                raise RecordError(f"data.answers: nothing to {name} in {self.answers!r} with held_out {self.held_out}")
        return Parts(
            *(limited(part, self.limit, lambda e: e.question.answer) for part in (parts.train, parts.validation))
        )

    @property
    def _labels(self) -> tuple[str, ...]:
        collator = self._collator()
        if not isinstance(collator, LabelCollator):
            raise ArgumentError("data.collator: labelled responses are for fitting a safervlm.judging.classifier.Judge")
        return collator.labels

    def setup(self, stage: str) -> None:
        """Reads the data; before ``fit``, prints the number of responses per label."""
        super().setup(stage)
        if stage != "fit" or (self.trainer is not None and not self.trainer.is_global_zero):
            return
        table = TextTable(title="Labelled answers")
        table.add_column("label")
        for name in "training", "held out":
            table.add_column(name, justify="right")
        counts = [Counter(e.question.answer for e in part) for part in (self.parts.train, self.parts.validation)]
        for label in self._labels:
            table.add_row(label, *(str(count[label]) for count in counts))
        show_table(table)
