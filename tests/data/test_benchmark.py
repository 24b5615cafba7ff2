"""Benchmarks: image references, labels, ids and file names of the questions made from a table."""

import base64
import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from safervlm.data.benchmark import Benchmark
from safervlm.data.hub import hub_rows
from safervlm.data.sources import Download, fetch, save_table
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import open_image
from safervlm.protocol import ALIGNMENT_QUESTIONS


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def encoded(colour):
    return base64.b64encode(png(colour)).decode()


MME = {"answers": "yes_no", "label_column": "answer", "question_column": "question"}
MME |= {"category_column": "category", "name_column": "image_path"}


def mme_rows():
    """Two images with two questions each, in the published columns."""
    rows = []
    for number, colour in enumerate(("red", "blue")):
        for question, answer in (("Is it red?", "Yes"), ("Is it blue?", "No")):
            image = encoded(colour) if not question.endswith("blue?") else str(2 * number)
            row = {"index": len(rows), "image": image, "question": question, "answer": answer}
            rows.append(row | {"category": "color", "image_path": f"images/color/{number}.jpg"})
    return rows


def make(tmp_path, rows, name="set.tsv", **settings):
    file = tmp_path / name
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame(rows).to_csv(file, sep="\t" if file.suffix == ".tsv" else ",", index=False)
    return Benchmark("Set", str(file), cache_dir=str(tmp_path / "cache"), **settings)


def asked(data):
    data.prepare_data()
    return [example.question for example in data.parts.predict]


def colour_of(question):
    return Image.open(question.image_path).convert("RGB").getpixel((0, 0))


def test_rows_about_one_image_share_one_image_file(tmp_path):
    questions = asked(make(tmp_path, mme_rows(), **MME))
    assert [q.id for q in questions] == [f"Set/images/color/{i}.jpg/yes_no/{n}" for i in (0, 1) for n in (0, 1)]
    assert [(q.prompt, q.answer, q.category) for q in questions[:2]] == [
        ("Is it red?", "Yes", "color"),
        ("Is it blue?", "No", "color"),
    ]
    assert [colour_of(q) for q in questions] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
    # One file for both questions: a VLM encodes an image once for all its questions.
    assert questions[0].image_path == questions[1].image_path


def test_image_reference_is_an_index_and_not_a_row_number(tmp_path):
    rows = mme_rows()
    for row, index in zip(rows, (10, 11, 0, 1), strict=True):
        row["index"] = index
    rows[1]["image"], rows[3]["image"] = "10", "0"
    assert [colour_of(q)[0] for q in asked(make(tmp_path, rows, **MME))] == [255, 255, 0, 0]
    rows[1]["image"] = "99"
    data = make(tmp_path, rows, "other.tsv", **MME)
    with pytest.raises(RecordError, match="line 3: the image is that of row 99, which does not exist"):
        asked(data)


def test_safety_labels_and_sampled_prompts_match_the_published_protocol(tmp_path):
    rows = [{"index": i, "image": encoded((i, 0, 0)), "label": i % 2} for i in range(30)]
    rows[7]["image"] = "5"
    questions = asked(make(tmp_path, rows))
    draw = np.random.RandomState(42).choice(5, size=30).tolist()
    assert [q.prompt for q in questions] == [ALIGNMENT_QUESTIONS[n] for n in draw]
    assert [q.prompt_number for q in questions] == draw
    assert all(q.drawn and q.capability == "generalisation" for q in questions)
    assert [q.answer for q in questions] == ["Safe", "Unsafe"] * 15
    # Another row with the same image: a separate question about the same image (not an independent item).
    assert (questions[7].image, questions[7].image_path) == (questions[5].image, questions[5].image_path)
    assert colour_of(questions[7]) == (5, 0, 0)
    assert questions[7].id == f"Set/5.1/generalisation/{draw[7]}"
    every = asked(make(tmp_path, rows, prompts="all"))
    assert len(every) == 150
    assert [q.prompt_number for q in every if q.drawn] == draw


def test_a_limit_keeps_the_questions_of_an_image_together_and_the_draw(tmp_path):
    rows = mme_rows()
    assert [q.image for q in asked(make(tmp_path, rows, limit=1, **MME))] == ["images/color/0.jpg"] * 2
    safety = [{"index": i, "image": encoded((i, 0, 0)), "label": i % 2} for i in range(30)]
    whole, part = (asked(make(tmp_path, safety, "s.tsv", limit=n)) for n in (None, 4))
    assert part == whole[:4]


def test_image_paths_in_tables_are_resolved_within_the_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for colour in ("red", "blue"):
        (tmp_path / "pictures" / f"{colour}.png").write_bytes(png(colour))
    rows = [{"image": f"pictures/{c}.png", "label": label} for c, label in (("red", "Unsafe"), ("blue", "safe"))]
    for name in ("own.csv", "own.jsonl", "own.tsv"):
        questions = asked(make(tmp_path, rows, name, prompts="all"))
        assert {q.image: q.answer for q in questions} == {"pictures/red.png": "Unsafe", "pictures/blue.png": "Safe"}
        assert colour_of(questions[0]) == (255, 0, 0)
    outside = [{"image": "../red.png", "label": "safe"}]
    with pytest.raises(RecordError, match=r"'\.\./red\.png' lies outside"):
        asked(make(tmp_path / "pictures", outside, "out.csv"))


@pytest.mark.parametrize("form", ["folders", "metadata.jsonl", "metadata.csv"])
def test_labels_of_an_image_folder_come_from_subfolders_or_metadata(tmp_path, form):
    for label, colour in (("safe", "blue"), ("unsafe", "red")):
        (tmp_path / "own" / label).mkdir(parents=True)
        (tmp_path / "own" / label / "a.png").write_bytes(png(colour))
    rows = [{"file_name": "safe/a.png", "label": "0"}, {"file_name": "unsafe/a.png", "label": "1"}]
    if form.endswith(".jsonl"):
        (tmp_path / "own" / form).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form.endswith(".csv"):
        pd.DataFrame(rows).to_csv(tmp_path / "own" / form, index=False)
    questions = asked(Benchmark("Own", str(tmp_path / "own"), cache_dir=str(tmp_path / "cache")))
    assert [(q.image, q.answer, colour_of(q)) for q in questions] == [
        ("safe/a.png", "Safe", (0, 0, 255)),
        ("unsafe/a.png", "Unsafe", (255, 0, 0)),
    ]
    assert not (tmp_path / "cache").exists()  # nothing is copied


def test_rated_questions_have_a_reference_answer_and_context(tmp_path):
    row = {"index": 0, "question": "What?", "image": encoded("red"), "category": "conv", "caption": "All red."}
    row |= {"gpt4_ans": "It is red.", "image_path": "001.jpg"}
    settings = {"answers": "rated", "label_column": "gpt4_ans", "question_column": "question"}
    (question,) = asked(make(tmp_path, [row], context_column="caption", name_column="image_path", **settings))
    assert (question.capability, question.answer, question.context) == ("rated", "It is red.", "All red.")


def test_a_broken_image_fails_alone(tmp_path):
    rows = [{"index": 0, "image": "this is not base64!", "label": 0}, {"index": 1, "image": encoded("red"), "label": 1}]
    rows.append({"index": 2, "image": base64.b64encode(b"no image").decode(), "label": 1})
    first, second, third = asked(make(tmp_path, rows))
    assert colour_of(second) == (255, 0, 0)
    for broken in (first, third):
        with pytest.raises(
            RecordError, match=r"its image in the table, '.*', is neither an image in base64.*correct the table"
        ):
            open_image(broken.image_path, broken.id)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "maybe"}, r"set\.tsv, line 2: the answer must be Yes or No, got 'maybe'"),
        ({"question": ""}, r"line 2: 'question' is empty; fill it in, or remove the row"),
        ({"image": ""}, r"line 2: 'image' is empty"),
    ],
)
def test_error_names_an_empty_or_invalid_cell(tmp_path, change, message):
    rows = mme_rows()
    rows[0] |= change
    with pytest.raises(RecordError, match=message):
        asked(make(tmp_path, rows, **MME))


def test_null_cells_and_duplicate_indices_are_rejected(tmp_path):
    rows = mme_rows()
    rows[0]["question"] = None
    with pytest.raises(RecordError, match=r"null\.jsonl, line 1: 'question' is empty"):
        asked(make(tmp_path, rows, "null.jsonl", **MME))
    rows = mme_rows()
    rows[3]["index"] = 0
    with pytest.raises(RecordError, match="two rows have the index 0"):
        asked(make(tmp_path, rows, "twice.tsv", **MME))


def test_unknown_label_is_rejected_unless_configured(tmp_path):
    rows = [{"image": encoded("red"), "label": "2"}]
    with pytest.raises(RecordError, match=r"label '2' means neither Unsafe nor Safe: see data\.unsafe"):
        asked(make(tmp_path, rows))
    assert asked(make(tmp_path, rows, "b.tsv", unsafe=["2"]))[0].answer == "Unsafe"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, r"data\.name"),
        ({"limit": 0}, r"data\.limit"),
        ({"answers": "occurs"}, r"data\.question_column: occurs needs"),
        ({"unsafe": ["0"]}, "a label in common"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(**({"name": "Set", "source": "x.tsv"} | settings))


def test_unavailable_source_is_reported_in_one_line(tmp_path, monkeypatch):
    data = Benchmark("SMID", "nowhere/x", about="moral images, from the Hub", cache_dir=str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no net")))
    with pytest.raises(RecordError, match=r"nowhere/x: the Hub can't be reached \(no net\).*moral images") as found:
        data.prepare_data()
    assert "\n" not in str(found.value)
    missing = Benchmark("SMID", "./x.tsv", cache_dir=str(tmp_path))
    for step in (missing.prepare_data, missing.load):  # the other process only loads
        with pytest.raises(RecordError, match=r"data\.source: there is no x\.tsv"):
            step()
    # A name that looks like a file, or is inside an existing folder, is not treated as a name on the Hub.
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for source in ("nowhere/x.csv", "mine/images"):
        with pytest.raises(RecordError, match=rf"data\.source: there is no {source}: name a file"):
            Benchmark("Mine", source, cache_dir=str(tmp_path)).prepare_data()


def test_missing_column_is_reported_with_its_argument(tmp_path):
    rows = [{"picture": "0.png", "label": "safe"}]
    with pytest.raises(
        RecordError, match=r"line 2: there is no column 'image', but label, picture; name one by data\.image_column"
    ):
        asked(make(tmp_path, rows))


def test_an_image_that_is_safe_and_unsafe_is_reported(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    for second, said in (("unsafe", 1), ("safe", 0)):
        (tmp_path / "twice.csv").write_text(f"image,label\n0.png,safe\n0.png,{second}\n")
        data = Benchmark("Mine", str(tmp_path / "twice.csv"), cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        assert len(data.load().predict) == 2
        assert (
            capsys.readouterr().out.count("Mine: 1 images are Safe in one row and Unsafe in another, as 0.png") == said
        )


@pytest.mark.parametrize("embedded", [False, True])
def test_hub_dataset_is_converted_to_a_table_and_downloaded_once(tmp_path, monkeypatch, embedded):
    images = [encoded("red"), "0"] if not embedded else [Image.new("RGB", (8, 6), c) for c in ("red", "red")]
    rows = datasets.Dataset.from_dict({"index": [0, 1], "image": images, "label": [1, 0]})
    if embedded:
        rows = rows.cast_column("image", datasets.Image())
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or rows)
    data = Benchmark("SMID", "yiting/SMID@abc", cache_dir=str(tmp_path / "cache"))
    questions = asked(data)
    assert calls == [(("yiting/SMID",), {"split": "train", "revision": "abc"})]
    assert [(q.answer, colour_of(q)) for q in questions] == [("Unsafe", (255, 0, 0)), ("Safe", (255, 0, 0))]
    assert asked(Benchmark("SMID", "yiting/SMID@abc", cache_dir=str(tmp_path / "cache"))) == questions
    assert len(calls) == 1  # is not downloaded again


def test_the_hubs_library_decodes_no_image_at_any_depth(tmp_path, monkeypatch):
    """Decoding would raise for an invalid image, which has to be reported as one bad record."""
    broken = b"not an image"
    image = datasets.Image()
    features = {
        "image": image,
        "list": datasets.List(image),
        "large": datasets.LargeList(image),
        "struct": {"inner": image, "n": datasets.Value("int64")},
        "deep": datasets.List({"images": datasets.List(image)}),
        "label": datasets.Value("int64"),
    }
    there = {"bytes": broken, "path": None}
    row = {
        "image": there,
        "list": [there, there],
        "large": [there],
        "struct": {"inner": there, "n": 1},
        "deep": [{"images": [there]}],
        "label": 1,
    }
    rows = datasets.Dataset.from_list([row], features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    save_table(hub_rows("a/b", ""), tmp_path / "x.jsonl")
    text = base64.b64encode(broken).decode()
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {
        "image": text,
        "list": [text, text],
        "large": [text],
        "struct": {"inner": text, "n": 1},
        "deep": [{"images": [text]}],
        "label": 1,
    }


class Unkind(BaseHTTPRequestHandler):
    """A server with one misbehaviour per path: slow, silent, too large or redirecting downloads."""

    asked: list[str] = []  # noqa: RUF012 (shared by all requests on purpose)

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/announced":
            self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            for _ in range(200):
                self.wfile.write(b"x" * (1 if self.path == "/slow" else 1000))
                if self.path in ("/slow", "/silent"):
                    time.sleep(0.05 if self.path == "/slow" else 60)
        except OSError:
            pass  # the client has given up

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("path", "bounds", "said"),
    [
        ("moved", {}, r"it redirects to '.*/elsewhere', which is not followed"),
        ("announced", {"max_bytes": 5000}, r"more than 5000 bytes, see data\.download\.max_bytes"),
        ("endless", {"max_bytes": 5000}, r"more than 5000 bytes, see data\.download\.max_bytes"),
        ("slow", {"timeout": 0.3}, r"longer than 0\.3 s, see data\.download\.timeout"),
        ("silent", {"pause": 0.2}, "timed out"),
    ],
)
def test_a_download_is_bounded(tmp_path, path, bounds, said):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unkind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Unkind.asked.clear()
    begun = time.monotonic()
    try:
        with pytest.raises(RecordError, match=said) as caught:
            fetch(f"http://127.0.0.1:{server.server_port}/{path}", tmp_path / "cache" / "x.tsv", Download(**bounds))
    finally:
        server.shutdown()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 30  # the silent server resumes after 60 s
    assert Unkind.asked == [f"/{path}"]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("bounds", [{"max_bytes": 0}, {"timeout": -1.0}, {"pause": float("nan")}])
def test_the_bounds_of_a_download_are_numbers_above_0(bounds):
    with pytest.raises(ArgumentError, match=rf"^data\.download\.{next(iter(bounds))}: a number above 0, got "):
        Download(**bounds)


@pytest.fixture
def web(tmp_path):
    content = pd.DataFrame(mme_rows()).to_csv(sep="\t", index=False).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            cut = self.path.startswith("/cut")
            self.send_response(200 if "MME" in self.path else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: 10 if cut else None])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", hashlib.md5(content, usedforsecurity=False).hexdigest()
    server.shutdown()


def test_file_at_a_url_is_downloaded_verified_and_cached(tmp_path, web):
    address, md5 = web
    cache = str(tmp_path / "cache")
    assert len(asked(Benchmark("MME", f"{address}/MME.tsv", md5=md5, cache_dir=cache, **MME))) == 4
    (kept,) = (tmp_path / "cache").glob("MME-*.tsv")
    made = kept.stat().st_mtime_ns
    assert len(asked(Benchmark("MME", f"{address}/MME.tsv", md5=md5, cache_dir=cache, **MME))) == 4
    assert kept.stat().st_mtime_ns == made
    for _ in range(2):  # the file may have been changed since
        with pytest.raises(RecordError, match=r"its MD5 is .*, that of .*MME2\.tsv is abc"):
            asked(Benchmark("MME", f"{address}/MME2.tsv", md5="abc", cache_dir=cache, **MME))
    with pytest.raises(RecordError, match=r"can't be fetched .*404"):
        asked(Benchmark("MME", f"{address}/none.tsv", cache_dir=cache, **MME))
    with pytest.raises(RecordError, match=r"can't be fetched .*10 of .* bytes were received.*fetch it by other means"):
        asked(Benchmark("MME", f"{address}/cut/MME3.tsv", cache_dir=cache, **MME))
    assert len(list((tmp_path / "cache").glob("MME-*.tsv"))) == 1
    # Another address with the same name is another dataset.
    assert len(asked(Benchmark("MME", f"{address}/other/MME.tsv", cache_dir=cache, **MME))) == 4
    assert len(list((tmp_path / "cache").glob("MME-*.tsv"))) == 2


def test_changed_images_change_the_dataset_fingerprint(tmp_path):
    data = make(tmp_path, mme_rows(), **MME)
    asked(data)
    before = data.describe()["images"]
    rows = mme_rows()
    rows[0]["image"] = encoded("green")
    other = make(tmp_path, rows, **MME)
    other.prepare_data()
    assert before != other.describe()["images"]
    assert colour_of(other.parts.predict[0].question) == (0, 128, 0)
