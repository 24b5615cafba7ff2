"""A report on the terminal: the headline first, fewer than 40 lines; the rest is on the page."""

import contextlib
import html
import json
import re
import shutil

import numpy as np
import pytest
from evaluations import question, safety, write
from labelled import change, label, write_labelled
from rich.cells import cell_len

from safervlm.io.escape import without_folders
from safervlm.io.tables import TextTable, height
from safervlm.judging.rating import Rating
from safervlm.protocol import REVERSED, REVERSED_NUMBER, REVERSED_QUESTION
from safervlm.records import Failure, Question, read_jsonl, write_jsonl
from safervlm.reports import evaluation as of_evaluations
from safervlm.reports import page as of_measurements
from safervlm.reports.kinds import report_runs
from safervlm.reports.terminal import say_report
from safervlm.results.mme import ALL_TASKS
from safervlm.run import write_stage

SMALL = {"concepts": 10, "images": 1}
LIMIT = 40
LONG = "a-run-with-a-very-long-name-that-states-every-hyperparameter-lr-1e-5-batch-32-kl-0.05"


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def measured(folder, *names, **more):
    for seed, name in enumerate(names):
        (folder / name).mkdir()
        write_labelled(folder / name, 0.4 if seed == 0 else 0.8, seed=seed, **SMALL | more)
    return [folder / name for name in names]


def one(folder):
    return measured(folder, "original"), {}


def four(folder):
    return measured(folder, "original", "sft", "dpo", "ppo"), {}


def many(folder):
    return measured(folder, "original", *(f"{LONG}-{number}" for number in range(11))), {}


def groups(folder):
    original, *_ = measured(folder, "original", *(f"{name}-{seed}" for name in ("ppo", "dpo") for seed in range(3)))
    return [original], {"group": [f"{name}={folder}/{name}-*" for name in ("ppo", "dpo")]}


def many_groups(folder):
    names = [f"group{number}" for number in range(6)]
    first, *others = measured(folder, "original", *(f"{name}-{seed}" for name in names for seed in range(2)))
    for run in (*others[::4], *others[1::4]):  # every other group was asked other questions
        change(run, lambda response, verdict: [(response | {"prompt": f"{response['prompt']}!"}, verdict)])
    return [first], {"group": [f"{name}={folder}/{name}-*" for name in names]}


def labelled(folder):
    runs = [folder / name for name in ("original", "ppo")]
    for run in runs:
        label(run, write_labelled(run, 0.6, **SMALL))
    return runs, {}


def labels_that_cannot_be_used(folder):
    runs, _ = labelled(folder)
    for run in runs:
        verdicts = list(read_jsonl(run / "verdicts.jsonl"))
        write_jsonl(run / "verdicts.jsonl", [verdicts[0] | {"judge": "another"}, *verdicts[1:]])
    return runs, {}


def curves_repeats_and_positions(folder):
    """Three runs with log-odds, the reversed question, three responses to each question, and rotated options."""

    def more(response, verdict):
        for number in (1, 2):
            name = response["id"] if number == 1 else f"{response['id']}#{number}"
            yield response | {"id": name}, verdict | {"id": name}
        stem = response["id"].rpartition("/")[0]
        if response["capability"] == "perception":
            variant = {"id": f"{stem}/1", "prompt_number": 1, "variant": "rotated options"}
            yield response | variant, verdict | {"id": f"{stem}/1"}
        if response["capability"] == "alignment" and response["prompt_number"] == 0:
            name = f"{stem}/{REVERSED_NUMBER}".replace("/alignment/", f"/{REVERSED}/")
            about = {"prompt": REVERSED_QUESTION, "prompt_number": REVERSED_NUMBER, "capability": REVERSED}
            yield response | about | {"id": name, "variant": "reversed"}, verdict | {"id": name}

    runs = measured(folder, "original", "sft", "ppo")
    for run in runs:
        change(run, more)
        rng = np.random.default_rng(0)
        records = [
            {"id": each["id"], "log_odds": rng.normal(1.0 if each["answer"] == "Unsafe" else -1.0), "mass": 0.7}
            for each in read_jsonl(run / "responses.jsonl")
            if each["capability"] == "alignment"
        ]
        write_jsonl(run / "odds.jsonl", records)
    (runs[-1] / "odds.jsonl").write_text('{"id": "a"}\n')
    return runs, {}


def everything_at_once(folder):
    """Other questions, other judges, several judges, failed questions, unfinished thinking, verdicts of version 0.1."""

    def spoilt(response, verdict):
        if response["capability"] == "alignment" and len(response["id"]) % 2:
            response = response | {"response": "", "finish_reason": "thinking unfinished"}
            verdict = verdict | {"label": "N/A", "probabilities": {"N/A": 1.0}}
        number = sum(map(ord, response["id"]))
        yield response | {"prompt": f"{response['prompt']}!"}, verdict | {"judge": f"judge {number % 2}", "answer": ""}

    runs = measured(folder, "original", *(f"{LONG}-{number}" for number in range(4)))
    for run in runs[1:]:
        change(run, spoilt)
        first = Question.from_dict(next(iter(read_jsonl(run / "responses.jsonl"))))
        lost = Question.from_dict(first.to_dict() | {"id": "lost"})
        write_jsonl(run / "responses-failed.jsonl", [Failure(lost, "damaged").to_dict()])
        write(run / "evaluation", evaluated(0.5))
    return runs, {}


def evaluated(right, seed=0):
    """Responses to every kind of dataset."""
    rng = np.random.default_rng(seed)
    answers = safety(rng, right)
    for place, task in enumerate(ALL_TASKS):
        for number, expected in enumerate(("Yes", "No")):
            asked = question("MME", f"{place}.png", "yes_no", number, expected, task)
            answers.append((asked, expected if rng.random() < right else "No", None))
    answers += [
        (question("U", f"{n}", "context_text_only", k, label, "Hate", f"Unsafe{n}"), "Yes", "Safe")
        for n in range(12)
        for k, label in enumerate(("Safe", "Unsafe"))
    ]
    answers += [(question("NSFW", f"{n}.png", "generalisation", 0, "Unsafe", "NSFW"), "No", "Unsafe") for n in range(9)]
    return [*answers, *((each, "An answer.", None) for each in rated())]


def rated():
    return [question("LLaVABench", f"{n // 2}.jpg", "rated", n % 2, "A reference.", "conv") for n in range(6)]


def ratings():
    return [Rating(each.id, False, 8, 5, "", "judge", "", "", each.id) for each in rated()[:4]]


def evaluations(folder, names, **more):
    for seed, name in enumerate(names):
        write(folder / name / "evaluation", evaluated(0.4 + 0.02 * seed, seed), ratings=ratings(), **more)
    return [folder / name for name in names]


def one_evaluation(folder):
    return evaluations(folder, ["original"]), {}


def three_evaluations(folder):
    return evaluations(folder, ["original", "sft", "ppo"], failed=[evaluated(1)[0][0]]), {}


def many_evaluations(folder):
    """Of other models, unfinished, with failed questions; one can't be read."""
    runs = evaluations(folder, ["original", *(f"{LONG}-{number}" for number in range(3))], failed=[evaluated(1)[0][0]])
    for run in runs[1:]:
        settings = {"model": {"vlm": {"model": f"models/{run.name}", "weights": run.name}}}
        write_stage(run / "evaluation", "measure", settings=settings, finished=False)
    (runs[-1] / "evaluation" / "verdicts.jsonl").unlink()
    return runs, {}


def measurements_with_evaluations(folder):
    runs = measured(folder, "original", "ppo")
    evaluations(folder, ["original", "ppo"])
    (runs[1] / "evaluation" / "verdicts.jsonl").unlink()
    return runs, {}


def measurements_whose_evaluation_cannot_be_read(folder):
    runs = measured(folder, "original")
    shutil.rmtree(evaluations(folder, ["other"])[0])
    write(runs[0] / "evaluation", evaluated(0.5))
    (runs[0] / "evaluation" / "verdicts.jsonl").write_text("{\n")
    return runs, {}


KINDS = [
    *(one, four, many, groups, many_groups, labelled, labels_that_cannot_be_used, curves_repeats_and_positions),
    *(everything_at_once, one_evaluation, three_evaluations, many_evaluations, measurements_with_evaluations),
    measurements_whose_evaluation_cannot_be_read,
]


def lines_of(printed):
    """The number of lines that a terminal of 100 columns shows."""
    return sum(max(1, -(-cell_len(line) // 100)) for line in printed.splitlines())


def plain(text):
    """A text without white space: a path may be broken anywhere."""
    return "".join(text.split())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_terminal_report_fits_and_moves_hidden_remarks_to_the_page(kind, tmp_path, capsys, monkeypatch):
    said = []
    for module in (of_measurements, of_evaluations):
        monkeypatch.setattr(module, "say_report", lambda *given: (said.append(given), say_report(*given)))
    runs, more = kind(tmp_path)
    out = tmp_path / "r.html"
    with contextlib.suppress(SystemExit):  # a run can't be read
        report_runs(runs, out, **more)
    printed = capsys.readouterr().out
    assert lines_of(printed) < LIMIT, printed
    page = plain(html.unescape(out.read_text()))
    first = html.unescape(re.search(r'<p class="headline">(.*?)</p>', out.read_text(), re.DOTALL)[1])
    assert plain(printed).startswith(plain(first)[:80])

    ((headline, _, warnings, results, remarks, closing),) = said
    assert printed.splitlines()[-1] == closing
    assert str(out) in closing
    named = re.findall(r"[\w.]+", closing.partition("(with")[2].replace(" and ", ", ").removesuffix(" beside it)"))
    assert {f"{out.stem}{ending}" for ending in named} == {file.name for file in tmp_path.glob("r*.*")} - {out.name}
    for line in (*headline, *warnings, *results, *remarks):
        assert plain(without_folders(line)) in page
    for line in warnings:
        assert plain(f"warning: {line}")[:80] in plain(printed)
    hidden = [line for line in (*results, *remarks) if plain(line)[:200] not in plain(printed)]
    told = re.findall(r"^(\d+) more remarks? (?:is|are) on the page$", printed, re.MULTILINE)
    assert told == ([str(len(hidden))] if hidden else [])
    assert len(printed.split(" ─")) > 1  # there is a table


def table(rows):
    made = TextTable()
    made.add_column("")
    for number in range(rows):
        made.add_row(f"row {number} of {rows}")
    return [made]


def test_terminal_report_shows_the_most_detailed_table_that_fits(capsys):
    def rows(warnings=(), remarks=(), results=()):
        say_report(
            ["A headline."],
            [table(50), table(33), table(20), table(5)],
            warnings,
            results,
            remarks,
            "report: page.html",
        )
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) < LIMIT
        return printed.count("row "), printed

    assert height(table(33)[0]) == 37
    assert rows()[0] == 33
    assert rows(["odd"])[0] == 20  # there is no room for both
    number, printed = rows([f"odd {number}" for number in range(50)], ["a remark"])
    assert number == 5
    shown = printed.count("warning: odd ")
    assert shown == printed.count("warning: ")
    assert f"{51 - shown} more remarks are on the page" in printed
    assert "a remark" not in printed
    number, printed = rows((), [f"remark {number}" for number in range(9)])
    assert number == 20
    assert "remark 8" in printed
    assert "more" not in printed
    number, printed = rows((), ["word " * 400, "another"])
    assert number == 20
    assert "…" in printed  # cut after three lines
    assert "another" in printed
    number, printed = rows(results=[f"result {number}" for number in range(9)])
    assert number == 20
    assert printed.index("result 5") < printed.index("row 0")
    assert "3 more remarks are on the page" in printed


def test_a_sentence_about_many_runs_names_them_last(tmp_path):
    runs = measured(tmp_path, "original", *(f"run-{number}" for number in range(5)))
    for run in runs[1:]:
        change(run, lambda response, verdict: [(response | {"prompt": "Is it?"}, verdict | {"judge": "beef"})])
    page = html.unescape(report_runs(runs, tmp_path / "r.html").read_text())
    names = ", ".join(f"run-{number}" for number in range(5))
    said = "were asked other questions than original: where fewer than 90 % are in common, no difference is shown"
    assert f"5 runs {said} ({names})." in page
    page = html.unescape(report_runs(runs[:4], tmp_path / "r.html").read_text())
    assert "run-0, run-1 and run-2 were asked other questions than original: where" in page
    assert json.dumps(names) not in page
