"""The first implementation's files: what is written is read back as the same answers."""

import json
from types import SimpleNamespace

from callbacks.first_implementation import FirstImplementationFiles
from safervlm.data.responses import SavedResponses
from safervlm.data.unsafe_concepts import UnsafeConcepts
from safervlm.records import Response, write_jsonl


def test_what_is_written_is_read_back(tiny_sets, tmp_path):
    data = UnsafeConcepts(str(tiny_sets / "unsafe"), limit=4)
    questions = [example.question for example in data.parts.predict]
    written = [Response(question, f"answer {n}", "stop", 2) for n, question in enumerate(questions)]
    write_jsonl(tmp_path / "responses.jsonl", [response.to_dict() for response in written])
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    FirstImplementationFiles().on_predict_end(trainer, None)

    folder = tmp_path / "first_implementation"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*.json")}
    numbered = {f"{c}/response_prompt_{n}.json" for c in ("alignment", "alignment_text_only") for n in range(5)}
    assert names == numbered | {"perception/response_prompt_0.json"}
    record = json.loads((folder / "alignment_text_only" / "response_prompt_2.json").read_text())[0]
    assert record.keys() == {"prompt", "image_fname", "output"}
    assert record["image_fname"] == "blank_image.png"

    read, missing = SavedResponses(str(folder), data).answers
    assert not missing
    assert {r.id: r.response for r in read} == {r.id: r.response for r in written}
    FirstImplementationFiles().on_predict_end(SimpleNamespace(is_global_zero=False), None)  # one process is enough
