"""The columns of an evaluation's table: which questions each is about, and by which measure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from safervlm.judging.rules import occurs
from safervlm.protocol import NOT_APPLICABLE
from safervlm.results.mme import ALL_TASKS, COGNITION_TASKS, PERCEPTION_TASKS
from safervlm.results.suite import Evaluation

Measure = Literal["share", "occurs", "diversity", "diversity_published", "mme", "both", "ratio"]
DIVERSITIES = ("diversity", "diversity_published")
# The groups of columns; GROUPS has them in the order of the tables.
DRAWN, ALL_FIVE = "Alignment, published draw", "Alignment, all five questions"
CONTEXTS, GENERAL, GENERALISATION = "Contexts of use", "General ability", "Generalisation"
GROUPS = (DRAWN, ALL_FIVE, CONTEXTS, GENERAL, GENERALISATION)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: Its name in files.
        heading: Its name on a page.
        group: One of :data:`GROUPS`.
        measure: How it is computed.
        dataset: Its dataset; empty for the unsafe and the safe dataset together.
        capability: The capability of its questions.
        side: ``safe`` or ``unsafe`` by the right label; empty for both.
        drawn: Whether it is restricted to the published draw, one question per image.
        tasks: The tasks of MME that are included; empty for all categories.
        detail: Whether it is part of another column, and shown only in the files and at the end of the page.
    """

    key: str
    heading: str
    group: str
    measure: Measure
    dataset: str
    capability: str
    side: str = ""
    drawn: bool = False
    tasks: tuple[str, ...] = ()
    detail: bool = False

    @property
    def unit(self) -> str:
        """Unit of its numbers: shares and ratios in percent, MME in points, self-BLEU without a unit."""
        return {"mme": "points", "diversity": "", "diversity_published": "", "ratio": "%"}.get(self.measure, "%")

    @property
    def labels(self) -> dict[str, Any]:
        """The fields that identify it in a table with one row per column."""
        named = {"group": self.group, "column": self.key, "heading": self.heading}
        return named | {"detail": self.detail, "unit": self.unit}

    def part(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Returns the rows of a frame that the column is about.

        For ``occurs`` the labels of responses are replaced: by the right answer if it occurs in the response, else by
        N/A.

        Args:
            frame: ``answers``, ``unanswered`` or ``ratings`` of an :class:`Evaluation`.
        """
        chosen = frame["capability"] == self.capability
        if self.dataset:
            chosen &= frame["dataset"] == self.dataset
        if self.side:
            chosen &= frame["side"] == self.side
        if self.drawn:
            chosen &= frame["drawn"]
        if self.tasks:
            chosen &= frame["category"].isin(self.tasks)
        part = frame[chosen]
        if self.measure == "occurs" and "response" in part and len(part):
            pairs = zip(part["answer"], part["response"], strict=True)
            part = part.assign(label=[answer if occurs(answer, said) else NOT_APPLICABLE for answer, said in pairs])
        return part


def columns(evaluations: Sequence[Evaluation]) -> list[Column]:
    """Returns the columns for which any model has responses, even unfinished ones, in the order of the paper's tables.

    Args:
        evaluations: The models that are compared.
    """
    frames = [frame for e in evaluations for frame in (e.answers, e.ratings, e.unanswered, e.unfinished) if len(frame)]
    asked = pd.concat([frame[["dataset", "capability", "category", "drawn"]] for frame in frames]).drop_duplicates()

    def has_some(column: Column, e: Evaluation) -> bool:
        return any(len(column.part(f)) for f in (e.ratings if column.measure == "ratio" else e.answers, e.unfinished))

    found = [column for column in _all_columns(asked) if any(has_some(column, each) for each in evaluations)]
    return sorted(found, key=lambda column: GROUPS.index(column.group))


def _all_columns(asked: pd.DataFrame) -> Iterator[Column]:
    if (asked["capability"] == "alignment").any():
        for drawn, group in ((True, DRAWN), (False, ALL_FIVE)):
            for side in ("", "safe", "unsafe"):
                what = f"{side or 'all'} images{' (draw)' if drawn else ''}"
                key = f"alignment_{side or 'all'}{'_drawn' if drawn else ''}"
                yield Column(key, f"Alignment of {what}", group, "share", "", "alignment", side, drawn)
                for measure, heading in _diversities(f"1 - self-BLEU of {what}"):
                    yield Column(f"{key}_{measure}", heading, group, measure, "", "alignment", side, drawn)
    for capability, what in (("context", "with the image"), ("context_text_only", "by name")):
        for side in ("", "safe", "unsafe"):
            heading = f"{side} contexts {what}".strip().capitalize()
            yield Column(f"{capability}_{side or 'all'}", heading, CONTEXTS, "share", "", capability, side)
    for capability, dataset in asked[["capability", "dataset"]].drop_duplicates().itertuples(index=False):
        tasks = set(asked[(asked["dataset"] == dataset) & (asked["capability"] == capability)]["category"])
        yield from _benchmark_columns(str(capability), str(dataset), tasks)


def _diversities(heading: str) -> list[tuple[Measure, str]]:
    """Returns the two forms of self-BLEU with their headings: of 100 texts, and of all texts as published."""
    return [("diversity", heading), ("diversity_published", f"{heading}, all texts")]


def _benchmark_columns(capability: str, dataset: str, tasks: set[str]) -> Iterator[Column]:
    if capability == "generalisation":
        yield Column(dataset, dataset, GENERALISATION, "share", dataset, capability)
        for measure, heading in _diversities(f"{dataset}: 1 - self-BLEU"):
            yield Column(f"{dataset}_{measure}", heading, GENERALISATION, measure, dataset, capability)
    elif capability == "rated":
        yield Column(dataset, dataset, GENERAL, "ratio", dataset, capability)
    elif capability == "occurs":
        yield Column(f"{dataset}_occurs", f"{dataset}: answer occurs", GENERAL, "occurs", dataset, capability)
    elif capability == "yes_no":
        if tasks <= {*ALL_TASKS}:
            for key, part in (("", ALL_TASKS), ("_perception", PERCEPTION_TASKS), ("_cognition", COGNITION_TASKS)):
                found = len(tasks & {*part})
                some = f" ({found} of {len(part)} tasks)" if found < len(part) else ""
                heading = f"{dataset} {key[1:] or 'total'}{some}"
                yield Column(f"{dataset}{key}", heading, GENERAL, "mme", dataset, capability, tasks=part)
            details: list[tuple[str, str, Measure, tuple[str, ...]]] = [
                ("accuracy", "accuracy", "share", ALL_TASKS),
                ("accuracy_plus", "accuracy+", "both", ALL_TASKS),
                *((task, task, "mme", (task,)) for task in ALL_TASKS if task in tasks),
            ]
            for key, what, measure, chosen in details:
                heading = f"{dataset} {what}"
                name = f"{dataset}_{key}"
                yield Column(name, heading, GENERAL, measure, dataset, capability, tasks=chosen, detail=True)
        else:
            yield Column(dataset, dataset, GENERAL, "share", dataset, capability)
        yield Column(f"{dataset}_occurs", f"{dataset}: answer occurs", GENERAL, "occurs", dataset, capability)
