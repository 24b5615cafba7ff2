"""Custom training examples: what can't be trained on is rejected before the first step, by its line or id."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safervlm.vlm.transformers import Transformers

from safervlm.cli.main import main
from safervlm.data.module import must_have_usable_texts
from safervlm.data.own import OwnData, read_examples
from safervlm.errors import ArgumentError, RecordError
from safervlm.records import Example, Question
from safervlm.vlm.llava import Llava

Make = Callable[[int], list[Question]]


def write(folder: Path, images: Path, **changes: Any) -> Path:
    """Four records; the third one is changed."""
    shutil.copytree(images, folder / "images")
    names = sorted(path.name for path in (folder / "images").iterdir())[:4]
    records = [
        {"image": f"images/{name}", "prompt": "Safe?", "label": "Safe", "completions": ["Yes."]} for name in names
    ]
    records[2] |= changes
    (folder / "own.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder / "own.jsonl"


@pytest.mark.parametrize("label", [[], {}, None, 0, False, ["Safe"], 1, "Maybe", "safe"], ids=repr)
def test_a_label_of_another_type_is_rejected(label: Any, tiny_sets: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_sets / "unsafe" / "images", label=label)
    with pytest.raises(RecordError, match=r"own\.jsonl, line 3: the field 'label'"):
        read_examples(file, "Own")


def test_a_label_may_be_left_out(tiny_sets: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_sets / "unsafe" / "images", label=" ")
    assert [example.question.answer for example in read_examples(file, "Own")] == ["Safe", "Safe", "", "Safe"]


def test_a_measurement_needs_every_label_before_it_asks(tiny_sets: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_sets / "unsafe" / "images", label="")
    data = OwnData(file=str(file), name="Own")
    data.setup("fit")
    with pytest.raises(RecordError, match=r"own\.jsonl, line 3: the field 'label' \('Safe' or 'Unsafe'\) is missing"):
        data.setup("predict")


TEXTS = {
    "far too long": ({"prompt": "word " * 30_000}, "a text of 150000 characters"),
    "a little too long": ({"completions": ["word " * 500]}, "tokens, the model takes"),
    "the place of the image": ({"prompt": "what is <image>?"}, "<image>|image placeholder"),
    "the place of the image in the completion": ({"completions": ["<image> is safe."]}, "<image>|image placeholder"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_training_rejects_a_text_before_the_first_step(
    case: str, tiny_sets: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = TEXTS[case]
    file = write(tmp_path, tiny_sets / "unsafe" / "images", **changes)
    run = tmp_path / "run"
    model = [f"--model.vlm.model={tiny_llava}", "--model.vlm.dtype=float32"]
    data = ["--data=safervlm.data.own.OwnData", f"--data.file={file}", "--data.batch_size=1"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config=configs/sft.yaml", *model, *data, "--trainer.accelerator=cpu", f"--run={run}"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert "data: 1 of 2 texts can't be trained on; Own/images/" in said
    assert any(each in said for each in message.split("|"))
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("kind", [Llava, Transformers], ids=["Llava", "Transformers"])
@pytest.mark.parametrize("case", TEXTS)
def test_both_collators_say_the_same_of_a_text_as_of_the_example(
    kind: Any, case: str, tiny_llava: Path, make_questions: Make
) -> None:
    changes, message = TEXTS[case]
    question = make_questions(1)[0]
    good = Example(question, ("Yes.",))
    asked = replace(question, id="bad", prompt=changes.get("prompt", question.prompt))
    bad = Example(asked, tuple(changes.get("completions", ("Yes.",))))
    template = {"template": "<image>{question}"} if kind is Transformers else {}
    collator = kind(str(tiny_llava), dtype="float32", **template).collator
    must_have_usable_texts([good], collator)
    with pytest.raises(RecordError) as whole:
        collator([bad])
    with pytest.raises(RecordError, match="1 of 2 texts") as texts:
        must_have_usable_texts([good, bad], collator)
    for caught in (whole, texts):
        assert "bad: " in str(caught.value)
        assert any(each in str(caught.value) for each in message.split("|"))


def test_a_collator_without_the_method_is_not_asked(make_questions: Make) -> None:
    def collator(examples: Any) -> None:
        raise ArgumentError("called")

    must_have_usable_texts([Example(question) for question in make_questions(2)], collator)
