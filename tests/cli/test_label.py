"""safervlm label: terminal and sheets, several raters, and inputs that are rejected."""

import builtins
import json
import re
from pathlib import Path

import openpyxl
import pandas as pd
import pytest
from labelled import write_labelled

from safervlm.cli.label import KEYS
from safervlm.cli.main import main
from safervlm.data.labelled import read_labelled
from safervlm.protocol import LABELS
from safervlm.records import Verdict, read_jsonl, write_jsonl

TRUE = "the true label"
LINE = ["label", "run", "--labels", "40"]


@pytest.fixture
def truth(tmp_path: Path) -> dict[str, str]:
    return write_labelled(Path("run"))


def typing(monkeypatch, capsys, truth, *first):
    """Answers of a person: first the given keys, then (and for TRUE) the true label of the answer on the screen.

    Without a truth, the input ends. Returns the screens.
    """
    keys, shown = list(first), []
    texts = {record["response"]: record["id"] for record in read_jsonl("run/responses.jsonl")}

    def type_in(prompt: str) -> str:
        screen = capsys.readouterr().out
        shown.append(screen + prompt)
        if keys and (key := keys.pop(0)) != TRUE:
            return key
        if not truth:
            raise EOFError
        return KEYS[truth[texts[re.findall(r"^Answer: (.*)$", "".join(shown), re.MULTILINE)[-1]]]]

    monkeypatch.setattr(builtins, "input", type_in)
    return shown


def for_judge(judge: str) -> tuple[str, tuple[str, ...]]:
    return f"run/labels-{judge}.jsonl", LABELS[judge]  # type: ignore[index]


def rejected(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_labelling_in_the_terminal_resumes_and_exports_labels(truth, monkeypatch, capsys):
    typing(monkeypatch, capsys, truth, "s", "x", TRUE, "q")  # later, no key at all, a label, the end
    main(LINE)
    plan = json.loads(Path("run/labels-plan.json").read_text())
    assert sum(each["labels"] for each in plan["strata"]) == len(plan["sampled"]) >= 40
    assert [each["id"] for each in read_jsonl("run/labels.jsonl")] == [plan["sampled"][1]["id"]]
    shown = typing(monkeypatch, capsys, truth)
    main(LINE)
    labels = list(read_jsonl("run/labels.jsonl"))
    assert {each["id"] for each in labels} == {each["id"] for each in plan["sampled"]}
    assert [each["id"] for each in labels] != sorted(each["id"] for each in labels)
    assert all(each["label"] == truth[each["id"]] for each in labels)
    assert len(shown) == len(labels) - 1
    texts = {record["id"]: record["response"] for record in read_jsonl("run/responses.jsonl")}
    assert all(each["answer"] == Verdict.fingerprint_of(texts[each["id"]]) for each in labels)
    for screen in shown:
        assert not re.search("Made|Hate|Violence|Deception|f00d|png|verdict", screen)
    summary = pd.read_csv("run/labels-summary.csv", keep_default_na=False)
    assert set(summary["measure"]) == {"judge_accuracy", "calibration_error", "confusion", "calibration"}
    of_judge = summary[summary["measure"].isin(["judge_accuracy", "calibration_error"])]
    assert (of_judge[["low", "value"]].astype(float).diff(axis=1)["value"] >= 0).all()
    assert {"Hate", "Violence", "Deception", "Safe"} <= set(of_judge["category"])
    everything = of_judge[(of_judge["category"] == "") & (of_judge["measure"] == "judge_accuracy")]
    assert everything["labels"].sum() == len(labels)
    examples = [each for judge in ("alignment", "perception") for each in read_labelled(*for_judge(judge))]
    assert {(each.completions[0], each.question.answer) for each in examples} == {
        (texts[name], label) for name, label in ((each["id"], each["label"]) for each in labels)
    }
    assert "accuracy of the judge" in capsys.readouterr().out


def test_a_response_cannot_write_to_the_terminal(monkeypatch, capsys):
    write_labelled(Path("run"))
    for file, change in (("responses", {"response": "a\x1b[2Jb\u202e"}), ("verdicts", {"answer": ""})):
        write_jsonl(f"run/{file}.jsonl", [record | change for record in read_jsonl(f"run/{file}.jsonl")])
    shown = typing(monkeypatch, capsys, {})
    main(LINE)
    assert r"Answer: a\x1b[2Jb\u202e" in shown[0]
    assert "\x1b" not in shown[0]


def test_summary_does_not_create_a_labelling_sample(truth, monkeypatch, capsys):
    said = rejected(["label", "run", "--with", "summary"], capsys)
    assert "nothing is labelled yet; `safervlm label run` begins" in said
    assert not Path("run/labels-plan.json").exists()
    typing(monkeypatch, capsys, {})
    main(LINE)
    capsys.readouterr()
    main(["label", "run", "--with", "summary"])
    assert capsys.readouterr().out == "run: nobody has labelled yet\n"


def test_a_torn_last_line_is_removed(truth, monkeypatch, capsys):
    typing(monkeypatch, capsys, truth)
    main(LINE)
    path = Path("run/labels.jsonl")
    text = path.read_text()
    path.write_text(text[:-20])
    typing(monkeypatch, capsys, truth)
    main(LINE)
    assert path.read_text() == text


@pytest.mark.parametrize("ending", [".csv", ".xlsx"])
def test_sheets_are_exported_and_read_back(ending, truth, capsys):
    main([*LINE, "--with", "sheet"])
    sheet = Path("run/labels.csv").with_suffix(ending)
    ids = {each["response"]: each["id"] for each in read_jsonl("run/responses.jsonl")}
    table = (pd.read_csv if ending == ".csv" else pd.read_excel)(sheet, dtype=str, keep_default_na=False)
    assert list(table) == ["id", "question", "answer", "label", "allowed"]
    assert not re.search("Made|f00d|png", table.to_csv())
    assert set(table["allowed"]) == {"Safe / Unsafe / N/A", "A / B / C / D / N/A"}
    table["label"] = [truth[ids[text]].lower() for text in table["answer"]]  # case is not matter
    filled = Path(f"filled{ending}")
    for rows in (table[:30].assign(label=["", *table["label"][1:30]]), table[::-1]):  # first a part of it
        rows.to_csv(filled, index=False) if ending == ".csv" else rows.to_excel(filled, index=False)
        main(["label", "run", "--read", str(filled), "--rater", "Ada"])
    labels = list(read_jsonl("run/labels.jsonl"))
    assert len(labels) == len({each["id"] for each in labels}) == len(table)
    assert all(each["label"] == truth[each["id"]] and each["rater"] == "Ada" for each in labels)
    assert f"Ada: {len(table)} of {len(table)} labelled" in capsys.readouterr().out
    there = sheet.read_bytes()
    main([*LINE, "--with", "sheet"])  # a sheet that may be filled in is kept
    assert sheet.read_bytes() == there
    assert "is kept" in capsys.readouterr().out


def test_formulas_in_sheets_are_written_as_text(monkeypatch):
    write_labelled(Path("run"))
    for file, change in (("responses", {"response": "=1+1"}), ("verdicts", {"answer": ""})):
        write_jsonl(f"run/{file}.jsonl", [record | change for record in read_jsonl(f"run/{file}.jsonl")])
    main([*LINE, "--with", "sheet"])
    assert set(pd.read_csv("run/labels.csv")["answer"]) == {"'=1+1"}
    cells = openpyxl.load_workbook("run/labels.xlsx")["labels"]["C"][1:]
    assert {(cell.value, cell.data_type) for cell in cells} == {("=1+1", "s")}


SHEETS = {
    "an unknown id": (lambda rows: rows.assign(id=["r1234", *rows["id"][1:]]), r"line 2: the id 'r1234' is not in"),
    "an added row": (lambda rows: pd.concat([rows, rows[:1].assign(id="", label="Safe")]), r"the id '' is not in"),
    "a row twice": (lambda rows: pd.concat([rows, rows[3:4]]), r"line \d+: the id '\w+' occurs twice"),
    "another label": (lambda rows: rows.assign(label="Dangerous"), r"line 2: the label 'Dangerous' is none of"),
    "a letter": (lambda rows: rows.assign(label="E"), r"line 2: the label 'E' is none of"),
    "no labels": (lambda rows: rows.drop(columns="label"), r"the column 'label' is missing"),
    "N/A before": (lambda rows: rows.assign(label="N/A"), r"line 2: 'Ada' labelled it '\w+' before, now 'N/A'"),
}


@pytest.mark.parametrize("case", SHEETS)
def test_invalid_sheets_are_rejected_without_changing_labels(case, truth, capsys):
    change, reason = SHEETS[case]
    main([*LINE, "--with", "sheet"])
    table = pd.read_csv("run/labels.csv", dtype=str, keep_default_na=False)
    if case == "N/A before":
        table.assign(label=table["allowed"].str.split(" / ").str[0]).to_csv("filled.csv")
        main(["label", "run", "--read", "filled.csv", "--rater", "Ada"])
    # A perception question has line breaks in a workbook and escapes in a CSV file.
    change(table).to_csv("changed.csv", index=False)
    before = Path("run/labels.jsonl").read_text()
    assert re.search(reason, rejected(["label", "run", "--read", "changed.csv", "--rater", "Ada"], capsys))
    assert Path("run/labels.jsonl").read_text() == before


def test_unreadable_workbooks_are_rejected(truth, capsys):
    main([*LINE, "--with", "sheet"])
    Path("bad.xlsx").write_text("no workbook")
    assert "can't be read as a workbook" in rejected(["label", "run", "--read", "bad.xlsx"], capsys)
    assert "No such file" in rejected(["label", "run", "--read", "none.xlsx"], capsys)


def change_labels(**changes: str):
    def change() -> None:
        labels = list(read_jsonl("run/labels.jsonl"))
        write_jsonl("run/labels.jsonl", [labels[0] | changes, *labels[1:]])

    return change


def twice() -> None:
    labels = list(read_jsonl("run/labels.jsonl"))
    write_jsonl("run/labels.jsonl", [*labels, labels[0]])


def change_verdict() -> None:
    verdicts = list(read_jsonl("run/verdicts.jsonl"))
    verdicts[0]["probabilities"] = {verdicts[0]["label"]: 1.0}
    write_jsonl("run/verdicts.jsonl", verdicts)


def change_plan(**changes: object):
    def change() -> None:
        path = Path("run/labels-plan.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


RUNS = {
    "more labels": (lambda: None, ["--labels", "50"], r"labels: .* was made with 40, got 50, which needs a new sample"),
    "another seed": (lambda: None, ["--seed", "1"], "seed: .* was made with 0, got 1"),
    "no label": (lambda: None, ["--labels", "0"], "labels: at least 1"),
    "no name": (lambda: None, ["--rater", " "], "rater: ' ' is empty"),
    "another way": (lambda: None, ["--with", "voice"], "--with"),
    "other verdicts": (change_verdict, [], "responses or verdicts have changed since .*; restore"),
    "no plan": (lambda: Path("run/labels-plan.json").unlink(), [], "labels without labels-plan.json"),
    "a torn plan": (lambda: Path("run/labels-plan.json").write_text("{"), [], "labels-plan.json.*not JSON"),
    "a plan of another kind": (change_plan(seed="0"), [], "damaged .*'seed' must be an integer"),
    "a plan without its sample": (change_plan(sampled=[]), [], "damaged"),
    "an unknown response": (change_labels(id="x"), [], "'x' by 'rater 1': it is not in labels-plan.json"),
    "another text": (change_labels(answer="x"), [], "of another text"),
    "an unknown label": (change_labels(label="Z"), [], "'Z' is none of"),
    "a label twice": (twice, [], "occurs twice"),
    "an unknown field": (change_labels(colour="red"), [], "the field 'colour' is unknown"),
}


@pytest.mark.parametrize("case", RUNS)
def test_invalid_labelling_runs_are_rejected(case, truth, monkeypatch, capsys):
    change, words, reason = RUNS[case]
    typing(monkeypatch, capsys, truth)
    main(LINE)
    change()
    assert re.search(reason, rejected(["label", "run", *words], capsys))


def test_labels_of_several_raters_are_combined_and_summarised(truth, monkeypatch, capsys):
    """Ada and Ben label everything, Cy a part: only complete raters count, and Ada's label decides disagreements."""
    for rater, given in (("Ada", truth), ("Ben", dict.fromkeys(truth, "N/A")), ("Cy", {})):
        typing(monkeypatch, capsys, given, *(["0"] if rater == "Cy" else []))
        main([*LINE, "--rater", rater])
    capsys.readouterr()
    main(["label", "run", "--with", "summary"])
    said = capsys.readouterr().out
    assert "Cy: 1 of" in said
    assert "Labels are those of 2 raters" in " ".join(said.split())
    table = pd.read_csv("run/labels-summary.csv", keep_default_na=False)
    alphas = table[table["measure"] == "krippendorff_alpha"]
    assert (alphas["value"] < 0).all()  # they never agree
    people = table[(table["measure"] == "confusion") & (table["labels"] > 0)]["people"]
    assert "N/A" not in set(people)
    shares = table[table["measure"] == "confusion"].groupby("capability")["value"].sum()
    assert shares.tolist() == pytest.approx([1] * len(shares))


def test_the_judge_learns_the_labels_of_the_majority(truth, monkeypatch, capsys):
    """The labels that also correct the rates; those of a part of the sample while no rater is complete."""

    def learned() -> dict[str, str]:
        return {line["id"]: line["label"] for name in ("alignment", "perception") for line in read_labels(name)}

    def read_labels(judge: str) -> list[dict[str, str]]:
        file = Path(for_judge(judge)[0])
        return list(read_jsonl(file)) if file.exists() else []

    typing(monkeypatch, capsys, {}, "0")
    main([*LINE, "--rater", "Cy"])
    assert list(learned().values()) == ["N/A"]
    (first,) = learned()
    for rater, given in (("Ada", dict.fromkeys(truth, "N/A")), ("Ben", truth), ("Dee", truth)):
        typing(monkeypatch, capsys, given)
        main([*LINE, "--rater", rater])
    found = learned()
    assert first in found
    assert found == {name: truth[name] for name in found}


def test_undefined_agreement_is_shown_as_a_dash(truth, monkeypatch, capsys):
    """If all labels of a capability are equal, the expected agreement by chance is 1 and alpha is undefined."""
    monkeypatch.setenv("COLUMNS", "200")  # no line is wrapped
    for rater in ("Ada", "Ben"):
        typing(monkeypatch, capsys, dict.fromkeys(truth, "N/A"))
        main([*LINE, "--rater", rater])
    capsys.readouterr()
    main(["label", "run", "--with", "summary"])
    said = capsys.readouterr().out
    assert "nan" not in said
    alphas = [line for line in said.splitlines() if "Krippendorff" in line]
    assert [line.split()[-2] for line in alphas] == ["-"] * 3
