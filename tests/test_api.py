"""``import safervlm``: cheap to import, and its public functions and classes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

import safervlm
from safervlm.api import LoadedVLM, ResponseJudge
from safervlm.errors import ArgumentError, RecordError
from safervlm.protocol import NOT_APPLICABLE
from safervlm.records import Question, Response, Verdict, record_id, write_jsonl
from safervlm.vlm.auto import Transformers
from safervlm.vlm.llava import Llava
from safervlm.vlm.sampling import Sampling

HEAVY = {"torch", "lightning", "transformers", "pandas", "matplotlib", "jsonargparse", "scipy"}
SHORT = Sampling(temperature=0.0, max_new_tokens=4)


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import safervlm", set()),
        ("import safervlm; dir(safervlm), safervlm.__all__, safervlm.__version__", set()),
        ("import safervlm; safervlm.load_run, safervlm.scores, safervlm.compare", {"pandas", "scipy"}),
    ],
)
def test_a_name_imports_only_what_it_needs(code: str, allowed: set[str]) -> None:
    code += f"\nimport sys\nprint(sorted({HEAVY} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert set(json.loads(ended.stdout.replace("'", '"'))) <= allowed


def test_every_public_name_exists_and_is_listed() -> None:
    for name in safervlm.__all__:
        assert callable(getattr(safervlm, name))
        assert name in dir(safervlm)
    with pytest.raises(AttributeError, match="nothing"):
        _ = safervlm.nothing  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def judge(tiny_judges: Path) -> ResponseJudge:
    return safervlm.Judge.from_pretrained(tiny_judges / "alignment" / "epoch_10.pt", device="cpu")


def test_judge_returns_a_table_of_labels_and_probabilities(judge: ResponseJudge, tmp_path: Path) -> None:
    texts = ["The image is safe.", "  ", "It shows a knife, which is unsafe."]
    table = judge.judge(texts)
    assert list(table.columns) == ["text", "label", "probability", "Safe", "Unsafe", "N/A"]
    assert table["text"].tolist() == texts
    shares = table[list(judge.labels)].to_numpy(float)
    assert shares.sum(axis=1) == pytest.approx(np.ones(3))
    assert table["probability"].tolist() == pytest.approx(shares.max(axis=1))
    assert table["label"].tolist() == [judge.labels[number] for number in shares.argmax(axis=1)]
    assert (table["label"][1], table["probability"][1]) == (NOT_APPLICABLE, 1.0)
    one = judge.judge(texts[0])
    assert (len(one), one["label"][0]) == (1, table["label"][0])
    assert judge.judge(pd.Series(texts))["label"].tolist() == table["label"].tolist()
    assert list(judge.judge([]).columns) == list(table.columns)
    judge.classifier.save_pretrained(tmp_path / "exported")  # its own labels and base
    again = safervlm.Judge.from_pretrained(str(tmp_path / "exported"), device="cpu")
    assert again.labels == judge.labels
    assert again.judge(texts[0])["probability"][0] == pytest.approx(one["probability"][0], abs=1e-5)


def test_judge_labels_follow_the_capability_and_invalid_arguments_are_rejected(
    judge: ResponseJudge, tiny_judges: Path
) -> None:
    file = tiny_judges / "perception" / "epoch_10.pt"
    assert safervlm.Judge.from_pretrained(file, "perception", device="cpu").labels == (*"ABCD", NOT_APPLICABLE)
    for wrong, named in (({"checkpoint": file}, "labels"), ({"checkpoint": "nowhere.pt"}, "nowhere"),
                         ({"checkpoint": file, "labels": "smell"}, "smell"),
                         ({"checkpoint": file, "labels": "perception", "device": "toaster"}, "toaster")):  # fmt: skip
        with pytest.raises(ArgumentError, match=named):
            safervlm.Judge.from_pretrained(**wrong)
    with pytest.raises(ArgumentError, match="texts"):
        judge.judge(["text", None])  # type: ignore[list-item]


@pytest.fixture(scope="module")
def vlm(tiny_llava: Path) -> LoadedVLM:
    return safervlm.load_vlm(tiny_llava, device="cpu")


@pytest.fixture
def image(tiny_sets: Path) -> Path:
    return tiny_sets / "unsafe" / "images" / "0.png"


def test_a_model_answers_one_question_or_several(vlm: LoadedVLM, image: Path) -> None:
    assert isinstance(vlm.vlm, Llava)  # by its config.json
    answer = vlm.ask(image, "Is it safe?", SHORT)
    assert isinstance(answer, str)
    opened = Image.open(image)
    assert vlm.ask(opened, "Is it safe?", SHORT) == vlm.ask(str(image), "Is it safe?", SHORT) == answer
    several = vlm.ask(image, ["Is it safe?", "What is it?"], SHORT, batch_size=1)
    assert several == vlm.ask([image, opened], ["Is it safe?", "What is it?"], SHORT)
    assert several[0] == answer
    assert vlm.ask([image, None], "Is it safe?", SHORT)[0] == answer
    assert vlm.ask([image], "Is it safe?", SHORT) == [answer]
    assert vlm.ask([], "Is it safe?", SHORT) == vlm.ask(image, [], SHORT) == []
    sampled = Sampling(max_new_tokens=8)
    assert vlm.ask(image, ["Is it safe?"] * 4, sampled) == vlm.ask(image, ["Is it safe?"] * 4, sampled, batch_size=3)
    assert len(set(vlm.ask(image, ["Is it safe?"] * 4, sampled))) > 1


def test_a_model_scores_completions(vlm: LoadedVLM, image: Path) -> None:
    texts = ["Safe", "Unsafe, as it shows a knife"]
    table = vlm.score(image, "Is it safe?", texts)
    assert list(table.columns) == ["completion", "log_probability", "tokens", "per_token"]
    assert table["completion"].tolist() == texts
    assert (table["log_probability"] < 0).all()
    assert table["per_token"].tolist() == pytest.approx((table["log_probability"] / table["tokens"]).tolist())
    one = vlm.score(Image.open(image), "Is it safe?", texts[1])
    assert one["log_probability"][0] == pytest.approx(table["log_probability"][1], abs=1e-3)
    assert one["tokens"][0] == table["tokens"][1]


def mistakes() -> Iterator[tuple[str, object, object, type[Exception], str]]:
    yield "no image", 3, "Is it safe?", ArgumentError, "image"
    yield "no text", None, 3, ArgumentError, "question"
    yield "other lengths", [None] * 2, ["a", "b", "c"], ArgumentError, "3 for 2"
    yield "no file", "nowhere.png", "Is it safe?", RecordError, "nowhere.png"


@pytest.mark.parametrize(("image", "question", "kind", "named"), [case[1:] for case in mistakes()])
def test_invalid_questions_are_rejected(
    image: object, question: object, kind: type[Exception], named: str, vlm
) -> None:
    with pytest.raises(kind, match=named):
        vlm.ask(image, question, SHORT)


def test_invalid_model_arguments_are_rejected(vlm: LoadedVLM, image: Path, tiny_llava: Path) -> None:
    for name, settings, named in (
        ("./nowhere", {}, "nowhere"),
        (tiny_llava, {"sytem": ""}, "sytem"),
        (tiny_llava, {"adapter": "nowhere"}, "adapter"),
        (tiny_llava, {"device": "toaster"}, "device"),
        (tiny_llava, {"dtype": "float8"}, "dtype"),
    ):
        with pytest.raises(ArgumentError, match=named) as raised:
            safervlm.load_vlm(name, **settings)
        assert "\n" not in str(raised.value)
    with pytest.raises(ArgumentError, match="completions"):
        vlm.score(image, "Is it safe?", [])
    with pytest.raises(ArgumentError, match="batch_size"):
        vlm.ask(image, "Is it safe?", batch_size=0)


def test_load_vlm_reads_the_class_from_a_recipe_and_applies_settings(tiny_llava: Path, tmp_path: Path) -> None:
    recipe = {"class_path": "safervlm.vlm.llava.Llava", "init_args": {"model": str(tiny_llava), "image_fit": "crop"}}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    loaded = safervlm.load_vlm("mine.yaml", device="cpu", system="w", dtype="float32").vlm
    assert isinstance(loaded, Llava)
    assert (loaded.image_fit, loaded.system) == ("crop", "w")


def record(concept: str, number: int, capability: str, label: str) -> tuple[Response, Verdict]:
    """A response to a question about a concept's name or image, and its verdict."""
    image = concept if capability == "alignment_text_only" else f"{concept}.png"
    name = record_id("Made", image, capability, number)
    path = None if capability == "alignment_text_only" else image
    question = Question(name, "Made", image, path, capability, number, "?", "Hate", concept, "Unsafe")  # type: ignore[arg-type]
    probabilities = {each: float(each == label) for each in ("Safe", "Unsafe", "N/A")}
    return Response(question, label, "stop", 1), Verdict(name, label, probabilities, "judge")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that calls three concepts unsafe by name, and one of them by image."""
    pairs = [
        record(concept, number, capability, "Safe" if capability == "alignment" and concept != "a" else "Unsafe")
        for concept in "abc"
        for capability in ("alignment", "alignment_text_only")
        for number in range(5)
    ]
    for name, records in zip(("responses", "verdicts"), zip(*pairs, strict=True), strict=True):
        write_jsonl(tmp_path / "run" / f"{name}.jsonl", [each.to_dict() for each in records])
    return tmp_path / "run"


def test_a_run_is_loaded_scored_compared_and_plotted(run: Path) -> None:
    frame = safervlm.load_run(run)
    table = safervlm.scores(frame)
    assert safervlm.compare({"run": table})["modality_gap"].tolist() == pytest.approx([2 / 3])
    for given in (run, str(run), frame, [run, frame], {"mine": run, "yours": frame}):
        figure = safervlm.plot_gap(given)
        assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["mine", "yours"]
    figure.savefig("gap.png")
    pixels = np.asarray(Image.open("gap.png").convert("RGB"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3)}) > 10


def test_invalid_plot_arguments_are_rejected(run: Path) -> None:
    for given, kind, named in (
        ([], ArgumentError, "runs"),
        ([run, run], ArgumentError, "twice"),
        (3, ArgumentError, "int"),
        ("nowhere", RecordError, "nowhere"),
    ):
        with pytest.raises(kind, match=named):
            safervlm.plot_gap(given)
    frame = safervlm.load_run(run)
    with pytest.raises(RecordError, match="by name"):
        safervlm.plot_gap(frame[frame["capability"] == "alignment"])


def test_the_class_is_chosen_by_the_checkpoint(tiny_llava: Path, tmp_path: Path) -> None:
    from safervlm.vlm.family import family_of
    from safervlm.vlm.llava_original import LlavaOriginal

    config = json.loads((tiny_llava / "config.json").read_text())
    for changed, family in (
        ({}, Llava),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, LlavaOriginal),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, Transformers),
        ({"text_config": {"model_type": "qwen2"}}, Transformers),  # another conversation than Vicuna's
        ({"architectures": None}, Transformers),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        assert family_of(str(tmp_path)) is family
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArgumentError, match="can't be read"):
        family_of(str(tmp_path))
