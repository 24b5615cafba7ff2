"""Custom training examples: invalid texts are rejected before the first step, with their line or id."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safervlm.cli.main import main
from safervlm.data.own import OwnData, read_examples
from safervlm.data.training_checks import require_trainable, require_usable_texts
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import ImageSettings
from safervlm.limits import TextLimits
from safervlm.records import Example, Question
from safervlm.vlm.auto import Transformers
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


def test_label_is_optional_for_training(tiny_sets: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_sets / "unsafe" / "images", label=" ")
    assert [example.question.answer for example in read_examples(file, "Own")] == ["Safe", "Safe", "", "Safe"]


def test_measurement_rejects_a_missing_label(tiny_sets: Path, tmp_path: Path) -> None:
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
def test_text_check_and_collation_give_the_same_error(
    kind: Any, case: str, tiny_llava: Path, make_questions: Make
) -> None:
    changes, message = TEXTS[case]
    question = make_questions(1)[0]
    good = Example(question, ("Yes.",))
    asked = replace(question, id="bad", prompt=changes.get("prompt", question.prompt))
    bad = Example(asked, tuple(changes.get("completions", ("Yes.",))))
    template = {"template": "<image>{question}"} if kind is Transformers else {}
    collator = kind(str(tiny_llava), dtype="float32", **template).collator
    require_usable_texts([good], collator)
    with pytest.raises(RecordError) as whole:
        collator([bad])
    with pytest.raises(RecordError, match="1 of 2 texts") as texts:
        require_usable_texts([good, bad], collator)
    for caught in (whole, texts):
        assert "bad: " in str(caught.value)
        assert any(each in str(caught.value) for each in message.split("|"))


@pytest.mark.parametrize(("words", "fits"), [(100, True), (122, True), (124, False), (127, False)])
def test_a_text_too_long_with_its_image_alone_is_rejected_before_the_first_step(
    words: int, fits: bool, tiny_llava: Path, make_questions: Make
) -> None:
    vlm = Transformers(str(tiny_llava), dtype="float32", template="<image>{question}", limits=TextLimits(128))
    questions = [replace(question, prompt="x" * 9) for question in make_questions(6)]
    questions[4] = replace(questions[4], id="long", prompt="x" * words)
    examples = [Example(question) for question in questions]
    require_usable_texts(examples, vlm.collator)
    if fits:
        require_trainable(examples, vlm.collator, vlm.images)
        vlm.collator(examples)
        return
    for check in (lambda: require_trainable(examples, vlm.collator, vlm.images), lambda: vlm.collator(examples)):
        with pytest.raises(RecordError, match=r"long: 1\d\d tokens, the model takes 128"):
            check()


def test_one_example_of_each_size_of_images_is_encoded(make_questions: Make) -> None:
    encoded: list[str] = []

    class Collator:
        def check_texts(self, example: Example) -> int:
            return len(example.question.prompt)

        def check_whole(self, example: Example) -> int:
            encoded.append(example.question.id)
            if example.question.id == "bad":
                raise ValueError("no such shape")
            return 100 - len(example.question.prompt)

    questions = [replace(each, id=str(number), prompt="x" * number) for number, each in enumerate(make_questions(8))]
    require_trainable([Example(each) for each in questions], Collator(), ImageSettings())  # two questions an image
    assert encoded == ["1", "3", "5", "7"]
    encoded.clear()
    almost = [replace(each, prompt="x" * (95 - number)) for number, each in enumerate(questions)]
    require_trainable([Example(each) for each in almost], Collator(), ImageSettings())
    assert sorted(encoded) == [str(number) for number in range(8)]  # too little room to leave one out
    bad = replace(questions[7], id="bad")
    with pytest.raises(RecordError, match="1 of 8 texts with images can't be trained on; ValueError: no such shape"):
        require_trainable([Example(each) for each in [*questions[:7], bad]], Collator(), ImageSettings())


def test_collator_without_a_text_check_is_not_called(make_questions: Make) -> None:
    def collator(examples: Any) -> None:
        raise ArgumentError("called")

    require_usable_texts([Example(question) for question in make_questions(2)], collator)
