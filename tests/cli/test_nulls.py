"""Null for an argument of a class is rejected where its type has no null."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from safervlm.cli.arguments import prepared
from safervlm.cli.lightning import IdleCLI
from safervlm.cli.nulls import allows_null, reject_nulls
from safervlm.errors import ArgumentError


@dataclass
class Size:
    width: int = 1
    height: int | None = None


class Base:
    def __init__(self, rate: float = 0.1, old: int = None) -> None:  # noqa: RUF013 (as other packages write it)
        pass


class Tool(Base):
    def __init__(self, name: str, size: Size, parts: list[Base] | None = None, **kwargs: Any) -> None:
        pass


HERE = Tool.__module__


def tool(**arguments: object) -> dict[str, object]:
    return {"class_path": f"{HERE}.Tool", "init_args": {"name": "x"} | arguments}


@pytest.mark.parametrize(
    "settings",
    [
        tool(parts=None),
        tool(size={"width": 3, "height": None}),
        tool(old=None),
        tool(unknown=None),
        {"class_path": "no.such.Class", "init_args": {"name": None}},
        None,
    ],
)
def test_null_is_accepted_where_it_is_a_value(settings: object) -> None:
    reject_nulls({"model": settings, "trainer": {"callbacks": None}})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (tool(name=None), "--model.name: null is not a valid value, it needs str"),
        (tool(size=None), "--model.size: .* it needs Size"),
        (tool(size={"width": None}), "--model.size.width: .* it needs int"),
        (tool(size=3), "--model.size: settings are needed, got 3"),
        (tool(size=[{"width": 1}]), r"--model.size: settings are needed, got \[{'width': 1}\]"),
        (tool(rate=None), "--model.rate: .* it needs float"),  # an argument of the base class
        (
            tool(parts=[{"class_path": f"{HERE}.Base", "init_args": {"rate": None}}]),
            r"--model.parts.0.rate: .* it needs float",
        ),
    ],
)
def test_null_is_rejected_where_a_value_is_needed(settings: object, named: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{named}"):
        reject_nulls({"model": settings})


@pytest.mark.parametrize(
    ("hint", "allowed"),
    [(Any, True), (object, True), (int | None, True), (Literal["a", None], True), (Literal["a"], False), (int, False)],
)
def test_allows_null_follows_the_type_hint(hint: object, allowed: bool) -> None:
    assert allows_null(hint) is allowed


@pytest.mark.parametrize("argument", ["adapter", "revision"])
def test_null_of_a_class_inside_another_one_is_null(argument: str) -> None:
    line = ["predict", "--config", "configs/measure.yaml", f"--model.vlm.{argument}", "null"]
    vlm = IdleCLI(prepared(line), build=False).config.predict.model.init_args.vlm
    assert vlm.init_args[argument] is None  # not the text "None"
