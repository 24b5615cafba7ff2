"""Promise 5: an empty text or file, or a duplicate key, is an error that names the argument or file."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from safervlm.data.alignment import DPOData, SFTData
from safervlm.data.benchmark import Benchmark
from safervlm.data.contexts import Contexts, read_contexts
from safervlm.data.embedded import written_images
from safervlm.data.export import export_training_files
from safervlm.data.labelled import LabelledAnswers, read_labelled
from safervlm.data.own import OwnData
from safervlm.data.responses import SavedResponses
from safervlm.data.suite import Suite
from safervlm.data.unsafe_concepts import UnsafeConcepts, read_options
from safervlm.errors import ArgumentError, RecordError, UserError
from safervlm.io.reading import read_json
from safervlm.io.settings import read_yaml
from safervlm.io.trust import read_config
from safervlm.pictograms.replacing import world_manifest
from safervlm.protocol import LABELS
from safervlm.reports.runs import read_summary
from safervlm.run import read_manifest
from safervlm.vlm.adapters import adapter_config
from safervlm.vlm.weights import model_config

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
def test_suite_without_datasets_or_with_invalid_names_is_rejected(sets: dict, settings: dict, argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: "):
        Suite(sets, **settings)


@pytest.mark.parametrize(("unsafe", "safe"), [([""], ["0"]), ([True], [False]), ([None], ["0"]), ([], [])])
def test_empty_or_non_text_labels_are_rejected(unsafe: list, safe: list) -> None:
    with pytest.raises(ArgumentError, match=r"^data\.(un)?safe: "):
        Benchmark("X", "x.csv", unsafe=unsafe, safe=safe)


def test_numeric_yaml_labels_are_read_as_text() -> None:
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


def test_duplicate_json_key_in_contexts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('[{"unsafe concept": "Gun", "output": "a", "output": "b"}]')
    with pytest.raises(RecordError, match=r"c\.json: .*the key 'output' occurs twice"):
        read_contexts(tmp_path / "c.json")


# Files of SaferVLM and of other programs: the name, the duplicate key, and the reader, which receives the folder.
TWICE: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "manifest": ("manifest.json", '{"stages": {}, "stages": {}}', read_manifest),
    "manifest of a report": (
        "manifest.json",
        '{"stages": {"a": 1, "a": 2}}',
        lambda folder: read_summary(folder / "manifest.json"),
    ),
    "world": ("manifest.json", '{"files": [], "files": []}', world_manifest),
    "adapter": ("adapter_config.json", '{"peft_type": "LORA", "r": 4, "r": 8}', adapter_config),
    "model": ("config.json", '{"a": {"b": 1, "b": 1}}', model_config),
    "images of a table": ("files.json", '{"0": "0.png", "0": "1.png"}', written_images),
    "configuration": ("fit.yaml", "a:\n  b: 1\n  b: 2\n", lambda folder: read_config(folder / "fit.yaml")),
}


@pytest.mark.parametrize("case", TWICE)
def test_every_file_reader_rejects_duplicate_keys(tmp_path: Path, case: str) -> None:
    name, text, read = TWICE[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"the key '\w+' occurs twice") as caught:
        read(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"x": "0.png"}', '{"0": "../0.png"}', '{"0": 3}', None])
def test_damaged_image_cache_index_names_the_folder_to_remove(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "files.json").write_text(text)
    with pytest.raises(RecordError, match=r"files\.json.*remove the folder") as caught:
        written_images(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "line 1: not YAML"),
        ("a: 1\nb: &x [*x", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/name:os.system", "line 1: not YAML"),
        ("a: \0", "NUL"),
        ("b: 1\n? {c: 1, c: 2}\n: 2", "line 2: the key 'c' occurs twice"),
    ],
)
def test_damaged_yaml_is_reported_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(RecordError) as caught:
        read_yaml(tmp_path / "a.yaml", error=RecordError)
    assert str(caught.value).startswith(str(tmp_path / "a.yaml"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_infinite_json_numbers_are_read_only_if_requested(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"clip": Infinity}')
    assert read_json(tmp_path / "a.json", finite=False) == {"clip": float("inf")}
    with pytest.raises(RecordError, match="Infinity is not a finite number"):
        read_json(tmp_path / "a.json")


# Modules that parse JSON or YAML outside of safervlm/io/reading.py: number of places, and the reason.
PARSED_ELSEWHERE = {
    "safervlm/io/seals.py": (2, "settings in memory, as they will be once they are written"),
    "safervlm/run.py": (1, "settings in memory, as they will be once they are written"),
    "safervlm/pictograms/judges.py": (1, "a tokenizer in memory"),
    "safervlm/pictograms/rater.py": (1, "the body of a request to the pictograms' own server"),
    "safervlm/io/settings.py": (2, "YAML, by the strict loader"),
    "safervlm/vlm/server/reading.py": (1, "a server's body, which may repeat what isn't read"),
}


def test_files_are_parsed_in_one_place() -> None:
    root = Path(__file__).parent.parent.parent
    found: dict[str, int] = {}
    for path in sorted(
        file for folder in ("safervlm", "callbacks", "scripts") for file in (root / folder).rglob("*.py")
    ):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module in ("json", "yaml")), (
                f"{name}: import it whole"
            )
            parses = isinstance(node, ast.Attribute) and (
                ast.unparse(node) in ("json.load", "json.loads", "pd.read_json")
                or (ast.unparse(node.value) == "yaml" and "load" in node.attr)
            )
            if parses and name != "safervlm/io/reading.py":
                found[name] = found.get(name, 0) + 1
    assert found == {name: count for name, (count, _) in PARSED_ELSEWHERE.items()}
