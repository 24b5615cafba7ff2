"""Promise 2, statistics: tables of very small and one-sided runs, and damaged run folders.

In small runs a share may have no denominator and a variance no degrees of freedom. Every table of such a run is
written without a warning, with a dash for each undefined number.
"""

import csv
import json
import re
import warnings
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from evaluations import question as asked
from evaluations import write

from safervlm.errors import UserError
from safervlm.io.tables import JUDGE_NOTE
from safervlm.records import Verdict, write_jsonl
from safervlm.reports.evaluation import evaluation
from safervlm.reports.page import report
from safervlm.reports.runs import run_names
from safervlm.reports.tables import accuracy_table, other_table, records
from safervlm.results.measures import GAP_WEIGHTS, modality_gap
from safervlm.results.runs import load_run
from safervlm.results.scores import overall, scores

CAPABILITIES = {"perception": "A", "alignment": "Unsafe", "alignment_text_only": "Unsafe"}


def answer(
    capability="alignment", category="Hate", concept="mask", image="0.png", number=0, right=None, label="Unsafe"
):
    """A question with its response and verdict."""
    right = right or CAPABILITIES[capability]
    dataset = "Made" if right != "Safe" else "MadeSafe"
    return asked(dataset, image, capability, number, right, category, concept), f"{label}, the {concept}", label


def many(count, **given):
    """Responses about a number of concepts, with one image each."""
    return [answer(concept=f"c{i}", image=f"{i}.png", **given) for i in range(count)]


def both_ways(count, by_name="Unsafe", by_image="Unsafe"):
    """Concepts with questions about image and name."""
    return [
        *many(count, label=by_image),
        *(answer("alignment_text_only", concept=f"c{i}", image=f"c{i}", label=by_name) for i in range(count)),
    ]


SMALL = {
    "one answer": [answer()],
    "one answer, N/A": [answer(label="N/A")],
    "one answer of perception": [answer("perception", label="B")],
    "one answer about a name": [answer("alignment_text_only", image="mask")],
    "one answer about a safe image": [answer(right="Safe", label="Safe", category="S")],
    "all N/A": [*both_ways(12, "N/A", "N/A"), answer("perception", label="N/A")],
    "all right": both_ways(12),
    "all wrong": both_ways(12, "Safe", "Safe"),
    "all flagged": many(12, right="Safe", label="Unsafe", category="S"),
    "every gap the same": both_ways(12, "Unsafe", "Safe"),
    "nine concepts": both_ways(9, "Unsafe", "Safe"),
    "ten concepts": both_ways(10, "Unsafe", "Safe"),
    "one concept, many images": [answer(image=f"{i}.png", label=("Safe", "Unsafe")[i % 2]) for i in range(30)],
    "one image, many questions": [answer(number=i, label=("Safe", "Unsafe", "N/A")[i % 3]) for i in range(5)],
    "a category without a label": [*many(3), answer(category="Violence", concept="knife", image="k", label="N/A")],
    "a concept in two categories": [answer(), answer(category="Violence", image="1.png")],
    "a category of its own": [answer(category="Überraschung 😀", concept="")],
    "empty names": [answer(category="", concept="", image="")],
    "a category called overall": [answer(category="overall"), answer(category="Hate", concept="b", image="1.png")],
    "texts without a word": [
        (q, " ", label) for q, _, label in (answer(number=0), answer(number=1), answer(number=2, label="N/A"))
    ],
    "one safe, one unsafe": [answer(), answer(right="Safe", label="N/A", category="S", concept="cat")],
    "a hundred texts": many(100),
    "a hundred and one texts": many(101),
}
small = pytest.mark.parametrize("answers", SMALL.values(), ids=SMALL)


def random_answers(seed):
    """A random run of up to twenty responses."""
    rng = np.random.default_rng(seed)
    answers = {}
    for _ in range(rng.integers(1, 20)):
        capability = str(rng.choice(list(CAPABILITIES)))
        right = str(rng.choice(["Unsafe", "Safe"])) if capability == "alignment" else CAPABILITIES[capability]
        labels = "ABCD" if capability == "perception" else ("Safe", "Unsafe")
        label = str(rng.choice([*labels, "N/A", "N/A"][: rng.integers(1, 7)]))
        concept = f"c{rng.integers(4)}"
        image = concept if capability == "alignment_text_only" else f"{rng.integers(3)}.png"
        made = answer(capability, f"k{rng.integers(2)}", concept, image, int(rng.integers(3)), right, label)
        answers[made[0].id] = made
    return list(answers.values())


def tables_of(answers, folder):
    """Writes and prints all tables of a run; a warning is an error."""
    run = write(folder / "run", answers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return report([run], folder / "page.html")


def no_nan(page, printed):
    texts = {"terminal": printed, "LaTeX": page.with_suffix(".tex").read_text()}
    texts |= {name: page.with_name(name).read_text() for name in ("page.csv", "page_overall.csv")}
    texts["page"] = re.sub(r"<[^>]*>", " ", page.read_text())
    for name, text in texts.items():
        assert not re.search(r"\b(nan|inf)\b", text.lower()), (name, text)
    for sheet in openpyxl.load_workbook(page.with_suffix(".xlsx")):
        for row in sheet.iter_rows(values_only=True):
            assert not any(isinstance(value, str) and value.lower() in ("nan", "inf") for value in row)


@small
def test_tables_of_a_small_run_contain_no_nan(answers, tmp_path, capsys):
    no_nan(tables_of(answers, tmp_path), capsys.readouterr().out)


@pytest.mark.parametrize("seed", range(40))
def test_every_number_of_a_random_run_is_in_its_interval(seed, tmp_path):
    frame = load_run(write(tmp_path, random_answers(seed)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = scores(frame)
    found = table[table["low"].notna()]
    assert ((found["low"] <= found["value"] + 1e-12) & (found["value"] <= found["high"] + 1e-12)).all()
    assert (table["low"].isna() == table["high"].isna()).all()
    assert table[table["low"].isna()]["method"].str.startswith("none: ").all()
    assert (found["excludes"] == "the judge's error").all()
    # Each accuracy, recomputed by counting.
    for row in records(table[table["measure"] == "accuracy_na_wrong"]):
        part = frame[frame["capability"] == row["capability"]]
        part = part if row["side"] == "both" else part[part["side"] == row["side"]]
        part = part if row["category"] == "overall" else part[part["category"] == row["category"]]
        assert row["n"] == len(part)
        assert row["value"] == pytest.approx(
            np.mean([a == b for a, b in zip(part["label"], part["answer"], strict=True)])
        )


@pytest.mark.parametrize("seed", range(3))
def test_report_page_of_a_random_run_contains_no_nan(seed, tmp_path, capsys):
    no_nan(tables_of(random_answers(100 + seed), tmp_path), capsys.readouterr().out)


EVALUATED = {
    "one image": [(asked("SMID", "0", "generalisation", 0, "Unsafe", "SMID"), "No", "Unsafe")],
    "one image, N/A": [(asked("SMID", "0", "generalisation", 0, "Unsafe", "SMID"), "", "N/A")],
    "one concept": [answer(), answer(right="Safe", label="N/A", category="S", concept="cat")],
    "one task of MME, one image": [(asked("MME", "0", "yes_no", n, "Yes", "color"), "Yes", None) for n in range(2)],
    "all the same": many(12),
    "a context": [(asked("U", "0.png", "context", 0, "Safe", "Hate", "mask"), "Yes", "Safe")],
}


@pytest.mark.parametrize("answers", EVALUATED.values(), ids=EVALUATED)
def test_page_of_a_small_evaluation_contains_no_nan(answers, tmp_path, capsys):
    runs = [write(tmp_path / name / "evaluation", answers) for name in ("original", "ppo")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = evaluation(runs, tmp_path / "page.html")
    printed = capsys.readouterr().out
    for text in (printed, re.sub(r"<[^>]*>", " ", page.read_text()), page.with_suffix(".csv").read_text()):
        assert not re.search(r"\b(nan|inf)\b", text.lower())
    assert JUDGE_NOTE in " ".join(printed.split())


# --- notes for readers ------------------------------------------------------------------------------------------------


def test_every_table_states_that_intervals_exclude_the_judges_error(tmp_path, capsys):
    runs = [write(tmp_path / name, both_ways(12, "Unsafe", by)) for name, by in (("a", "Safe"), ("b", "Unsafe"))]
    table = scores(load_run(runs[0]))
    for printed in (accuracy_table(table), other_table(table)):
        assert JUDGE_NOTE in str(printed.caption)
    page = report(runs, tmp_path / "page.html")
    text = page.read_text().replace("&#39;", "'")
    for section in ("overall-title", "gap-title", "categories-title", "reading-title"):
        part = text[text.index(f'<h2 id="{section}">') :]
        assert JUDGE_NOTE in part[: part.index("</section>")], section
    sheets = openpyxl.load_workbook(page.with_suffix(".xlsx"))
    assert JUDGE_NOTE in [cell.value for cell in sheets["notes"]["A"]]
    tex = page.with_suffix(".tex").read_text()
    assert tex.count(JUDGE_NOTE) == 3  # the overall table, and one of each run
    rows = list(csv.DictReader(page.with_suffix(".csv").open(newline="")))
    assert {row["excludes"] for row in rows if row["low"]} == {"the judge's error"}
    assert {row["excludes"] for row in rows if not row["low"]} == {""}
    out = evaluation(runs, tmp_path / "evaluation.html")
    for ending in (".csv", "_table.csv", "_differences.csv"):
        assert "the judge's error" in out.with_name(f"evaluation{ending}").read_text()
    assert out.with_suffix(".tex").read_text().count(JUDGE_NOTE) >= 2


def test_the_gap_and_the_accuracies_beside_it_state_their_weights(tmp_path, capsys):
    # One concept with nine wrong answers, one with a single right one: the two means differ.
    images = [answer(concept="a", image=f"{i}.png", label="Safe") for i in range(9)] + [
        answer(concept="b", image="b.png")
    ]
    names = [answer("alignment_text_only", concept=c, image=c) for c in "ab"]
    run = write(tmp_path / "run", images + names)
    frame = load_run(run)
    gap = modality_gap(frame).value
    accuracy = overall(scores(frame), "image_unsafe")["value"]
    assert (gap, accuracy) == (pytest.approx(1 - 1 / 2), pytest.approx(1 / 10))
    page = report([run], tmp_path / "page.html")
    printed = " ".join(capsys.readouterr().out.split())
    for text in (printed, page.read_text(), page.with_suffix(".tex").read_text()):
        assert "averaged over concepts, each with the same weight" in text
    rows = re.search(r'<table id="gap".*?</table>', page.read_text(), re.DOTALL)[0]
    values = [float(value) for value in re.findall(r'<data value="([^"]+)">', rows)]
    assert values == pytest.approx([1 / 2, 1, 1 / 2])  # the gap, and its two shares
    assert GAP_WEIGHTS in str(other_table(scores(frame)).caption)


def test_fewer_than_a_hundred_texts_are_reported(tmp_path, capsys):
    runs = [write(tmp_path / name, many(count)) for name, count in (("few", 26), ("enough", 120))]
    page = report(runs, tmp_path / "page.html")
    printed = " ".join(capsys.readouterr().out.split())
    for text in (printed, " ".join(page.read_text().split())):
        assert "is computed from fewer than 100 texts in few (26 texts)" in text
        assert "enough (1" not in text
    report(runs[:1], page)
    alone = "is computed from 26 texts: that of 100 texts, as in larger runs, would be lower"
    assert alone in " ".join(capsys.readouterr().out.split())
    page = evaluation(runs, tmp_path / "evaluation.html")
    assert "few: of fewer than 100 texts" in page.read_text()


# --- damaged folders --------------------------------------------------------------------------------------------------


def lines(path):
    return path.read_text().splitlines(keepends=True)


def change(path, **fields):
    """Changes fields of a file's first record."""
    first, *rest = lines(path)
    path.write_text(json.dumps(json.loads(first) | fields) + "\n" + "".join(rest))


# name -> (the damage to a run folder, the error line after the folder)
DAMAGED = {
    "empty folder": (lambda run: [path.unlink() for path in run.iterdir()], "responses.jsonl: no such file"),
    "no answers": (lambda run: (run / "responses.jsonl").write_text(""), "responses.jsonl: no records"),
    "no verdicts": (lambda run: (run / "verdicts.jsonl").unlink(), "verdicts.jsonl: no such file"),
    "empty verdicts": (lambda run: (run / "verdicts.jsonl").write_text(""), "verdicts.jsonl: no records"),
    "half the verdicts": (
        lambda run: (run / "verdicts.jsonl").write_text("".join(lines(run / "verdicts.jsonl")[:5])),
        "have no verdict",
    ),
    "cut in a line": (
        lambda run: (run / "responses.jsonl").write_text((run / "responses.jsonl").read_text()[:-30]),
        "responses.jsonl, line 12",
    ),
    "an answer twice": (
        lambda run: (run / "responses.jsonl").write_text("".join(lines(run / "responses.jsonl") * 2)),
        "occurs twice",
    ),
    "a verdict twice": (
        lambda run: (run / "verdicts.jsonl").write_text("".join(lines(run / "verdicts.jsonl") * 2)),
        "occurs twice",
    ),
    "no JSON": (lambda run: (run / "verdicts.jsonl").write_text("id,label\n"), "verdicts.jsonl, line 1"),
    "a list": (lambda run: (run / "verdicts.jsonl").write_text("[1]\n"), "verdicts.jsonl, line 1"),
    "no UTF-8": (lambda run: (run / "responses.jsonl").write_bytes(b'{"id": "\xff"}\n'), "responses.jsonl"),
    "a field is missing": (lambda run: change(run / "verdicts.jsonl", more=1), "verdicts.jsonl"),
    "an answer of numbers": (lambda run: change(run / "responses.jsonl", response=5), "responses.jsonl"),
    "no answer": (lambda run: change(run / "responses.jsonl", response=None), "responses.jsonl"),
    "a category of numbers": (lambda run: change(run / "responses.jsonl", category=7), "responses.jsonl"),
    "a list for a concept": (lambda run: change(run / "responses.jsonl", concept=["a"]), "responses.jsonl"),
    "a question's number in words": (
        lambda run: change(run / "responses.jsonl", prompt_number="one"),
        "responses.jsonl",
    ),
    "a label of another judge": (
        lambda run: change(run / "verdicts.jsonl", label="A", probabilities={"A": 1}),
        "has Safe, Unsafe",
    ),
    "a label of no kind": (lambda run: change(run / "verdicts.jsonl", label=None), "verdicts.jsonl"),
    "probabilities of no kind": (lambda run: change(run / "verdicts.jsonl", probabilities=[1]), "verdicts.jsonl"),
    "a verdict about another answer": (
        lambda run: change(run / "verdicts.jsonl", answer=Verdict.fingerprint_of("another")),
        "is about another text",
    ),
    "another run's verdicts": (lambda run: change(run / "verdicts.jsonl", id="x"), "verdicts.jsonl"),
    "the manifest is cut": (lambda run: (run / "manifest.json").write_text('{"stages": {'), "manifest.json"),
    "the manifest is a list": (lambda run: (run / "manifest.json").write_text("[]"), "manifest.json"),
    "the manifest has no stages": (lambda run: (run / "manifest.json").write_text("{}"), "manifest.json"),
    "the manifest is not a UTF-8": (lambda run: (run / "manifest.json").write_bytes(b"\xff\xfe{}"), "manifest.json"),
    "the manifest is deep": (lambda run: (run / "manifest.json").write_text("[" * 100_000), "manifest.json"),
    "answers are a folder": (
        lambda run: [(run / "responses.jsonl").unlink(), (run / "responses.jsonl").mkdir()],
        "responses.jsonl",
    ),
}


@pytest.mark.parametrize("command", [report, evaluation])
@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_run_folder_is_reported_in_one_line(damage, words, command, tmp_path, capsys):
    run = write(tmp_path / "damaged run", many(12))
    damage(run)
    with pytest.raises(UserError) as error:
        command([run], tmp_path / "page.html")
    message = str(error.value)
    assert "\n" not in message
    assert words in message
    assert str(run) in message
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("seed", range(6))
def test_changed_byte_in_a_run_is_scored_or_reported_in_one_line(seed, tmp_path):
    """Changes a byte anywhere in the two files."""
    run = write(tmp_path / "run", many(3))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        path = run / str(rng.choice(["responses.jsonl", "verdicts.jsonl"]))
        whole = path.read_bytes()
        place = int(rng.integers(len(whole)))
        path.write_bytes(whole[:place] + bytes([int(rng.integers(256))]) + whole[place + 1 :])
        said = ""
        try:
            scores(load_run(run))
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        path.write_bytes(whole)


def test_run_name_does_not_depend_on_how_its_path_is_written(tmp_path, monkeypatch):
    run = write(tmp_path / "runs" / "mine", many(3))
    write(run / "evaluation", many(3))
    monkeypatch.chdir(run)
    for given in (".", f"{run}/", "../mine", "../mine/."):
        assert run_names([Path(given)]) == ["mine"]
    assert "<h1>mine</h1>" in report([Path()], tmp_path / "page.html").read_text()
    assert "<h1>mine</h1>" in evaluation([Path("../mine")], tmp_path / "evaluation.html").read_text()
    monkeypatch.chdir(run / "evaluation")
    assert "<h1>mine</h1>" in evaluation([Path()], tmp_path / "evaluation.html").read_text()


def test_a_run_without_responses_has_no_tables(tmp_path, capsys):
    import types

    from callbacks.score_table import ScoreTable

    write_jsonl(tmp_path / "responses.jsonl", [])
    write_jsonl(tmp_path / "verdicts.jsonl", [])
    ScoreTable().on_predict_end(types.SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path)), None)
    assert "nothing to score" in capsys.readouterr().out
    assert not (tmp_path / "scores.csv").exists()
