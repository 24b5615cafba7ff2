"""Promise 2, datasets: cache keys, files that a folder excludes, base64, and spellings of one name."""

import base64
import errno
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from safervlm.data.benchmark import Benchmark
from safervlm.data.folders import files_below
from safervlm.data.image_folders import read_images
from safervlm.data.own import OwnData
from safervlm.data.responses import read_responses
from safervlm.data.unsafe_concepts import UnsafeConcepts
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.caches import TEMPORARY
from safervlm.io.images import BROKEN
from safervlm.labelling.labels import Label
from safervlm.records import Verdict, by_id


def picture(colour: str, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(file, kind)
    return file.getvalue()


def asked(data: Benchmark | UnsafeConcepts) -> list:
    data.prepare_data()
    return [example.question for example in data.parts.predict]


def write(folder: Path, *names: str, content: bytes | None = None) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture("green") if content is None else content)


# --- caches -----------------------------------------------------------------------------------------------------------


def two_columns(folder: Path, first: str, second: str) -> Path:
    cells = [base64.b64encode(picture(colour)).decode() for colour in (first, second)]
    (folder / "t.tsv").write_text(f"image\tblurred\tlabel\n{cells[0]}\t{cells[1]}\tunsafe\n")
    return folder / "t.tsv"


def test_image_cache_is_keyed_by_column_and_content(tmp_path: Path) -> None:
    seen = []
    for first, column in ("red", "image"), ("red", "blurred"), ("lime", "image"), ("red", "image"):
        table = two_columns(tmp_path, first, "blue")
        data = Benchmark("X", str(table), image_column=column, cache_dir=str(tmp_path / "cache"))
        seen.append(Image.open(asked(data)[0].image_path).getpixel((0, 0)))
    assert seen == [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0)]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("name", ["a/../b", "x" * 300, "line\nend", "\x1b[2J", "x:y*"])
def test_dataset_name_cannot_escape_the_cache_folder(tmp_path: Path, name: str) -> None:
    if "/" in name:
        with pytest.raises(ArgumentError, match=r"data\.name: a name without a slash"):
            Benchmark(name, "t.tsv")
        return
    data = Benchmark(name, str(two_columns(tmp_path, "red", "blue")), cache_dir=str(tmp_path / "cache"))
    assert asked(data)[0].dataset == name
    assert Path(asked(data)[0].image_path).is_relative_to(tmp_path / "cache")


def test_unwritable_cache_matters_only_for_embedded_images(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write(tmp_path, "a.JPG")
    (tmp_path / "t.csv").write_text("image,label\n a.JPG ,unsafe\n")
    cache = str(tmp_path / "file" / "cache")
    assert [q.image for q in asked(Benchmark("X", str(tmp_path / "t.csv"), cache_dir=cache))] == ["a.JPG"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ArgumentError, match=r"^data\.cache_dir: .*file/cache' can't be written to"):
        Benchmark("X", str(two_columns(tmp_path, "red", "blue")), cache_dir=cache).prepare_data()


def test_concurrent_processes_build_one_image_cache(tmp_path: Path) -> None:
    table = two_columns(tmp_path, "red", "blue")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{TEMPORARY}7-dead").mkdir()
    children = []
    for _ in range(3):
        if not (child := os.fork()):
            try:
                os._exit(len(asked(Benchmark("X", str(table), cache_dir=str(tmp_path / "cache")))) - 1)
            except BaseException:
                os._exit(9)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert [path.name[:2] for path in (tmp_path / "cache").iterdir()] == ["X-"]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_every_image_of_a_folder_is_asked_about_or_reported_as_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["safe/1.PNG", "safe/deep/er/2.TIFF", "unsafe/3.jfif", "unsafe/4.avif", "unsafe/x.y/5.bmp"]
    write(tmp_path, *wanted, ".ipynb_checkpoints/safe/a.png", "safe/._1.png", "safe/.DS_Store", "unsafe/Thumbs.db")
    write(tmp_path, "6.png", "unsafe/notes.txt", "unsafe/7.heic", "unsafe/8.svg", "unsafe/9")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "unsafe")
    questions = asked(Benchmark("X", str(tmp_path), cache_dir=str(tmp_path / "none")))
    assert [q.image for q in questions] == wanted
    assert [q.answer for q in questions] == ["Safe"] * 2 + ["Unsafe"] * 3
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "X: 10 entries of its folder skipped: 4 hidden, such as '.ipynb_checkpoints'" in said
    assert "1 links to folders, such as 'elsewhere'" in said
    assert "4 not ending in .png" in said
    assert "1 in no label's folder, such as '6.png'" in said


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_files_missing_from_the_metadata_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: str
) -> None:
    write(tmp_path, "1.png", "deep/2.png", "3.gif")
    rows = {"metadata.jsonl": '{"file_name": "1.png", "label": 0}\n', "metadata.csv": "file_name,label\n1.png,0\n"}
    (tmp_path / metadata).write_text(rows[metadata])
    assert [q.image for q in asked(Benchmark("X", str(tmp_path)))] == ["1.png"]
    assert f"X: 2 entries of its folder skipped: 2 not named in {metadata}, such as '3.gif'" in capsys.readouterr().out


def test_images_missing_from_unsafe_concepts_metadata_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.png", "b.png", ".c.png")
    line = {"image_filename": "a.png", "category": " Hate\u00a0", "unsafe_concept": "Ra\u0301t "}
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + json.dumps(line) + "\n", encoding="utf-8")
    questions = asked(UnsafeConcepts(str(tmp_path), capabilities=["alignment"]))
    assert {(q.category, q.concept) for q in questions} == {("Hate", "R\u00e1t")}
    assert "UnsafeConcepts: metadata.jsonl doesn't name 1 images of" in capsys.readouterr().out


def test_an_image_in_a_folder_of_each_label_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, "unsafe/Safe/a.png")
    with pytest.raises(RecordError, match=r"unsafe/Safe/a\.png: lies in a folder of each label"):
        asked(Benchmark("X", str(tmp_path)))


# --- images in tables -------------------------------------------------------------------------------------------------

CONTENT = picture("red") + b"\xfb\xff\xbe"  # bytes for which the two alphabets differ, with padding
PLAIN = base64.b64encode(CONTENT).decode()
FORMS = {
    "plain": PLAIN,
    "lines": base64.encodebytes(CONTENT).decode(),
    "lines, CR LF": base64.encodebytes(CONTENT).decode().replace("\n", "\r\n"),
    "for URLs": base64.urlsafe_b64encode(CONTENT).decode(),
    "for URLs, no padding": base64.urlsafe_b64encode(CONTENT).decode().rstrip("="),
    "no padding": PLAIN.rstrip("="),
    "blanks around": f"  {PLAIN}\t\n",
    "data URL": f"data:image/png;base64,{PLAIN}",
    "data URL with parameters": f" DATA:image/png;name=a.png;charset=utf-8;BASE64,{PLAIN}",
    "data URL of no kind": f"data:;base64,{PLAIN.rstrip('=')}",
}


@pytest.mark.parametrize("form", FORMS)
def test_base64_is_read_in_its_usual_forms(tmp_path: Path, form: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": FORMS[form], "label": "unsafe"}) + "\n")
    (question,) = asked(Benchmark("X", str(tmp_path / "t.jsonl"), cache_dir=str(tmp_path / "cache")))
    assert Path(question.image_path).read_bytes() == CONTENT
    assert Path(question.image_path).suffix == ".png"


@pytest.mark.parametrize(
    "value",
    ["no image", PLAIN[:40], PLAIN[:-3] + "*", "data:image/png,abc", "\ud83d", base64.b64encode(b"%!PS").decode()],
)
def test_invalid_image_in_a_table_is_kept_to_fail_alone(tmp_path: Path, value: str) -> None:
    rows = [{"image": value, "label": "unsafe"}, {"image": PLAIN, "label": "safe"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = asked(Benchmark("X", str(tmp_path / "t.jsonl"), cache_dir=str(tmp_path / "cache")))
    assert [Path(q.image_path).suffix for q in questions] == [BROKEN, ".png"]


# --- names ------------------------------------------------------------------------------------------------------------


def test_equivalent_unicode_spellings_are_one_category_and_label(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.png" for number in range(4)))
    spellings = ["caf\u00e9", " cafe\u0301", "caf\u00e9\u00a0", "ca\u200bf\u00e9\ufeff"]
    labels = [" Unsafe", "UNSAFE\u00a0", "\u200bunsafe", "unsafe\t"]
    rows = [
        {"image": f"{n}.png", "label": labels[n], "kind": spellings[n], "q": f" {spellings[n]}? "} for n in range(4)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Benchmark("X", str(tmp_path / "t.jsonl"), category_column="kind", question_column="q")
    questions = asked(data)
    assert {q.category for q in questions} == {"caf\u00e9"}
    assert {q.answer for q in questions} == {"Unsafe"}
    assert [q.prompt for q in questions] == [row["q"] for row in rows]  # free text is never changed


SAME = {  # pairs of spellings of one name
    "composed": ("caf\u00e9", "cafe\u0301"),
    "composed twice": ("\u1ec7", "e\u0302\u0323"),
    "Hangul": ("\ud55c", "\u1112\u1161\u11ab"),
    "blanks around": ("a b", " a b\t"),
    "hard space": ("a b", "a\u00a0b"),
    "ideographic space at the end": ("a", "a\u3000"),
    "zero width": ("ab", "a\u200bb\ufeff"),
}


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_equivalent_unicode_spellings_of_an_id_are_one_question(tmp_path: Path, pair: tuple[str, str]) -> None:
    write(tmp_path, "a.png")
    line = {"image": "a.png", "prompt": "?", "label": "Safe"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line | {"id": name}) + "\n" for name in pair))
    with pytest.raises(RecordError, match="two records have this id"):
        _ = OwnData(str(tmp_path / "q.jsonl")).parts
    response = {"image_path": None, "response": "Yes", "finish_reason": "stop", "tokens": 1}
    asked = line | {"dataset": pair[0], "capability": "alignment", "prompt_number": 0, "category": "", "concept": ""}
    ids = [asked | response | {"id": name, "answer": "Safe"} for name in pair]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ids))
    with pytest.raises(RecordError, match="occurs twice"):
        read_responses(tmp_path)
    verdicts = [Verdict(name, "Safe", {"Safe": 1.0}, "j") for name in pair]
    with pytest.raises(RecordError, match="occurs twice"):
        by_id(tmp_path, verdicts)
    first, second = (Label(name, f" {pair[0]}", name, "x") for name in pair)
    assert first == second


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_equivalent_unicode_spellings_of_an_image_name_are_one_image(tmp_path: Path, pair: tuple[str, str]) -> None:
    names = [f"i/{name.strip()}.png" for name in pair]
    line = {"prompt": "?", "label": "Safe"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line | {"image": name}) + "\n" for name in names))
    if len(set(names)) == 1:  # a name with white space around is another file's
        assert [e.question.prompt_number for e in OwnData(str(tmp_path / "q.jsonl")).parts.train] == [0, 1]
    else:
        with pytest.raises(RecordError, match="have names that look the same: rename one"):
            _ = OwnData(str(tmp_path / "q.jsonl")).parts
    records = [{"image_filename": name, "category": "Hate", "unsafe_concept": "x"} for name in names]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(RecordError, match="the image was named before"):
        read_images(tmp_path, "X", "Unsafe")


def test_names_with_control_characters_are_kept(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    record = {"image": "a.png", "prompt": "?\x07", "label": "Safe", "category": "a\x07<b>", "concept": "=1+1\x1b[2J"}
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    question = OwnData(str(tmp_path / "q.jsonl")).parts.predict[0].question
    assert (question.category, question.concept, question.prompt) == ("a\x07<b>", "=1+1\x1b[2J", "?\x07")


@pytest.mark.parametrize("image", ["a\0.png", "\ud83d.png", "x" * 400 + ".png", ""])
def test_invalid_image_name_is_reported_in_one_line(tmp_path: Path, image: str) -> None:
    write(tmp_path, "a.png")
    good = {"image": "a.png", "prompt": "?", "label": "Safe"}
    (tmp_path / "q.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"image": image}) + "\n")
    with pytest.raises(RecordError, match=r"q\.jsonl, line 3: ") as caught:
        _ = OwnData(str(tmp_path / "q.jsonl")).parts
    assert "\n" not in str(caught.value)


def test_unreadable_folder_is_an_error_and_not_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part2").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:  # permissions don't hold for root
        if Path(path).name == "part2":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(RecordError, match=r"part2: the folder can't be read \(Permission denied\)"):
        files_below(tmp_path)
