"""Several datasets combined, so that one run evaluates a model on all of them."""

import re
from inspect import signature
from typing import Any, Literal

from safervlm.data.loaders import Collator
from safervlm.data.module import Parts, SaferData
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.tables import say
from safervlm.records import Example


class Suite(SaferData):
    """The questions of several datasets (safervlm predict).

    Unavailable datasets are skipped with a warning; the others are used. If the command is repeated, a skipped
    dataset is used as soon as it is available.

    Args:
        sets: Data module of each dataset, by a name of your choice.
        own: Custom datasets in the same form, in addition to those of a recipe: ``--data.own '{mine: my/set.yaml}'``.
        only: Names of the datasets to use. None uses all. Existing responses to the others are kept.
        limit: Maximum number of images per dataset.
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of questions per step and process. ``auto`` starts with 256 and halves the number until a
            batch fits into GPU memory.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.

    Raises:
        ArgumentError: There are no datasets, a name is not a text, unknown or used twice, or the limit is below 1 or
            not supported by a dataset.
    """

    keeps_others = True

    def __init__(
        self,
        sets: dict[str, SaferData],
        own: dict[str, SaferData] | None = None,
        only: list[str] | None = None,
        limit: int | None = None,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(collator, batch_size, num_workers)
        if not sets and not own:
            raise ArgumentError("data.sets: is empty: name at least one dataset")
        for argument, named in ("data.sets", sets), ("data.own", own or {}):
            for name in named:
                if not isinstance(name, str) or not name.strip():
                    raise ArgumentError(f"{argument}: a dataset's name must be a text, got {name!r}: put it in quotes")
        if only is not None and not only:
            raise ArgumentError("data.only: is empty: name a dataset, or leave the argument out to use all")
        if twice := sets.keys() & (own or {}).keys():
            raise ArgumentError(f"data.own: {min(twice)!r} is one of data.sets already; give it another name")
        self.own = own or {}
        sets = sets | self.own
        if limit is not None and limit < 1:
            raise ArgumentError(f"data.limit: at least 1, or null, got {limit}")
        if unknown := [name for name in only or [] if name not in sets]:
            raise ArgumentError(f"data.only: no dataset {unknown[0]!r}; there are {', '.join(sets)}")
        self.sets = {name: data for name, data in sets.items() if only is None or name in only}
        self.left_out: dict[str, str] = {}
        if limit is not None:
            for name, data in self.sets.items():
                if not hasattr(data, "limit"):
                    raise ArgumentError(f"data.limit: the dataset {name!r} ({type(data).__name__}) can't be limited")
                data.limit = limit

    def prepare_data(self) -> None:
        """Prepares each dataset, on one process; reports the unavailable ones."""
        for name, data in self.sets.items():
            try:
                data.prepare_data()
            except RecordError as error:
                self.left_out[name] = self.reason(name, error)
                say(f"{name} is skipped: {self.left_out[name]}")

    def load(self) -> Parts:
        """Concatenates the questions of the available datasets.

        Raises:
            RecordError: No dataset is available, or two contain questions of the same dataset name and capability.
        """
        examples: list[Example] = []
        sets: dict[tuple[str, str], str] = {}
        for name, data in self.sets.items():
            try:
                mine = data.parts.predict
            except RecordError as error:
                if name not in self.left_out and (self.trainer is None or self.trainer.is_global_zero):
                    say(f"{name} is skipped: {self.reason(name, error)}")
                self.left_out.setdefault(name, self.reason(name, error))  # prepare_data may have reported it already
                continue
            for part in sorted({(example.question.dataset, example.question.capability) for example in mine}):
                if (other := sets.setdefault(part, name)) != name:
                    raise RecordError(
                        f"data.sets: {other} and {name} both contain {part[1]} questions of {part[0]!r}, which "
                        "would be one in every table; give one of them another data.name"
                    )
            examples += mine
        if not examples:
            raise RecordError(f"data.sets: none of {', '.join(self.left_out)} is available; the reasons are above")
        return Parts(predict=examples)

    def most_repeats(self) -> int:
        """Returns how often the most repeated question of any dataset is asked."""
        return max(data.most_repeats() for data in self.sets.values())

    def describe(self) -> dict[str, Any]:
        """Combines the descriptions of the available datasets."""
        _ = self.parts  # determines which datasets are available
        there = {name: data for name, data in self.sets.items() if name not in self.left_out}
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": kind, "sets": {name: data.describe() for name, data in there.items()}}

    def reason(self, name: str, error: RecordError) -> str:
        """Returns why a dataset is unavailable.

        Args:
            name: Name of the dataset in the suite.
            error: Error raised by the dataset.

        Returns:
            The error's message, in which settings of the dataset, such as ``data.source``, are replaced by those of the
            suite, such as ``data.sets.NAME.source`` or ``data.own.NAME.source``.
        """
        arguments = "|".join(signature(type(self.sets[name])).parameters)
        where = f"data.{'own' if name in self.own else 'sets'}.{name}."
        return re.sub(rf"(?<![/.\w])data\.(?=({arguments})\b)", where, str(error))
