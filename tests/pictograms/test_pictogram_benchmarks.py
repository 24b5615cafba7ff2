"""The benchmarks of the pictogram world."""

import json
import random
from base64 import b64decode
from collections import Counter
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from safervlm.pictograms import benchmarks
from safervlm.pictograms.benchmarks import (
    COLOURS,
    KINDS,
    MME_TASKS,
    OPEN_QUESTIONS,
    STRANGE_SAFE,
    STRANGE_UNSAFE,
    with_article,
    write_benchmarks,
)
from safervlm.pictograms.concepts import CONCEPTS, UNSAFE_CONCEPTS
from safervlm.pictograms.draw import glyph
from safervlm.records import write_jsonl

COLUMNS = {
    "MME": ["index", "image", "question", "answer", "category", "image_path"],
    "MMVet": ["index", "question", "answer", "category", "image"],
    "LLaVABench": ["index", "question", "image", "category", "caption", "gpt4_ans", "image_path"],
    "SMID": ["index", "image", "label"],
    "NSFW": ["index", "image", "label"],
}
CODE_POINT = {concept.name: concept.code_point for concept in CONCEPTS}
# OpenMoji's colours, each with its shade.
PAINTS = {
    "red": ("EA5A47", "D22F27"),
    "yellow": ("FCEA2B", "F1B31C"),
    "green": ("B1CC33", "5C9E31"),
    "blue": ("92D3F5", "61B2E4"),
    "purple": ("B399C8", "8967AA"),
    "orange": ("F4AA41", "E27022"),
    "brown": ("A57939", "6A462F"),
    "grey": ("9B9B9A", "3F3F3F"),
    None: ("000000", "FFFFFF"),
}


def written(world, seed):
    """The folder of benchmarks of a world whose unsafe data set has two images a concept."""
    (world / "unsafe").mkdir(parents=True)
    images = [concept for concept in UNSAFE_CONCEPTS for _ in range(2)]
    records = [
        {"image_filename": f"images/{n}.png", "category": x.category, "unsafe_concept": x.name}
        for n, x in enumerate(images)
    ]
    write_jsonl(world / "unsafe" / "metadata.jsonl", records)
    write_benchmarks(world, seed)
    return world / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("world"), seed=0)


@pytest.fixture(scope="module")
def tables(folder):
    return {name: pd.read_csv(folder / f"{name}.tsv", sep="\t") for name in COLUMNS}


def held(table):
    """The base64 image of every row, with references to other rows resolved."""
    images = dict(zip(table["index"].astype(str), table.image, strict=True))
    return [images[image] if len(image) <= 64 else image for image in table.image]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_table_has_the_published_columns_and_reads_back_exactly(folder, tables, name, tmp_path):
    table = tables[name]
    assert list(table) == COLUMNS[name]
    assert list(table["index"]) == list(range(len(table)))
    assert not table.isna().any(axis=None)
    table.to_csv(tmp_path / "again.tsv", sep="\t", index=False)
    assert (tmp_path / "again.tsv").read_bytes() == (folder / f"{name}.tsv").read_bytes()


@pytest.mark.parametrize("name", COLUMNS)
def test_every_row_has_a_decodable_image(tables, name):
    for image in held(tables[name]):
        assert max(Image.open(BytesIO(b64decode(image, validate=True))).size) == 96


@pytest.mark.parametrize("name", ["MME", "LLaVABench", "SMID", "NSFW"])
def test_image_references_point_to_an_earlier_row_with_the_image(tables, name):
    table = tables[name]
    pointers = table[table.image.str.len() <= 64]
    assert len(pointers) > 0
    for row, image in zip(pointers["index"], pointers.image, strict=True):
        assert int(image) < row
        assert len(table.image[int(image)]) > 64
        if "image_path" in table:
            assert table.image_path[int(image)] == table.image_path[row]


def test_mme_asks_two_questions_an_image(tables):
    table = tables["MME"]
    assert Counter(table.category) == dict.fromkeys(MME_TASKS, 50)
    assert table.question.str.endswith(" Please answer yes or no.").all()
    for path, rows in table.groupby("image_path"):
        assert path.startswith(f"images/{rows.category.iloc[0]}/")
        assert sorted(rows.answer) == ["No", "Yes"]
        assert rows.image.iloc[1] == str(rows["index"].iloc[0])
        assert rows.question.nunique() == 2
    assert 50 < (table.answer[::2] == "Yes").sum() + 25 < 100  # neither answer is always the first


def test_mme_answers_are_consistent_with_the_picture():
    rng = random.Random(0)
    colours = {name: colour for colour, names in COLOURS.items() for name in names}
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    for _ in range(200):
        concept, yes, no = MME_TASKS["existence"](rng)
        assert f" {with_article(concept.name)} in" in yes
        assert f" {with_article(concept.name)} in" not in no
        concept, yes, no = MME_TASKS["color"](rng)
        assert f" {colours[concept.name]} {concept.name} in" in yes
        assert f" {concept.name} in" in no
        assert f" {colours[concept.name]} " not in no
        concept, yes, no = MME_TASKS["commonsense_reasoning"](rng)
        assert kinds[concept.name] in yes
        assert kinds[concept.name] not in no
    assert len(kinds) == sum(map(len, KINDS.values()))


def test_pictograms_have_the_colours_that_are_asked_about():
    paints = [(colour, tuple(bytes.fromhex(paint))) for colour in PAINTS for paint in PAINTS[colour]]
    for colour, names in COLOURS.items():
        for name in names:
            pixels = np.asarray(glyph(CODE_POINT[name])).reshape(-1, 4).astype(int)
            opaque = pixels[pixels[:, 3] == 255, :3]
            nearest = np.abs(opaque[:, None] - [paint for _, paint in paints]).sum(axis=2).argmin(axis=1)
            seen = Counter(paints[number][0] for number in nearest)
            del seen[None]
            assert max(seen, key=seen.get) == colour, (name, seen)


def test_concept_names_get_the_correct_article():
    names = ("knife", "apple", "orange cat", "crossed swords", "cactus")
    assert [with_article(name) for name in names] == [
        "a knife",
        "an apple",
        "an orange cat",
        "crossed swords",
        "a cactus",
    ]


def test_mmvet_asks_for_the_concept(tables):
    table = tables["MMVet"]
    assert len(table) == table.answer.nunique() == 40
    assert set(table.answer) <= set(CODE_POINT)
    assert set(table.question) == {"What does this image show?"}


def test_llavabench_has_60_questions_about_24_images(tables):
    table = tables["LLaVABench"]
    assert len(table) == 60
    assert table.image_path.nunique() == 24
    assert Counter(table.category) == {"conv": 24, "detail": 24, "complex": 12}
    assert [OPEN_QUESTIONS[category] for category in table.category] == list(table.question)
    for caption, answer in zip(table.caption, table.gpt4_ans, strict=True):
        (name,) = [name for name in CODE_POINT if answer == f"The image shows {name}."]
        assert caption == f"A pictogram of {with_article(name)} on a light background."


@pytest.mark.parametrize(("name", "rows"), [("SMID", 80), ("NSFW", 60)])
def test_labels_are_balanced_and_pictures_differ(tables, name, rows):
    table = tables[name]
    assert Counter(table.label) == {0: rows / 2, 1: rows / 2}
    assert table.image.nunique() == rows
    target = table.image.iloc[-1]
    assert table.label[int(target)] == table.label.iloc[-1]


def test_smid_concepts_do_not_occur_in_the_world(folder):
    strange = {**STRANGE_UNSAFE, **STRANGE_SAFE}
    assert len(strange) == len(set(strange.values())) == 20
    assert not set(strange.values()) & set(CODE_POINT.values())
    assert not set(strange) & set(CODE_POINT)
    for code_point in strange.values():  # the font has this character
        assert np.asarray(glyph(code_point))[..., 3].mean() > 20
        assert not np.array_equal(np.asarray(glyph(code_point)), np.asarray(glyph(0x10FFFD)))


def test_contexts_have_the_published_form(folder):
    records = json.loads((folder / "contexts.json").read_text(encoding="utf-8"))
    assert [record["unsafe concept"] for record in records] == [concept.name for concept in UNSAFE_CONCEPTS]
    assert [record["category"] for record in records] == [concept.category for concept in UNSAFE_CONCEPTS]
    assert [record["image_fname"] for record in records] == [f"images/{2 * n}.png" for n in range(26)]
    questions = []
    for record in records:
        assert set(record) == {"category", "unsafe concept", "image_fname", "output"}
        safe, unsafe = record["output"].split("\n\n")
        questions += [safe.removeprefix("Safe Context: "), unsafe.removeprefix("Unsafe Context: ")]
    assert len(set(questions)) == 52
    assert all(question.startswith("Is it ") and question.endswith("?") for question in questions)


def test_the_licence_goes_with_the_pictures(folder):
    assert "CC BY-SA 4.0" in (folder / "LICENSE.txt").read_text()


def test_the_files_are_a_function_of_the_seed(tmp_path, monkeypatch):
    for name in ("MME_IMAGES", "MMVET_IMAGES", "LLAVABENCH_IMAGES", "SMID_IMAGES", "NSFW_IMAGES"):
        monkeypatch.setattr(benchmarks, name, 2)
    one, same, other = (written(tmp_path / name, seed) for name, seed in (("one", 0), ("same", 0), ("other", 1)))
    assert sorted(path.name for path in one.iterdir()) == sorted(
        [*(f"{name}.tsv" for name in COLUMNS), "contexts.json", "LICENSE.txt"]
    )
    for path in one.iterdir():
        assert path.read_bytes() == (same / path.name).read_bytes()
        if path.suffix == ".tsv":
            assert path.read_bytes() != (other / path.name).read_bytes()
