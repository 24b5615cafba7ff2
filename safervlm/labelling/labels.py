"""Labels of people: the record, the file that they are appended to, and one label per response of several raters."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd

from safervlm.errors import RecordError
from safervlm.io.fields import check_fields, normalise
from safervlm.labelling.plan import Plan
from safervlm.protocol import LABELS
from safervlm.records import Verdict, read_records, to_line, write_jsonl
from safervlm.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Label:
    """A person's label of a response.

    Attributes:
        id: Id of the question.
        label: One of the labels that the capability's judge assigns.
        rater: Name of the person.
        answer: Fingerprint of the text that the person saw (:meth:`safervlm.records.Verdict.fingerprint_of`).
    """

    id: str
    label: str
    rater: str
    answer: str

    def __post_init__(self) -> None:
        """Normalises the id as the question's, the label, and the name of the person."""
        normalise(self, "id", "label", "rater")

    def to_dict(self) -> dict[str, Any]:
        """Returns the record of ``labels.jsonl``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a record written by :meth:`to_dict`.

        Args:
            record: Fields of the label.

        Raises:
            KeyError: A field is missing.
            RecordError: A field is unknown or has a value of another type.
        """
        names = [field.name for field in fields(cls)]
        if unknown := set(record) - set(names):
            raise RecordError(f"the field {min(unknown)!r} is unknown; a label has {', '.join(names)}")
        check_fields(record, **dict.fromkeys(names, str))
        return cls(**record)


class LabelFile:
    """The labels of a run, appended one by one; each is written at once.

    An incomplete last line, left by a process that died, is removed.

    Args:
        run: Run folder.
        rows: Result of :func:`safervlm.labelling.plan.labelable`, of the run.
        plan: The run's plan.

    Raises:
        RecordError: A line is not a label, is about a response that was not sampled or that has changed, has a label
            that the capability does not have, or is a rater's second label of a response.
    """

    def __init__(self, run: Path, rows: pd.DataFrame, plan: Plan) -> None:
        self.path = RunFolder(run).labels
        sampled = rows[rows["id"].isin(list(plan.sampled))].set_index("id")
        self._texts, self._capabilities = sampled["response"].to_dict(), sampled["capability"].to_dict()
        # Rater -> id -> label; raters in the order of their first labels.
        self.by_rater: dict[str, dict[str, str]] = {}
        self._there = read_records(self.path, Label, torn=True) if self.path.is_file() else []
        for label in self._there:
            if problem := self._problem(label):
                raise RecordError(f"{self.path}: the label of {label.id!r} by {label.rater!r}: {problem}")
            self.by_rater.setdefault(label.rater, {})[label.id] = label.label

    def _problem(self, label: Label) -> str:
        if label.id not in self._texts:
            return "it is not in labels-plan.json; remove the line"
        if label.answer != Verdict.fingerprint_of(self._texts[label.id]):
            return "it is of another text than the run's response; remove the line"
        if label.label not in (allowed := self.allowed(label.id)):
            return f"{label.label!r} is none of {', '.join(allowed)}; correct or remove the line"
        if label.id in self.by_rater.get(label.rater, {}):
            return "it occurs twice; remove one of the two lines"
        return ""

    def allowed(self, name: str) -> tuple[str, ...]:
        """Returns the labels that a response can have.

        Args:
            name: Id of a sampled response.
        """
        return LABELS[self._capabilities[name]]

    def append(self, name: str, label: str, rater: str) -> None:
        """Appends a label.

        Args:
            name: Id of a sampled response.
            label: One of :meth:`allowed`.
            rater: Name of the person.
        """
        record = Label(name, label, rater, Verdict.fingerprint_of(self._texts[name]))
        self._file.write(to_line(record.to_dict()))
        self._file.flush()
        self.by_rater.setdefault(rater, {})[name] = label

    def __enter__(self) -> Self:
        """Opens the file for appending."""
        if self.path.is_file():
            write_jsonl(self.path, [label.to_dict() for label in self._there])  # removes an incomplete last line
        self._file = self.path.open("a", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes the file."""
        self._file.close()


def complete_raters(by_rater: Mapping[str, Mapping[str, str]], plan: Plan) -> list[str]:
    """Returns the raters who labelled the whole sample.

    Args:
        by_rater: Rater -> id -> label.
        plan: The run's plan.
    """
    return [rater for rater, labels in by_rater.items() if labels.keys() >= plan.sampled.keys()]


def majority(by_rater: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Returns the label of each response that most raters gave, in a tie that of the rater who began first.

    Args:
        by_rater: Rater -> id -> label.

    Returns:
        Id -> label, of the responses that anyone labelled.
    """
    given: dict[str, list[str]] = {}
    for labels in by_rater.values():
        for name, label in labels.items():
            given.setdefault(name, []).append(label)
    # Counter keeps the order of insertion, also of equal counts.
    return {name: Counter(labels).most_common(1)[0][0] for name, labels in given.items()}


def labels_of_people(by_rater: Mapping[str, Mapping[str, str]], plan: Plan) -> dict[str, str] | None:
    """Returns one label per sampled response: the :func:`majority` of the raters who labelled the whole sample.

    Args:
        by_rater: Rater -> id -> label.
        plan: The run's plan.

    Returns:
        Id -> label; None if no rater labelled the whole sample.
    """
    return majority({rater: by_rater[rater] for rater in complete_raters(by_rater, plan)}) or None
