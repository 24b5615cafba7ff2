"""Settings, flattened and read from a file."""

from pathlib import Path

import pytest

from safervlm.errors import RecordError
from safervlm.io.settings import LARGEST, flat, read_settings, read_yaml


def test_settings_are_flattened() -> None:
    assert dict(flat({"a": {"b": {"c": 1}}, "d": [2]})) == {"a.b.c": 1, "d": [2]}
    nested = {"a": [{"b": 1}, {"b": "x"}], "c": {"d": None}}
    assert dict(flat(nested, lists=True)) == {"a.0.b": 1, "a.1.b": "x", "c.d": None}
    assert dict(flat({"a": 1}, "model")) == {"model.a": 1}
    assert dict(flat({})) == {}


def test_a_large_file_is_no_bomb(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_text(f"[{', '.join(map(str, range(LARGEST + 10)))}]")
    assert len(read_yaml(file)) == LARGEST + 10


def test_a_value_that_holds_itself_is_rejected_in_a_large_file_too(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(f"numbers: [{', '.join(map(str, range(LARGEST + 10)))}]\nitself: &a [*a]\n")
    with pytest.raises(RecordError, match="its aliases"):
        read_yaml(file, error=RecordError)


def test_the_error_is_of_the_class_that_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "predict.yaml"
    file.write_text("a: 1\na: 2\n")
    with pytest.raises(RecordError, match=r"predict.yaml, line 2: the key 'a' is there twice; leave one out"):
        read_settings(file, error=RecordError)
