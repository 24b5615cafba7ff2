"""The first implementation's files: written responses are read back unchanged."""

import json
from types import SimpleNamespace

import pytest

from callbacks.first_implementation import FirstImplementationFiles
from safervlm.data.responses import SavedResponses
from safervlm.data.unsafe_concepts import UnsafeConcepts
from safervlm.errors import RecordError
from safervlm.records import Response, write_jsonl


def test_written_responses_are_read_back_unchanged(tiny_sets, tmp_path):
    """Two datasets whose images have the same names: only the folder distinguishes their responses."""
    data = UnsafeConcepts(str(tiny_sets / "unsafe"), str(tiny_sets / "safe"), limit=4)
    questions = [example.question for example in data.parts.predict]
    shared = {q.image for q in questions if q.dataset == data.dataset} & {
        q.image for q in questions if q.dataset == data.safe_dataset
    }
    assert shared
    written = [Response(question, f"answer {n}", "stop", 2) for n, question in enumerate(questions)]
    write_jsonl(tmp_path / "responses.jsonl", [response.to_dict() for response in written])
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    FirstImplementationFiles().on_predict_end(trainer, None)

    folder = tmp_path / "first_implementation"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*.json")}
    unsafe = {f"{c}/response_prompt_{n}.json" for c in ("alignment", "alignment_text_only") for n in range(5)}
    unsafe |= {"perception/response_prompt_0.json"}
    safe = {f"alignment/response_prompt_{n}.json" for n in range(5)}
    assert names == {*(f"{data.dataset}/{n}" for n in unsafe), *(f"{data.safe_dataset}/{n}" for n in safe)}
    record = json.loads((folder / data.dataset / "alignment_text_only" / "response_prompt_2.json").read_text())[0]
    assert record.keys() == {"prompt", "image_fname", "output"}
    assert record["image_fname"] == "blank_image.png"

    read, missing = SavedResponses(str(folder), data).answers
    assert not missing
    assert {r.id: r.response for r in read} == {r.id: r.response for r in written}
    # A file without its folder is rejected, and the message names the remedy.
    moved = tmp_path / "moved.json"
    moved.write_bytes((folder / data.safe_dataset / "alignment" / "response_prompt_0.json").read_bytes())
    with pytest.raises(RecordError, match=r"it may be a response to .* or .*DATASET/CAPABILITY/"):
        _ = SavedResponses(str(moved), data).answers
    FirstImplementationFiles().on_predict_end(SimpleNamespace(is_global_zero=False), None)  # one process is enough


def test_response_with_a_lone_surrogate_is_written(tiny_sets, tmp_path):
    data = UnsafeConcepts(str(tiny_sets / "unsafe"), limit=1)
    question = data.parts.predict[0].question
    write_jsonl(tmp_path / "responses.jsonl", [Response(question, "half \ud83d", "stop", 2).to_dict()])
    FirstImplementationFiles().on_predict_end(
        SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path)), None
    )
    (file,) = (tmp_path / "first_implementation").rglob("*.json")
    assert json.loads(file.read_text(encoding="utf-8"))[0]["output"] == "half \ud83d"
