"""Settings files: reading, flattening, and duplicate or recursive values."""

from pathlib import Path

import pytest
import yaml

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.settings import LARGEST, flat, from_yaml, read_settings, read_yaml


def test_settings_are_flattened() -> None:
    assert dict(flat({"a": {"b": {"c": 1}}, "d": [2]})) == {"a.b.c": 1, "d": [2]}
    nested = {"a": [{"b": 1}, {"b": "x"}], "c": {"d": None}}
    assert dict(flat(nested, lists=True)) == {"a.0.b": 1, "a.1.b": "x", "c.d": None}
    assert dict(flat({"a": 1}, "model")) == {"model.a": 1}
    assert dict(flat({})) == {}


def test_large_file_without_aliases_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_text(f"[{', '.join(map(str, range(LARGEST + 10)))}]")
    assert len(read_yaml(file)) == LARGEST + 10


def test_recursive_alias_is_rejected_in_a_large_file(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(f"numbers: [{', '.join(map(str, range(LARGEST + 10)))}]\nitself: &a [*a]\n")
    with pytest.raises(RecordError, match="its aliases"):
        read_yaml(file, error=RecordError)


def test_error_has_the_requested_class(tmp_path: Path) -> None:
    file = tmp_path / "predict.yaml"
    file.write_text("a: 1\na: 2\n")
    with pytest.raises(RecordError, match=r"predict.yaml, line 2: the key 'a' occurs twice; leave one out"):
        read_settings(file, error=RecordError)


TWICE = {
    "a: 1\nb: 2\na: 3\n": ("line 3", "a"),
    "yes: 1\ntrue: 2\n": ("line 2", "true"),
    "1: x\n0x1: y\n": ("line 2", "0x1"),
    "1: x\n'1': y\n": ("line 2", "1"),
    "a: &a {x: 1}\nb: &b {x: 2}\nc:\n  <<: *a\n  <<: *b\n": ("line 5", "<<"),
    "a: [{x: 1, x: 2}]\n": ("line 1", "x"),
}


@pytest.mark.parametrize("text", TWICE, ids=repr)
def test_error_names_a_duplicate_yaml_key(text: str) -> None:
    line, key = TWICE[text]
    with pytest.raises(ArgumentError, match=f"{line}: the key '{key}' occurs twice"):
        from_yaml(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1}\nouter: {inner: &b {<<: *a, x: 2}}\nc: {<<: *b}\n",
        "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: [*a, *b], x: 3}\n",
        "a: &a {x: &x {y: 1}}\nb: {<<: *a, z: *x}\n",
    ],
)
def test_merged_yaml_value_may_be_overridden(text: str) -> None:
    assert from_yaml(text) == yaml.safe_load(text)


def test_the_encoding_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "wide.yaml"
    for encoding in ("UTF-16", "UTF-32"):
        file.write_bytes("run: x\n".encode(encoding))
        with pytest.raises(ArgumentError, match=f"in {encoding}; .* iconv -f {encoding} -t"):
            read_yaml(file)
