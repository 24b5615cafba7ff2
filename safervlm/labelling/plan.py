"""The sample of a run's responses that people label, stored in the run folder.

It is stratified by capability, side, verdict and the judge's confidence (:mod:`safervlm.statistics.correction`), and
valid only for the responses and verdicts that it was made for.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from safervlm.errors import RecordError
from safervlm.hashing import fingerprint, seed_for
from safervlm.io.fields import check_fields
from safervlm.io.files import write_text_atomically
from safervlm.io.reading import json_text, read_object
from safervlm.protocol import CAPABILITIES, LABELS
from safervlm.run_folder import RunFolder
from safervlm.statistics.correction import allocation, sample, strata_of_verdicts
from safervlm.statistics.intervals import Floats, Numbers


def labelable(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the responses that can be sampled, by id: those to the protocol's questions, with finished thinking.

    Args:
        frame: Result of :func:`safervlm.results.runs.load_run`.
    """
    rows = frame[frame["capability"].isin(CAPABILITIES) & ~frame["unfinished"].astype(bool)]
    return rows.sort_values("id", ignore_index=True)


@dataclass(frozen=True, slots=True)
class Strata:
    """The strata of the responses of :func:`labelable`.

    Attributes:
        verdicts: (responses,) the judge's verdict, as its index among the labels of the capability.
        confidence: (responses,) the judge's probability of it.
        numbers: (responses,) the stratum, as a number from 0 without gaps.
    """

    verdicts: Numbers
    confidence: Floats
    numbers: Numbers

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Self:
        """Computes the strata.

        Args:
            rows: Result of :func:`labelable`.
        """
        pairs = zip(rows["capability"], rows["label"], strict=True)
        verdicts = np.array([LABELS[capability].index(label) for capability, label in pairs], int)
        pairs = zip(rows["probabilities"], rows["label"], strict=True)
        confidence = np.clip(np.array([by_label[label] for by_label, label in pairs], np.float64), 0, 1)
        cells = (rows["capability"] + "/" + rows["side"]).to_numpy(str)
        numbers = np.unique(cells, return_inverse=True)[1]
        return cls(verdicts, confidence, strata_of_verdicts(numbers, verdicts, confidence))


def state_of_verdicts(rows: pd.DataFrame) -> str:
    """Returns a hash of everything that a plan depends on: responses, right answers and verdicts.

    Args:
        rows: Result of :func:`labelable`.
    """
    columns = rows[["id", "prompt", "answer", "response", "label", "probabilities", "judge"]]
    return fingerprint(*(json.dumps(row, sort_keys=True) for row in columns.itertuples(index=False, name=None)))


@dataclass(frozen=True, slots=True)
class Plan:
    """A stratified sample of responses to label.

    Attributes:
        seed: Seed of the sample.
        labels: Requested number of labels; the sample is larger if the minimum number per stratum requires it.
        judges: The judges of the verdicts, sorted.
        verdicts: Result of :func:`state_of_verdicts`.
        sizes: (strata,) number of responses in each stratum.
        sampled: Id of a sampled response -> its stratum, in random order.
    """

    seed: int
    labels: int
    judges: tuple[str, ...]
    verdicts: str
    sizes: tuple[int, ...]
    sampled: dict[str, int]

    @classmethod
    def make(cls, rows: pd.DataFrame, labels: int, seed: int) -> Self:
        """Samples responses.

        Args:
            rows: Result of :func:`labelable`, at least one.
            labels: Number of labels.
            seed: Seed of the sample.
        """
        strata = Strata.of(rows)
        wanted = allocation(strata.numbers, strata.confidence, labels)
        chosen = sample(strata.numbers, wanted, np.random.default_rng(seed_for(seed, "label")))
        names = rows["id"].tolist()
        sampled = {names[place]: int(strata.numbers[place]) for place in chosen.tolist()}
        sizes = tuple(map(int, np.bincount(strata.numbers)))
        return cls(seed, labels, tuple(sorted(set(rows["judge"]))), state_of_verdicts(rows), sizes, sampled)

    @property
    def wanted(self) -> Numbers:
        """(strata,) number of labels of each stratum."""
        return np.bincount([*self.sampled.values()], minlength=len(self.sizes))

    def codes(self, rows: pd.DataFrame) -> dict[str, str]:
        """Returns a code for each sampled response, in the order of the sample.

        An id names dataset and concept, which may reveal the right answer. A code is different in each run, so the
        sheet of one can't be used for another. It begins with a letter, because a spreadsheet would read some as
        numbers.

        Args:
            rows: Result of :func:`labelable`.

        Returns:
            Code -> id.
        """
        texts = dict(zip(rows["id"], rows["response"], strict=True))
        return {f"r{fingerprint(self.verdicts, str(self.seed), name, texts[name])}": name for name in self.sampled}

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``labels-plan.json``."""
        return {
            "seed": self.seed,
            "labels": self.labels,
            "judges": list(self.judges),
            "verdicts": self.verdicts,
            "strata": [
                {"responses": size, "labels": int(count)} for size, count in zip(self.sizes, self.wanted, strict=True)
            ],
            "sampled": [{"id": name, "stratum": stratum} for name, stratum in self.sampled.items()],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a plan written by :meth:`to_dict`.

        Args:
            record: Fields of the plan.

        Raises:
            KeyError: A field is missing.
            RecordError: A field has another type, or the plan is inconsistent.
        """
        check_fields(record, seed=int, labels=int, verdicts=str, judges=list, strata=list, sampled=list)
        for stratum in record["strata"]:
            check_fields(dict(stratum), responses=int, labels=int)
        for one in record["sampled"]:
            check_fields(dict(one), id=str, stratum=int)
        sampled = {one["id"]: one["stratum"] for one in record["sampled"]}
        sizes = tuple(stratum["responses"] for stratum in record["strata"])
        judges = tuple(map(str, record["judges"]))
        plan = cls(record["seed"], record["labels"], judges, record["verdicts"], sizes, sampled)
        if plan.to_dict()["strata"] != record["strata"] or len(sampled) < len(record["sampled"]):
            raise RecordError("its strata don't have the responses that are sampled")
        return plan


def read_plan(run: Path, rows: pd.DataFrame) -> Plan | None:
    """Reads the plan of a run.

    Args:
        run: Run folder.
        rows: Result of :func:`labelable`, of the same run.

    Returns:
        The plan; None if there is none.

    Raises:
        RecordError: The plan is damaged, or was made for other responses or verdicts.
    """
    files = RunFolder(run)
    path = files.labels_plan
    if not path.is_file():
        return None
    remedy = f"restore it, or move it and {files.labels.name} away and label a new sample"
    record = read_object(path, remedy)
    try:
        plan = Plan.from_dict(record)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise RecordError(f"{path}: damaged ({reason}); {remedy}") from None
    if plan.verdicts != state_of_verdicts(rows):
        raise RecordError(
            f"{path}: the run's responses or verdicts have changed since it was made; restore them, or move it and "
            f"{files.labels.name} away and label a new sample"
        )
    numbers = Strata.of(rows).numbers
    of_id = dict(zip(rows["id"], map(int, numbers), strict=True))
    same = plan.sizes == tuple(map(int, np.bincount(numbers)))
    if not same or any(of_id.get(name) != stratum for name, stratum in plan.sampled.items()):
        raise RecordError(f"{path}: its strata are not those of the run's verdicts; {remedy}")
    return plan


def write_plan(run: Path, plan: Plan) -> None:
    """Writes the plan of a run.

    Args:
        run: Run folder.
        plan: The plan.
    """
    text = json_text(plan.to_dict(), indent=1) + "\n"
    write_text_atomically(RunFolder(run).labels_plan, text)
