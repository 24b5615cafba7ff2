"""Promise 5 in data modules: an empty text or file is an error that names the argument or file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from safervlm.data.alignment import DPOData, OwnData, SFTData, export_training_files
from safervlm.data.benchmarks import Benchmark
from safervlm.data.contexts import Contexts, read_contexts
from safervlm.data.labelled import LabelledAnswers, read_labelled
from safervlm.data.responses import SavedResponses
from safervlm.data.suite import Suite
from safervlm.data.unsafe_concepts import UnsafeConcepts, read_options
from safervlm.errors import ArgumentError, RecordError, UserError
from safervlm.protocol import LABELS

ARGUMENTS: list[tuple[Callable[..., object], dict[str, object], str]] = [
    (UnsafeConcepts, {}, "folder"),
    (UnsafeConcepts, {"folder": "x"}, "safe_folder"),
    (UnsafeConcepts, {}, "repo"),
    (UnsafeConcepts, {}, "safe_repo"),
    (UnsafeConcepts, {}, "cache_dir"),
    (UnsafeConcepts, {}, "name"),
    (UnsafeConcepts, {}, "safe_name"),
    (SFTData, {}, "folder"),
    (DPOData, {}, "contexts"),
    (Contexts, {}, "contexts"),
    (Contexts, {"contexts": "x.json"}, "folder"),
    (OwnData, {}, "file"),
    (OwnData, {"file": "x"}, "validation_file"),
    (OwnData, {"file": "x"}, "name"),
    (LabelledAnswers, {}, "answers"),
    (SavedResponses, {}, "responses"),
    (Benchmark, {"name": "X"}, "source"),
    (Benchmark, {"source": "x.csv"}, "name"),
    *(
        (Benchmark, {"name": "X", "source": "x.csv"}, argument)
        for argument in ("cache_dir", "label_column", "image_column", "question_column", "name_column", "md5")
    ),
]


@pytest.mark.parametrize("empty", ["", "  ", "\t\n"])
@pytest.mark.parametrize(("kind", "given", "argument"), ARGUMENTS)
def test_an_empty_argument_is_an_error(
    kind: Callable[..., object], given: dict[str, object], argument: str, empty: str
) -> None:
    with pytest.raises(ArgumentError, match=rf"^data\.{argument}: ") as caught:
        kind(**given, **{argument: empty})
    assert "\n" not in str(caught.value)
    assert repr(empty) in str(caught.value)


def test_an_export_needs_a_folder() -> None:
    with pytest.raises(ArgumentError, match=r"^--out: must not be empty"):
        export_training_files("", folder="x")


@pytest.mark.parametrize(
    ("sets", "settings", "argument"),
    [
        ({}, {}, "data.sets"),
        ({True: OwnData("x")}, {}, "data.sets"),
        ({"": OwnData("x")}, {}, "data.sets"),
        ({"a": OwnData("x")}, {"own": {2024: OwnData("x")}}, "data.own"),
        ({"a": OwnData("x")}, {"only": []}, "data.only"),
    ],
)
def test_a_suite_without_sets_or_names(sets: dict, settings: dict, argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: "):
        Suite(sets, **settings)


@pytest.mark.parametrize(("unsafe", "safe"), [([""], ["0"]), ([True], [False]), ([None], ["0"]), ([], [])])
def test_labels_that_are_none(unsafe: list, safe: list) -> None:
    with pytest.raises(ArgumentError, match=r"^data\.(un)?safe: "):
        Benchmark("X", "x.csv", unsafe=unsafe, safe=safe)


def test_labels_that_yaml_takes_for_numbers_are_texts() -> None:
    data = Benchmark("X", "x.csv", unsafe=[2, "Yes"], safe=[3.5, "no"])
    assert data.labels == {"2": "Unsafe", "yes": "Unsafe", "3.5": "Safe", "no": "Safe"}


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "own": ("a.jsonl", lambda file: OwnData(str(file)).parts),
    "validation": ("a.jsonl", lambda file: OwnData(str(good(file)), str(file)).parts),
    "images": ("metadata.jsonl", lambda file: UnsafeConcepts(str(file.parent)).sets),
    "options": ("perception.jsonl", lambda file: read_options(file.parent, [])),
    "contexts": ("a.json", read_contexts),
    "answers, JSONL": ("a.jsonl", lambda file: read_labelled(file, LABELS["alignment"])),
    "answers, CSV": ("a.csv", lambda file: read_labelled(file, LABELS["alignment"])),
    "responses": ("responses.jsonl", lambda file: SavedResponses(str(file)).answers),
    "first implementation": ("a.json", lambda file: SavedResponses(str(file)).answers),
    "benchmark, CSV": ("a.csv", lambda file: Benchmark("X", str(file)).rows),
    "benchmark, JSONL": ("a.jsonl", lambda file: Benchmark("X", str(file)).rows),
}


def good(beside: Path) -> Path:
    (beside.parent / "i.png").touch()
    file = beside.parent / "good.jsonl"
    file.write_text(json.dumps({"image": "i.png", "prompt": "?", "label": "Safe"}) + "\n")
    return file


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\r\n", b"\xef\xbb\xbf", b"[]", b"text,label,image\n"])
@pytest.mark.parametrize("reader", READERS)
def test_an_empty_file_is_an_error_that_names_it(tmp_path: Path, reader: str, content: bytes) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('[{"unsafe concept": "Gun", "output": "a", "output": "b"}]')
    with pytest.raises(RecordError, match=r"c\.json: .*the key 'output' is there twice"):
        read_contexts(tmp_path / "c.json")
