"""Several sets as one: the evaluation of a model, which is read once for all of them."""

import re
from inspect import signature
from typing import Any, Literal

from safervlm.data.loaders import Collator
from safervlm.data.module import Parts, SaferData
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.tables import say
from safervlm.records import Example


class Suite(SaferData):
    """The questions of several sets (safervlm predict).

    A set that can't be had is left out, and said: the others are asked. The same command asks it when it is there.

    Args:
        sets: the data of each set, by a name of your choice.
        own: more sets in the same form, beside those of a recipe: ``--data.own '{mine: my/set.yaml}'``.
        only: asks only these of them; None asks all. What others have answered before stays.
        limit: asks about this many images of each set.
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: questions a step and process; ``auto`` begins with 256 and halves them until they fit into the
            memory of the GPU.
        num_workers: processes that load images ahead; 0 loads them in the main process.
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
            raise ArgumentError("data.sets: is empty: name a set, or several")
        for argument, named in ("data.sets", sets), ("data.own", own or {}):
            for name in named:
                if not isinstance(name, str) or not name.strip():
                    raise ArgumentError(f"{argument}: a set's name must be a text, got {name!r}: put it in quotes")
        if only is not None and not only:
            raise ArgumentError("data.only: is empty: name a set, or leave the argument out to ask all")
        if twice := sets.keys() & (own or {}).keys():
            raise ArgumentError(f"data.own: {min(twice)!r} is one of data.sets already; give it another name")
        self.own = own or {}
        sets = sets | self.own
        if limit is not None and limit < 1:
            raise ArgumentError(f"data.limit: at least 1, or none, got {limit}")
        if unknown := [name for name in only or [] if name not in sets]:
            raise ArgumentError(f"data.only: no set {unknown[0]!r}; there are {', '.join(sets)}")
        self.sets = {name: data for name, data in sets.items() if only is None or name in only}
        self.left_out: dict[str, str] = {}
        if limit is not None:
            for name, data in self.sets.items():
                if not hasattr(data, "limit"):
                    raise ArgumentError(f"data.limit: the set {name!r} ({type(data).__name__}) can't be limited")
                data.limit = limit

    def prepare_data(self) -> None:
        """Fetches what isn't there, on one process; says what can't be had."""
        for name, data in self.sets.items():
            try:
                data.prepare_data()
            except RecordError as error:
                self.left_out[name] = self.reason(name, error)
                say(f"{name} is left out: {self.left_out[name]}")

    def load(self) -> Parts:
        """The questions of one set after the other."""
        examples: list[Example] = []
        sets: dict[tuple[str, str], str] = {}
        for name, data in self.sets.items():
            try:
                mine = data.parts.predict
            except RecordError as error:
                if name not in self.left_out and (self.trainer is None or self.trainer.is_global_zero):
                    say(f"{name} is left out: {self.reason(name, error)}")
                self.left_out.setdefault(name, self.reason(name, error))  # it may have been said already
                continue
            for part in sorted({(example.question.dataset, example.question.capability) for example in mine}):
                if (other := sets.setdefault(part, name)) != name:
                    raise RecordError(
                        f"data.sets: {other} and {name} both hold {part[1]} questions of {part[0]!r}, which would be "
                        "one in every table; give one of them another data.name"
                    )
            examples += mine
        if not examples:
            raise RecordError(f"data.sets: none of {', '.join(self.left_out)} can be had; the reasons stand above")
        return Parts(predict=examples)

    def describe(self) -> dict[str, Any]:
        """Each set's own description, without those that are left out."""
        _ = self.parts  # finds out what can be had
        there = {name: data for name, data in self.sets.items() if name not in self.left_out}
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": kind, "sets": {name: data.describe() for name, data in there.items()}}

    def reason(self, name: str, error: RecordError) -> str:
        """Why a set can't be had; an argument that the error names is one of the set's."""
        arguments = "|".join(signature(type(self.sets[name])).parameters)
        where = f"data.{'own' if name in self.own else 'sets'}.{name}."
        return re.sub(rf"(?<![/.\w])data\.(?=({arguments})\b)", where, str(error))
