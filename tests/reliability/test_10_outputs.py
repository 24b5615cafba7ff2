"""Promise 10, outputs: names and texts in the terminal, CSV, Excel, LaTeX and HTML, each read by its own parser."""

import contextlib
import csv
import html.parser
import io
import json
import os
import re
import types
import warnings
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import openpyxl
import pytest
from evaluations import question, write
from PIL import Image
from test_10_escaping import HOSTILE, unescaped_latex

from callbacks.score_table import ScoreTable
from safervlm.io.escape import without_folders
from safervlm.io.names import normal_name
from safervlm.reports.evaluation import evaluation
from safervlm.reports.page import report
from safervlm.reports.runs import run_names

EXAMPLE = "\x1b]0;owned\a</script><script>alert(1)</script>{{ 7*7 }}\u202e\ud800 \x00 &amp; <b>"


class Page(html.parser.HTMLParser):
    """The tags of a page, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_bytes().decode("utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        self.text += text


def check_page(path: Path) -> Page:
    """Checks that a page is valid, runs nothing, loads nothing, and has no invisible character."""
    page = Page(path)
    assert page.open == []
    assert not [
        tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "base", "form", "link", "b")
    ]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:image/png;base64,")) or not urlparse(address).scheme, address
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.text)
    return page


def answers(name="mask", text="No, it is not safe.", image_path=None):
    """Unsafe and safe images, names and perception, with a given name in every field from data."""
    made = []
    for index in range(3):
        category = name if index else "Hate"
        for capability, right, label in (
            ("alignment", "Unsafe", "Safe"),
            ("alignment_text_only", "Unsafe", "Unsafe"),
            ("perception", "A", "N/A"),
        ):
            concept = f"{name}{index}"
            image = concept if capability == "alignment_text_only" else f"{name}{index}.png"
            asked = question("Made", image, capability, index, right, category, concept)
            path = None if capability == "alignment_text_only" else image_path
            made.append((replace(asked, prompt=f"What about {name}?", image_path=path), text, label))
    made.append((question("MadeSafe", "s", "alignment", 0, "Safe", name, "cat"), text, "Safe"))
    return made


def write_any(folder: Path, given) -> Path:
    """Writes a run folder; half a surrogate pair is written as a JSON escape."""
    answers = [
        (replace(asked, id=asked.id.encode("ascii", "backslashreplace").decode()), *rest) for asked, *rest in given
    ]
    plain = [
        (replace(asked, dataset="", image="", category="", concept="", prompt=""), "", label)
        for asked, _, label in answers
    ]
    write(folder, plain)
    records = []
    for line, (asked, text, _) in zip((folder / "responses.jsonl").read_text().splitlines(), answers, strict=True):
        names = {key: getattr(asked, key) for key in ("dataset", "image", "category", "concept", "prompt")}
        records.append(json.dumps(json.loads(line) | names | {"response": text}) + "\n")
    (folder / "responses.jsonl").write_text("".join(records))
    return folder


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    for cell in (cell for row in rows for cell in row):
        # A formula is stored as a text; a negative number stays a number.
        assert not re.match(r"[=+@\t\r]|-(?!\d+(\.\d+)?(e-?\d+)?$).", cell), cell
    return rows


def read_workbook(path: Path) -> set[str]:
    texts = set()
    for sheet in openpyxl.load_workbook(path):
        for row in sheet.iter_rows():
            assert not [cell for cell in row if cell.data_type in ("f", "e")]
            texts |= {cell.value for cell in row if isinstance(cell.value, str)}
    return {re.sub(r"_x([0-9A-Fa-f]{4})_", lambda code: chr(int(code[1], 16)), text) for text in texts}


def read_latex(path: Path) -> set[str]:
    """Parses the cells of the tables of a file."""
    cells = set()
    text = path.read_text(encoding="utf-8")
    assert text.count("\\begin{") == text.count("\\end{")
    for table in re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.DOTALL):
        for line in table.splitlines():
            assert line.endswith(r" \\")
            columns = [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]
            cells |= {unescaped_latex(cell) for cell in columns if not cell.startswith(r"\shortstack")}
    return cells


# --- names from data --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_data(tmp_path_factory):
    """A report, a table of scores and an evaluation with every hostile name as a category or dataset."""
    folder = tmp_path_factory.mktemp("from data")
    given = [each for name, _ in HOSTILE.values() for each in answers(name)]
    run = write_any(folder / "run", list({asked.id: (asked, *rest) for asked, *rest in given}.values()))
    runs = []
    for name, label in (("original", "Unsafe"), ("ppo", "Safe")):
        sets = [
            (question(dataset, f"{i}", "generalisation", 0, "Unsafe", "x"), "No", label)
            for dataset, _ in HOSTILE.values()
            for i in range(2)
        ]
        sets = list({asked.id: (asked, *rest) for asked, *rest in sets}.values())  # some names look the same
        runs.append(write_any(folder / name / "evaluation", sets))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        out = {}
        for name, command in {
            "report": lambda: report([run], folder / "report.html"),
            "scores": lambda: ScoreTable().on_predict_end(
                types.SimpleNamespace(is_global_zero=True, default_root_dir=str(run)), None
            ),
            "evaluation": lambda: evaluation(runs, folder / "evaluation.html"),
        }.items():
            printed = io.StringIO()
            with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
                warnings.simplefilter("error")
                command()
            out[name] = printed.getvalue()
    return folder, out


@pytest.fixture(scope="module")
def read_back(from_data):
    """Reads the outputs with their parsers."""
    folder, printed = from_data
    for text in printed.values():
        assert not set(text) & {"\x1b", "\x9b", "\r", "\x00", "\x0b", "\u202e", "\u2028"}
    csvs = {
        name: {cell for row in read_csv(folder / name) for cell in row}
        for name in (
            *("report.csv", "report_overall.csv", "run/scores.csv", "evaluation.csv"),
            *("evaluation_table.csv", "evaluation_differences.csv"),
        )
    }
    books = {name: read_workbook(folder / name) for name in ("report.xlsx", "run/scores.xlsx", "evaluation.xlsx")}
    return (
        printed,
        csvs,
        books,
        {name: read_latex(folder / name) for name in ("report.tex", "evaluation.tex")},
        {name: check_page(folder / name).text for name in ("report.html", "evaluation.html")},
    )


@pytest.mark.parametrize(("name", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_names_from_data_are_escaped_in_every_output(name, shown, read_back):
    printed, csvs, books, tex, pages = read_back
    shown = shown if normal_name(name) == name else normal_name(name)  # invisible characters make no other name
    assert f"  {shown} " in printed["scores"]
    guarded = f"'{shown}" if name[0] in "=+-@\uff1d" else shown
    for file in (
        "report.csv",
        "run/scores.csv",
        "evaluation.csv",
        "evaluation_table.csv",
        "evaluation_differences.csv",
    ):
        assert guarded in csvs[file], file
    for texts in (*books.values(), *tex.values()):
        assert shown in texts
    for text in pages.values():
        assert shown in text


# --- names of runs ----------------------------------------------------------------------------------------------------

# name of a folder -> its visible form
RUNS = {
    "brackets": ("ppo[seed 0]", "ppo[seed 0]"),
    "markup": ("[bold]x[link=y]", "[bold]x[link=y]"),
    "spaces": ("  my run  ", "  my run  "),
    "dollars": ("$x$ and $y$", "$x$ and $y$"),
    "ampersand": ("a&b &amp; c", "a&b &amp; c"),
    "script": ("<script>alert(1)<", "<script>alert(1)<"),
    "emoji": ("😀👩\u200d🔬", "😀👩\u200d🔬"),
    "newline": ("a\nb", r"a\nb"),
    "carriage return": ("a\rb", r"a\rb"),
    "escape": ("\x1b[31mred", r"\x1b[31mred"),
    "right to left": ("\u202egnp", r"\u202egnp"),
    "Hebrew": ("שלום עולם", "שלום עולם"),
    "Chinese": ("模型", "模型"),
    "formula": ("=1+1", "=1+1"),
    "minus": ("-x", "-x"),
    "underscore": ("_hidden", "_hidden"),
    "LaTeX": ("100%_{a}^b#\\x", "100%_{a}^b#\\x"),
    "a colour of the page": ("#1c2330 url(#a)", "#1c2330 url(#a)"),
    "an attribute": ('"\'` id="x" onload=x', '"\'` id="x" onload=x'),
    "long": ("x" * 200, "x" * 200),
    "bytes that are not UTF-8": (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
    "Jinja": ("{{ 7*7 }}{% x %}", "{{ 7*7 }}{% x %}"),
    "CSV": ('a,"b";c', 'a,"b";c'),
    "comment": ("--><!--", "--><!--"),
}


@pytest.fixture(scope="module")
def named_runs(tmp_path_factory):
    """A report and an evaluation of runs with every hostile name."""
    folder = tmp_path_factory.mktemp("named")
    runs = [write(folder / name, answers()) for name in ("base", *(name for name, _ in RUNS.values()))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        patch.setenv("COLUMNS", "2000")
        warnings.simplefilter("error")
        report(runs, folder / "report.html")
        evaluation(runs, folder / "evaluation.html")
    pages = {name: check_page(folder / name).text for name in ("report.html", "evaluation.html")}
    csvs = ("report.csv", "report_overall.csv", "evaluation.csv", "evaluation_table.csv")
    first = [{row[0] for row in read_csv(folder / name)} for name in csvs]
    books = [read_workbook(folder / name) for name in ("report.xlsx", "evaluation.xlsx")]
    captions = re.findall(r"^\\caption\{(.*)\}$", (folder / "report.tex").read_text(encoding="utf-8"), re.MULTILINE)
    tex = [*map(unescaped_latex, captions)], read_latex(folder / "evaluation.tex")
    page = (folder / "report.html").read_text(encoding="utf-8")
    drawn = re.findall(r'class="(?:key|label)">(?:<svg.*?</svg>)?<bdi>(.*?)</bdi>', page, re.DOTALL)
    return printed.getvalue(), pages, first, books, tex, [html.unescape(text).strip() for text in drawn]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shown"), RUNS.values(), ids=RUNS)
def test_run_names_are_escaped_in_every_output(name, shown, named_runs):
    printed, pages, csvs, books, (captions, rows), drawn = named_runs
    assert shown in printed
    assert name == shown or name not in printed.replace("\n", "")
    assert pages["report.html"].count(shown) >= 5  # the title, the tables, the examples
    assert pages["evaluation.html"].count(shown) >= 3
    for first in csvs:
        assert ("'" + shown if shown[0] in "=-" else shown) in first
    for texts in books:
        assert shown in texts
    assert [caption for caption in captions if caption.startswith(f"{shown}: ")]
    assert shown.strip() in rows
    # Each plot names the run, in its legend or beside its line.
    assert drawn.count(shown.strip()) >= 2


def test_runs_with_equal_folder_names_get_distinct_names(tmp_path):
    folders = [tmp_path / "a" / "base", tmp_path / "b" / "base", tmp_path / "a\n" / "base", tmp_path / "a\\n" / "base"]
    for folder in folders:
        write(folder, answers())
    assert run_names(folders[:2]) == ["a/base", "b/base"]
    shown = run_names(folders)
    assert len(set(shown)) == 4
    assert not any("\n" in name or str(tmp_path) in name for name in shown)


# --- the page ---------------------------------------------------------------------------------------------------------

TEXTS = {
    "everything": EXAMPLE,
    "megabytes": "a\x1b<" * 700_000,
    "a surrogate": "\ud83d",
    "nothing but white space": " \n\t ",
    "nothing but invisible characters": "\u200b\u2060",
    "a template": "{% include '/etc/passwd' %}{{ config }}",
    "a comment": "<!-- --!> ]]> --><plaintext>",
    "a style": "</style><style>*{display:none}</style>",
    "an attribute": "\" onmouseover=alert(1) x='",
    "an address": "javascript:alert(1) https://example.com/x.png",
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A page whose examples show every text."""
    folder = tmp_path_factory.mktemp("answered")
    given = [
        (question("Made", f"{name}.png", "alignment", 0, "Unsafe", name, "x"), text, "Safe")
        for name, text in TEXTS.items()
    ]
    page = report([write_any(folder / "run", given)], folder / "page.html")
    assert page.stat().st_size < 1_000_000
    return check_page(page).text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_response_text_is_escaped_and_truncated_on_a_page(text, answered):
    if len(text) > 4_000:
        assert "a\\x1b<a\\x1b<a [cut: 2,100,000 characters]" in answered
        assert answered.count("a\\x1b<") == 1_333
    elif text.isspace():
        assert "(an empty response)" in answered
    else:
        printable = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
        assert printable in answered


IMAGES = ["a b.png", "ü😀.png", "a#b?c%20.png", "a:b.png", "'\"<&>.png", "javascript:x.png", "deep/er/x.png"]


def test_images_are_linked_relative_to_the_page(tmp_path, monkeypatch):
    for name in IMAGES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), "red").save(tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    for given in (str(tmp_path / "data"), "data"):
        made = []
        for index, name in enumerate(IMAGES):
            asked = question("Made", name, "alignment", 0, "Unsafe", f"c{index}", "x")
            made.append((replace(asked, image_path=f"{given}/{name}"), "No", "Safe"))
        run = write(tmp_path / "run", made)
        for page in (report([run], tmp_path / "deep/er/page.html"), report([run], Path("r.html"))):
            links = [a["href"] for tag, a in check_page(page).tags if tag == "a" and not a["href"].startswith("#")]
            found = [Path(unquote(urlparse(urljoin(page.absolute().as_uri(), link)).path)) for link in links]
            assert {path.resolve() for path in found} == {(tmp_path / "data" / name).resolve() for name in IMAGES}
            assert all(path.is_file() for path in found)
            assert str(tmp_path) not in page.read_text()


def test_pages_contain_no_absolute_path(tmp_path):
    """Neither of a run folder, nor of a missing image, nor in the settings, nor of a skipped run."""
    home = tmp_path / "home" / "jane"
    runs = [write(home / "runs" / name, answers(image_path=str(home / "no.png"))) for name in ("a", "b")]
    for run in runs:
        settings = {"model": {"vlm": {"model": str(home / "models" / run.name)}}, "files": [str(home / "x y.json")]}
        command = f"safervlm predict --run {run} --data.folder={home}/data --x https://example.com/home/jane"
        stage = {"settings": settings, "provenance": {"command": command}, "finished": True}
        (run / "manifest.json").write_text(json.dumps({"stages": {"measure": stage}}))
    page = report(runs, home / "page.html")
    assert "no.png" in page.read_text()
    assert "…/data" in page.read_text()
    out = home / "evaluation.html"
    with pytest.raises(SystemExit):
        evaluation([*runs, home / "nothing"], out)
    for text in (page.read_text(), out.read_text()):
        assert str(tmp_path) not in text
        assert "home/jane" not in text.replace("https://example.com/home/jane", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane/runs/base", "…/base"),
        ("/home/jane doe/x y.json", "…/x y.json"),
        ("--run /home/jane/x --data=/srv/jane/y", "--run …/x --data=…/y"),
        ('["/home/jane/a b.json", "c"]', '["…/a b.json", "c"]'),
        ("file:///home/jane/a.png", "…/a.png"),
        ("where:/home/jane/x", "where:…/x"),
        (r"C:\Users\jane\x.json", "…/x.json"),
        (r"--m C:\Users\jane\x", "--m …/x"),
        ("http://127.0.0.1:80/v1", "http://127.0.0.1:80/v1"),
        ("s3://bucket/jane/x", "s3://bucket/jane/x"),
        ('[["<think>", "</think>"], ["[THINK]", "[/THINK]"]]', '[["<think>", "</think>"], ["[THINK]", "[/THINK]"]]'),
        ("[/home/jane/x]", "[…/x]"),
        ("images/0.png ../x and/or N/A 1/2", "images/0.png ../x and/or N/A 1/2"),
    ],
)
def test_a_path_is_reduced_to_its_last_part(text, expected):
    assert without_folders(text) == expected


def test_the_home_folder_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/jane doe")
    assert without_folders("--run /home/jane doe/x") == "--run ~/x"
    assert without_folders("/home/jane doe") == "~"
