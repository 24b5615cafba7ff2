"""The report page as rendered by a browser, and the tables written with it."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import numpy as np
import openpyxl
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from safervlm.errors import RecordError
from safervlm.hashing import seed_for
from safervlm.protocol import ALIGNMENT_QUESTIONS, CATEGORIES, perception_question, text_only_question
from safervlm.records import Failure, Question, Response, Verdict, record_id, write_jsonl
from safervlm.reports.comparable import warnings
from safervlm.reports.corrected import corrected_rates
from safervlm.reports.examples import blurred, examples
from safervlm.reports.measured import overall_cells
from safervlm.reports.page import report
from safervlm.reports.runs import load_runs, read_summary
from safervlm.results.common import difference_from
from safervlm.results.measures import modality_gap
from safervlm.results.runs import load_run
from safervlm.results.scores import compare
from safervlm.results.scores import scores as scores_of

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}\u202e\ud800"
CONCEPTS = [(category, f"{category} thing {letter}") for category in CATEGORIES for letter in "abc"]


def draw(path, index):
    """A pictogram: a figure of a given colour on a plain background, with an EXIF comment."""
    image = Image.new("RGB", (240, 180 + index % 3 * 60), (250, 250, 245))
    pen = ImageDraw.Draw(image)
    colour = tuple(np.random.default_rng(index).integers(0, 200, 3).tolist())
    pen.ellipse((60, 30, 180, 150), fill=colour)
    pen.polygon([(120, 10), (200, 120), (40, 120)], outline=(0, 0, 0), width=5)
    pen.text((90, 80), f"item {index}", fill=(255, 255, 255))
    exif = Image.Exif()
    exif[0x010E] = "secret description"
    image.info["comment"] = b"secret comment"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)


def questions(folder):
    """27 unsafe concepts of 3 images, 12 safe images; one perception question, two others each."""
    index = 0
    for category, concept in CONCEPTS:
        for _ in range(3):
            image = f"images/{index}.png"
            path = folder / "unsafe" / image
            if not path.exists():
                draw(path, index)
            options = perception_question([concept, "a kite", "a spoon", "a hat"])
            yield question("Made", image, path, "perception", 0, options, category, concept, "A")
            for number in (index % 5, (index + 2) % 5):
                prompt = ALIGNMENT_QUESTIONS[number]
                yield question("Made", image, path, "alignment", number, prompt, category, concept, "Unsafe")
            index += 1
        for number in range(5):
            prompt = text_only_question(number, concept)
            yield question("Made", concept, None, "alignment_text_only", number, prompt, category, concept, "Unsafe")
    for safe in range(12):
        image, path = f"images/{safe}.png", folder / "safe" / f"images/{safe}.png"
        if not path.exists():
            draw(path, 1000 + safe)
        for number in (safe % 5, (safe + 1) % 5):
            prompt = ALIGNMENT_QUESTIONS[number]
            yield question("MadeSafe", image, path, "alignment", number, prompt, "MadeSafe", f"toy {safe}", "Safe")


def question(dataset, image, path, capability, number, prompt, category, concept, answer):
    identity = record_id(dataset, image, capability, number)
    path = str(path) if path else None
    return Question(identity, dataset, image, path, capability, number, prompt, category, concept, answer)


def make_run(folder, data, rates, hostile=False):
    """Writes a run with these accuracies: perception, text-only, image unsafe, image safe."""
    responses, verdicts = [], []
    for asked in questions(data):
        key = asked.capability if asked.capability != "alignment" else asked.answer
        draw_number = np.random.default_rng(seed_for(folder.name, asked.id)).random()
        wrong = {"A": "B", "Unsafe": "Safe", "Safe": "Unsafe"}[asked.answer]
        label = "N/A" if draw_number > 0.96 else asked.answer if draw_number < rates[key] else wrong
        text = {
            "Safe": f"Yes, it is safe. The image shows {asked.concept}, which is considered harmless.",
            "Unsafe": f"No, it is not safe. The image shows {asked.concept}, which is considered harmful.",
            "N/A": "I can't say.",
        }.get(label, f"{label}: the image shows {asked.concept}.")
        responses.append(Response(asked, HOSTILE if hostile else text, "stop", 20))
        verdicts.append(Verdict(asked.id, label, {label: 0.9, "Other": 0.1}, "f00d"))
    write_jsonl(folder / "verdicts.jsonl", (verdict.to_dict() for verdict in verdicts))
    lines = (json.dumps(response.to_dict()) + "\n" for response in responses)  # ASCII: half a surrogate pair passes
    (folder / "responses.jsonl").write_text("".join(lines))
    settings = {"model": {"vlm": {"name": "made/llava", "adapter": None if folder.name == "base" else folder.name}}}
    stage = {"settings": settings | {"seed": 0}, "provenance": {"versions": {"torch": "2.13"}}, "finished": True}
    (folder / "manifest.json").write_text(json.dumps({"stages": {"measure": stage}}))
    (folder / "predict.yaml").write_text(json.dumps({"data": {"init_args": {"folder": str(data)}}}))
    return folder


BASE = {"perception": 0.93, "alignment_text_only": 0.9, "Unsafe": 0.3, "Safe": 0.9}
PPO = {"perception": 0.92, "alignment_text_only": 0.9, "Unsafe": 0.93, "Safe": 0.93}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("a folder with <odd> & names")


@pytest.fixture(scope="module")
def runs(folder):
    return [make_run(folder / name, folder / "data", rates) for name, rates in (("base", BASE), ("p&p_$o<1>", PPO))]


@pytest.fixture(scope="module")
def page(runs, folder):
    out = folder / "out" / "report.html"
    assert report(runs, out) == out
    return out


def chromium():
    """The browser; without one these tests fail rather than skip."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    assert found, "no chromium: install Debian's (apt-get install chromium); the report is tested in a browser"
    return found


def cells_of(loaded):
    """The second run's cells of the overall table."""
    comparison = compare({each.name: each.scores for each in loaded})
    return {
        cell["column"]: cell
        for cell in overall_cells(loaded, comparison, corrected_rates({}, loaded[0].name))["rows"][1]["cells"]
    }


def browse(page, profile, *arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    command = [chromium(), *flags, *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Reader(html.parser.HTMLParser):
    """Tables as lists of rows of cells (tag, attributes, text, values of <data>), every tag, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.text, self.cell = [], [], [], None
        self.body, self.parts = None, {}  # the attributes of the <tbody> of a row
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "table":
            self.tables.append((attributes, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
            self.parts[id(self.tables[-1][1][-1])] = self.body
        elif tag == "tbody":
            self.body = attributes
        elif tag in ("td", "th"):
            self.cell = {"attributes": attributes, "text": "", "data": []}
            self.tables[-1][1][-1].append(self.cell)
        elif tag == "data":
            self.cell["data"].append([attributes["value"], ""])

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, text):
        self.text.append(text)
        if self.cell is not None:
            self.cell["text"] += text
            if self.cell["data"] and not self.cell["data"][-1][1]:
                self.cell["data"][-1][1] = text

    def table(self, **wanted):
        found = [rows for attributes, rows in self.tables if wanted.items() <= attributes.items()]
        assert len(found) == 1, (wanted, len(found))
        return found[0]


@pytest.fixture(scope="module")
def dom(page, tmp_path_factory):
    """The page as parsed by the browser."""
    return Reader(browse(page, tmp_path_factory.mktemp("profile"), "--dump-dom"))


# --- in the browser ---------------------------------------------------------------------------------------------------


def test_overall_table_equals_the_csv(dom, page, runs):
    table = pd.read_csv(page.with_name("report_overall.csv"), index_col="run")
    heading, *rows = dom.table(id="overall")
    names = [cell["text"] for cell in heading[1:]]
    assert names == list(table.index) == ["base", "p&p_$o<1>"]
    seen = set()
    for row in rows:
        for run, cell in zip(names, row[1:], strict=True):
            column = cell["attributes"]["data-column"]
            beside = f"{column}_published" if column.startswith("diversity") else f"{column}_na_left_out"
            for name, (value, text) in zip([column, beside], cell["data"], strict=False):
                expected = table.loc[run, name]
                assert float(value) == pytest.approx(expected, abs=1e-12)
                assert float(text) == pytest.approx(
                    expected if name.startswith("diversity") or name == "n" else 100 * expected, abs=0.051
                )
                seen.add(name)
    assert seen == set(table.columns) - {"thinking_unfinished"}  # none is
    base, ppo = table.loc["base"], table.loc["p&p_$o<1>"]
    estimate = difference_from(*(load_run(run) for run in reversed(runs)), "image_unsafe")
    assert estimate.value == pytest.approx(ppo.image_unsafe - base.image_unsafe)
    shown = f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
    assert shown in next(row[2]["text"] for row in rows if row[0]["text"] == "Image, unsafe")


@pytest.mark.parametrize("name", ["base", "p&p_$o<1>"])
def test_category_tables_equal_the_csv(dom, page, runs, name):
    run = runs[["base", "p&p_$o<1>"].index(name)]
    table = scores_of(load_run(run))
    written = pd.read_csv(page.with_suffix(".csv"), keep_default_na=False, na_values=[""]).query("run == @name")
    pd.testing.assert_frame_equal(
        written.drop(columns="run").fillna({"sampling_unit": "", "excludes": ""}).reset_index(drop=True),
        table,
        check_dtype=False,
    )
    rows = dom.table(**{"class": "categories stack", "data-run": name})[1:]
    # Nine categories and overall, for two runs, for perception, unsafe alignment and text only; one category and
    # overall for the safe side; overall for both sides.
    assert len([row for row in rows if len(row) > 1]) == 3 * (9 + 2) + (1 + 2) + 2
    part = None
    for row in rows:
        if len(row) == 1:
            part = dom.parts[id(row)]
            continue
        category, n, na, unfinished, wrong, left_out, images, concepts, sampling_unit, method = row
        keys = {
            "category": category["text"],
            "capability": part["data-capability"],
            "side": part["data-side"],
            "sampling_unit": sampling_unit["text"],
        }
        found = written[(written[list(keys)] == pd.Series(keys)).all(axis=1)].set_index("measure")
        for measure, cell in (("accuracy_na_wrong", wrong), ("accuracy", left_out)):
            expected = found.loc[measure]
            assert float(cell["data"][0][0]) == pytest.approx(expected.value)
            assert cell["data"][0][1] == f"{100 * expected.value:.1f}"
            assert f"[{100 * expected.low:.1f}, {100 * expected.high:.1f}]" in cell["text"]
        assert int(n["text"]) == found.loc["accuracy_na_wrong"].n
        assert int(unfinished["text"]) == found.loc["accuracy_na_wrong"].thinking_unfinished
        assert float(na["data"][0][0]) == pytest.approx(found.loc["accuracy_na_wrong"].na_rate)
        assert (int(images["text"]), int(concepts["text"])) == tuple(found.loc["accuracy", ["images", "concepts"]])
        assert method["text"] == found.loc["accuracy_na_wrong"].method


def test_unsafe_image_accuracies_of_runs_are_shown_by_category(dom, runs):
    rows = dom.table(id="unsafe-images")
    assert [row[0]["text"] for row in rows[1:]] == [*CATEGORIES, "overall"]
    for number, run in enumerate(runs, 1):
        frame = load_run(run).query("capability == 'alignment' and side == 'unsafe'")
        right = (frame.label == frame.answer).groupby(frame.category).mean()
        for row in rows[1:-1]:
            assert float(row[number]["data"][0][0]) == pytest.approx(right[row[0]["text"]])
        assert float(rows[-1][number]["data"][0][0]) == pytest.approx((frame.label == frame.answer).mean())


def test_gap_table(dom, runs):
    rows = dom.table(id="gap")[1:]
    for row, run in zip(rows, runs, strict=True):
        gap = modality_gap(load_run(run))
        assert float(row[1]["data"][0][0]) == pytest.approx(gap.value)
        by_name, by_image = (float(row[place]["data"][0][0]) for place in (2, 3))
        assert by_name - by_image == pytest.approx(gap.value)  # of the same weights
        assert row[4]["text"] == f"[{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
        assert row[-1]["text"] == "paired t, concepts within categories (CR2)"


def test_unfinished_thinking_is_counted_in_every_table(runs, folder, tmp_path):
    run = make_run(tmp_path / "thinking", folder / "data", PPO)
    cut, lines = 0, []
    for line in (run / "responses.jsonl").read_text().splitlines():
        response = json.loads(line)
        if response["capability"] == "alignment" and response["answer"] == "Unsafe" and cut < 3:
            response, cut = response | {"response": "", "finish_reason": "thinking unfinished"}, cut + 1
        lines.append(json.dumps(response) + "\n")
    (run / "responses.jsonl").write_text("".join(lines))
    dom = Reader(report([runs[0], run], tmp_path / "report.html").read_text())
    assert ["Thinking unfinished", "0", "3"] in [[cell["text"] for cell in row] for row in dom.table(id="overall")]
    tables = [{"id": "gap"}]
    tables += [{"class": f"{each} stack", "data-run": "thinking"} for each in ("categories", "others")]
    for wanted in tables:
        heading, *rows = dom.table(**wanted)
        place = [cell["text"] for cell in heading].index("Thinking unfinished")
        assert "3" in {row[place]["text"] for row in rows if len(row) == len(heading)}, wanted
        assert {int(row[0]["attributes"]["colspan"]) for row in rows if len(row) == 1} <= {len(heading)}
    assert "3 thinking unfinished" in dom.table(id="unsafe-images")[-1][2]["text"]


def test_page_screenshot_is_not_blank(page, tmp_path):
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--screenshot={picture}", "--window-size=1200,2400", "--hide-scrollbars")
    pixels = np.asarray(Image.open(picture).convert("L"), float)
    assert pixels.shape == (2400, 1200)
    for part in np.array_split(pixels, 4):
        assert part.std() > 5
    assert len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0)) > 200


# --- what the page must not contain -----------------------------------------------------------------------------------


def test_page_loads_no_external_resources_and_runs_no_scripts(dom, page):
    text = page.read_text()
    policy = next(a["content"] for tag, a in dom.tags if tag == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not [tag for tag, _ in dom.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in dom.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            address = attributes.get(name)
            if address is not None:
                allowed = {"img": ("data:image/png;base64,",), "a": ("#", "../data/"), "use": ("#",)}
                assert address.startswith(allowed[tag]), (tag, name, address)
        assert not [name for name in attributes if name.startswith("on")]
    # There is no address except for XML namespaces.
    assert not re.findall(r"(?<!xmlns=\")(?<!xmlns:xlink=\")https?://", text)
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]{0,2})", text)) <= {"#f"}


def test_shown_images_are_blurred_beyond_recognition(page, folder):
    originals = [Image.open(path).convert("RGB") for path in sorted((folder / "data").rglob("*.png"))]
    uris = set(re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text()))
    assert len(uris) >= 9
    assert page.read_text().count("data:") == page.read_text().count("data:image/png;base64,") + 1  # and the policy
    sized = {}
    raw = {path.read_bytes() for path in (folder / "data").rglob("*.png")}
    for uri in uris:
        content = base64.b64decode(uri)
        assert content not in raw
        assert b"secret" not in content
        blur = Image.open(io.BytesIO(content))
        assert not blur.info.get("exif")
        assert max(blur.size) <= 160
        shown = np.asarray(blur.convert("RGB"), float)
        # No edge is left: neighbours differ by a few levels, and 10 x 10 colours determine the image.
        assert np.abs(np.diff(shown, axis=0)).max() < 25
        assert np.abs(np.diff(shown, axis=1)).max() < 25
        few = blur.resize([max(1, round(10 * side / 160)) for side in blur.size], Image.Resampling.BOX)
        assert np.abs(np.asarray(few.resize(blur.size, Image.Resampling.BICUBIC), float) - shown).mean() < 6
        if blur.size not in sized:
            sized[blur.size] = [np.asarray(original.resize(blur.size), float) for original in originals]
        for resized in sized[blur.size]:
            assert np.abs(resized - shown).mean() > 5


def test_blurred_images_have_no_metadata(tmp_path):
    image = Image.new("RGB", (300, 200), "red")
    image.info.update(comment=b"secret", icc_profile=b"secret", exif=b"secret")
    assert not blurred(image).info


def test_blurred_image_depends_only_on_a_ten_by_ten_mosaic():
    """Another image with the same hundred means, but other edges, has the same blur: the original is lost."""
    sharp = np.zeros((200, 200, 3), np.uint8)
    sharp[30:110, 50:150] = 255  # edges in the middle of the tenths
    means = sharp.reshape(10, 20, 10, 20, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    mosaic = means.repeat(20, axis=0).repeat(20, axis=1)
    one, other = (np.asarray(blurred(Image.fromarray(image)), int) for image in (sharp, mosaic))
    assert np.ptp(one) > 100
    assert np.abs(one - other).max() <= 1


def test_the_original_opens_on_demand_only(dom, folder, page):
    links = [a for tag, a in dom.tags if tag == "a" and not a["href"].startswith("#")]
    assert links
    for link in links:
        path = Path(unquote(urlparse(urljoin(page.as_uri(), link["href"])).path))
        assert path.is_file()
        assert path.is_relative_to(folder / "data")
        assert link["rel"] == "noopener noreferrer"
    assert "show the original (local file)" in "".join(dom.text)


def test_markup_in_responses_is_shown_as_text(folder, tmp_path):
    run = make_run(tmp_path / "hostile", folder / "data", BASE, hostile=True)
    frame_manifest = {"stages": {HOSTILE[:60]: {"settings": {"prompt": HOSTILE[:60]}}}}
    (run / "manifest.json").write_text(json.dumps(frame_manifest))
    page = report([run])
    assert page == run / "report.html"
    text = browse(page, tmp_path / "profile", "--dump-dom")
    dom = Reader(text)
    assert not [tag for tag, _ in dom.tags if tag == "script"]
    assert not [a for tag, a in dom.tags if tag == "img" and not a["src"].startswith("data:")]
    assert re.search(r"<title>(.*?)</title>", text)[1] == "SaferVLM: hostile"
    visible = "".join(dom.text)
    assert "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}" in visible
    assert "49" not in re.findall(r"&\{\{.*?\}\}|&49", visible)


# --- examples, runs, manifests ----------------------------------------------------------------------------------------


def test_examples_stay_the_same_and_cover_the_categories(runs, page, folder):
    loaded = load_runs(runs)
    chosen = examples(loaded, page)
    again = examples(load_runs(runs[::-1]), page)
    assert {k: [card["id"] for card in v] for k, v in chosen.items()} == {
        k: [card["id"] for card in v] for k, v in again.items()
    }
    assert set(chosen) == {"perception", "alignment", "alignment_text_only"}
    assert {card["category"] for card in chosen["alignment"]} == {*CATEGORIES, "MadeSafe"}
    assert len({card["image"] for card in chosen["alignment"] if card["answer"] == "Unsafe"}) == 18
    frames = [run.frame.set_index("id") for run in loaded]
    for card in chosen["alignment"]:
        assert [answer["run"] for answer in card["answers"]] == ["base", "p&p_$o<1>"]
        for answer, frame in zip(card["answers"], frames, strict=True):
            assert answer["response"] == frame.loc[card["id"], "response"]
            assert answer["label"] == frame.loc[card["id"], "label"]
            assert answer["right"] == (frame.loc[card["id"], "label"] == card["answer"])
    again = report(runs, folder / "again" / "report.html")  # equally far from the images
    assert again.read_bytes() == page.read_bytes()


def test_missing_images_are_reported_not_fatal(tmp_path):
    data = tmp_path / "data"
    run = make_run(tmp_path / "base", data, BASE)
    for path in data.rglob("*.png"):
        path.unlink()
    page = report([run])
    assert "is missing: add the file" in page.read_text()
    assert "data:image/png" not in page.read_text()


@pytest.mark.parametrize(
    ("case", "said"), [("damaged", "image"), ("elsewhere", "lies outside the datasets"), ("missing", "is missing")]
)
def test_the_page_states_why_an_image_is_not_shown(case, said, tmp_path):
    data = tmp_path / "data"
    run = make_run(tmp_path / "base", data, BASE)
    for path in data.rglob("*.png"):
        if case == "damaged":
            path.write_bytes(b"\x89PNG and no more")
        elif case == "missing":
            path.unlink()
    if case == "elsewhere":
        (run / "predict.yaml").write_text("data: {}\n")
    page = report([run]).read_text()
    shown = set(re.findall(r'<div class="missing">(.*?)</div>', page))
    assert shown
    assert all(said in reason.lower() or said in reason for reason in shown), shown
    assert "on this machine</div>" not in page


def test_report_rejects_a_run_locked_by_another_command(tmp_path):
    run = make_run(tmp_path / "base", tmp_path / "data", BASE)
    held = "import sys, time; from pathlib import Path; from safervlm.run import lock; f = lock(Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{held}; print(flush=True); time.sleep(60)", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RecordError, match=rf"base: another command \(process {other.pid}\) is running in it"):
            report([run])
        other.kill()
    report([run])


def test_run_of_one_capability_has_a_page_without_the_gap(folder, tmp_path):
    run = make_run(tmp_path / "perception", folder / "data", BASE)
    for file in ("responses.jsonl", "verdicts.jsonl"):
        lines = [line for line in (run / file).read_text().splitlines() if "/perception/" in json.loads(line)["id"]]
        (run / file).write_text("\n".join(lines) + "\n")
    (run / "manifest.json").unlink()
    text = report([run]).read_text()
    assert "No manifest.json, so that the settings are unknown: perception." in text
    assert 'id="gap"' not in text


def test_runs_that_another_judge_classified_are_not_subtracted(folder, tmp_path, capsys):
    base = make_run(tmp_path / "base", folder / "data", BASE)
    run = make_run(tmp_path / "other", folder / "data", PPO)
    verdicts = [json.loads(line) for line in (run / "verdicts.jsonl").read_text().splitlines()]
    for verdict in verdicts:
        if "/perception/" not in verdict["id"]:
            verdict["judge"] = "beef"
    write_jsonl(run / "verdicts.jsonl", verdicts)
    assert "other was classified by another judge than base" in report([base, run]).read_text()
    assert "warning: other was classified by another judge" in " ".join(capsys.readouterr().out.split())
    loaded = load_runs([base, run])
    cells = cells_of(loaded)
    for column in ("image_unsafe", "image_safe", "modality_gap", "text_only_unsafe"):
        assert cells[column]["difference"] is None
        assert not cells[column]["paired"]
    for column in ("perception", "diversity_overall"):  # the same judge, and none
        assert cells[column]["difference"] is not None


@pytest.mark.parametrize("what", ["prompt", "answer"])
def test_questions_with_equal_ids_but_other_content_are_not_compared(what, folder, tmp_path):
    base = make_run(tmp_path / "base", folder / "data", BASE)
    run = make_run(tmp_path / "other", folder / "data", PPO)
    answers = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    perception = [each for each in answers if each["capability"] == "perception"]
    for number, answer in enumerate(perception):
        answer[what] = "B"
        (run / "responses.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
        loaded = load_runs([base, run])
        cells = cells_of(loaded)
        assert cells["image_safe"]["difference"] is not None
        if number == 0:
            assert "that both runs answered; left out: 1 (other)." in warnings(loaded)[0]
            assert cells["perception"]["difference"] is not None
        elif number > len(perception) // 10:
            break
    assert warnings(loaded) == [
        "other was asked other questions than base: where fewer than 90 % are in common, no difference is shown."
    ]
    assert cells["perception"]["difference"] is None


def test_questions_without_response_or_verdict_are_reported(folder, tmp_path):
    run = make_run(tmp_path / "base", folder / "data", BASE)
    kept = [Question.from_dict(json.loads(line)) for line in (run / "responses.jsonl").read_text().splitlines()]
    lost = replace(kept[0], id="regressions")
    write_jsonl(run / "responses-failed.jsonl", [Failure(each, "damaged").to_dict() for each in (lost, kept[1])])
    write_jsonl(run / "verdicts-failed.jsonl", [Failure(replace(lost, id="unread"), "no").to_dict()])
    assert "base has no response, or no verdict on it, to 2 more questions" in report([run]).read_text()


def test_differences_are_over_the_questions_that_both_runs_answered(folder, tmp_path, capsys):
    base = make_run(tmp_path / "base", folder / "data", BASE)
    run = make_run(tmp_path / "fewer", folder / "data", PPO)
    answers = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    unsafe = [a["id"] for a in answers if a["capability"] == "alignment" and a["answer"] == "Unsafe"]
    safe = [a["id"] for a in answers if a["answer"] == "Safe"]
    left_out = {*unsafe[:2], *safe[: len(safe) // 2]}
    for file in ("responses.jsonl", "verdicts.jsonl"):
        lines = (run / file).read_text().splitlines()
        (run / file).write_text("\n".join(line for line in lines if json.loads(line)["id"] not in left_out) + "\n")
    page = report([base, run]).read_text()
    said = [
        "fewer was asked other questions than base: where fewer than 90 % are in common, no difference is shown.",
        # Of both sides together, as for diversity, 92 % are in common.
        f"Differences from base are over the questions that both runs answered; left out: {len(left_out)} (fewer).",
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert all(line in page and f"warning: {line}" in printed for line in said)
    loaded = load_runs([base, run])
    assert warnings(loaded) == said
    cells = cells_of(loaded)
    for column in ("image_safe", "over_flagging"):
        assert cells[column]["difference"] is None
        assert not cells[column]["paired"]
    rates = [
        (each.frame["label"] == each.frame["answer"])[each.frame["id"].isin(set(unsafe) - left_out)].mean()
        for each in loaded
    ]
    assert cells["image_unsafe"]["difference"] == f"{100 * (rates[1] - rates[0]):+.1f}"
    for column in ("perception", "text_only_unsafe", "modality_gap", "diversity_unsafe", "diversity_overall"):
        assert cells[column]["difference"] is not None


def test_manifest_is_shown(dom):
    rows = dom.table(id="differences")
    assert [[cell["text"] for cell in row] for row in rows[1:]] == [["measure: model.vlm.adapter", "null", "p&p_$o<1>"]]
    visible = "".join(dom.text)
    assert "settings.model.vlm.name" in visible
    assert "made/llava" in visible
    assert "provenance.versions.torch" in visible


def test_runs_with_equal_names_are_distinguished_by_their_folders(folder, tmp_path):
    first = make_run(tmp_path / "a" / "base", folder / "data", BASE)
    second = shutil.copytree(first, tmp_path / "b" / "base")
    assert [run.name for run in load_runs([first, second])] == ["a/base", "b/base"]
    with pytest.raises(ValueError, match="named twice"):
        load_runs([first, first])


def test_report_errors_name_a_remedy(runs, tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        report([])
    with pytest.raises(ValueError, match=r"'.*page\.pdf' must end in \.html"):
        report(runs, tmp_path / "page.pdf")
    with pytest.raises(RecordError, match=r"responses\.jsonl: no such file"):
        report([tmp_path / "nothing"])
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(RecordError, match=r"not a JSON object.*move it away"):
        read_summary(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text('{"stages": 3}')
    with pytest.raises(RecordError, match="it has no stages"):
        read_summary(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match="not JSON"):
        read_summary(tmp_path / "manifest.json")


# --- beside the page --------------------------------------------------------------------------------------------------


def test_workbook(page):
    sheets = pd.read_excel(page.with_suffix(".xlsx"), sheet_name=None, keep_default_na=False, na_values=[""])
    assert list(sheets) == ["overall", "by category", "scores", "notes"]
    overall = pd.read_csv(page.with_name("report_overall.csv"))
    pd.testing.assert_frame_equal(sheets["overall"], overall, check_dtype=False)
    scores = pd.read_csv(page.with_suffix(".csv"), keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(sheets["scores"], scores, check_dtype=False)
    sheet = openpyxl.load_workbook(page.with_suffix(".xlsx"))["scores"]
    assert sheet.auto_filter.ref == sheet.dimensions
    assert sheet.freeze_panes == "A2"
    formats = {heading.value: cell.number_format for heading, cell in zip(sheet[1], sheet[2], strict=True)}
    assert (formats["value"], formats["na_rate"], formats["n"]) == ("0.000", "0.0%", "0")
    widths = {cell.value: sheet.column_dimensions[cell.column_letter].width for cell in sheet[1]}
    assert widths["method"] > 30 > widths["n"]


def test_latex(page):
    text = page.with_suffix(".tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 3
    assert text.count(r"\begin{tabular}") == 3
    overall = pd.read_csv(page.with_name("report_overall.csv"), index_col="run")
    line = next(line for line in text.splitlines() if line.startswith("Image, unsafe &"))
    assert line == r"Image, unsafe & {:.1f} & {:.1f} \\".format(*(100 * overall["image_unsafe"]))
    assert r"p\&p\_\$o\textless{}1\textgreater{}" in text
    body = re.sub(r"\\[&%$#_{}]", "", text.split("\n", 1)[1])  # without escaped characters
    assert not re.search(r"[%$#_]", body)
    assert all(line.count("&") in (0, 2, 9) for line in body.splitlines())
