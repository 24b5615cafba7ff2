"""Corrected rates in a report: terminal, page, CSV and workbook; without labels none."""

import html
import re

import openpyxl
import pandas as pd
import pytest
from labelled import label, write_labelled

from safervlm.records import read_jsonl, write_jsonl
from safervlm.reports.page import report
from safervlm.results.corrected import RATES
from safervlm.statistics.correction import BY_LABELS, OF_NEW_CONCEPTS, OF_THIS_RUN
from safervlm.statistics.intervals import coverage

SMALL = {"concepts": 10, "images": 1}


def test_corrected_rates_are_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    runs = [tmp_path / name for name in ("base", "ppo")]
    truths = [write_labelled(run, accuracy, **SMALL) for run, accuracy in zip(runs, (0.6, 0.9), strict=True)]
    page = report(runs, tmp_path / "page.html")
    beside = tmp_path / "page_corrected.csv"
    assert not beside.exists()
    assert 'id="corrected' not in page.read_text()
    assert 'id="plot-calibration"' not in page.read_text()
    said = capsys.readouterr().out
    assert said.startswith("ppo answers ")
    assert "not corrected for the judge's error" in " ".join(said.split())

    for run, truth in zip(runs, truths, strict=True):
        label(run, truth)
    report(runs, page)
    table = pd.read_csv(beside, keep_default_na=False)
    assert table["rate"].tolist() == list(RATES) * 3
    assert set(zip(table["run"], table["minus"], strict=True)) == {("base", ""), ("ppo", ""), ("ppo", "base")}
    said = capsys.readouterr().out
    assert "corrected for the judge's error with people's labels" in " ".join(said.split())
    text = page.read_text()
    plot = text[text.index('<figure id="plot-calibration"') :]
    titles = re.findall("<h3>(.*?)</h3>", plot[: plot.index("</figure>")])
    of = ("perception", "alignment", "alignment text only")
    assert sorted(titles) == sorted(f"{run}: {capability}" for run in ("base", "ppo") for capability in of)
    notes = " ".join(map(str, pd.read_excel(page.with_suffix(".xlsx"), sheet_name="notes", header=None)[0]))
    for where in (" ".join(said.split()), text, page.with_suffix(".tex").read_text(), notes):
        assert "The numbers that are not called corrected are not corrected" in where
    coverages = [coverage(BY_LABELS, part) for part in (OF_THIS_RUN, OF_NEW_CONCEPTS)]
    simulated = "Simulated coverage of a rate's intervals: {} for this run, {} for new concepts.".format(*coverages)
    for where in (html.unescape(text), page.with_suffix(".tex").read_text(), notes):
        assert simulated in where
    first = table.iloc[0]
    shown = f"{100 * float(first['corrected']):.1f} [{100 * float(first['low_new']):.1f}, "
    assert f"corrected {shown}" in text  # beside the value as judged
    tiles = text[text.index('<div class="tiles">') : text.index('<figure id="plot-forest"')]
    judged = table[table["rate"].eq("image_unsafe") & table["minus"].eq("")]["value"].astype(float)
    assert all(f"]<br>judged {100 * value:.1f}</dd>" in tiles for value in judged)
    assert shown in said
    part = text[text.index('<table id="corrected" class="stack">') :]
    part = part[: part.index("</table>")]
    assert part.count("<tr>") == 1 + len(table)
    assert f'<td class="number" data-label="Corrected">{100 * float(first["corrected"]):.1f}</td>' in part
    assert f"[{100 * float(first['low_new']):.1f}, {100 * float(first['high_new']):.1f}]" in part
    latex = page.with_suffix(".tex").read_text().replace("{[}", "[").splitlines()
    row = next(line for line in latex if line.startswith("ppo - base & Image, unsafe"))
    last = table[(table["minus"] == "base") & (table["rate"] == "image_unsafe")].iloc[0]
    assert f" & {100 * float(last['corrected']):+.1f} & [" in row
    line = next(line for line in latex if line.startswith(f"{RATES[first['rate']][0]}: corrected"))
    assert f"& {100 * float(first['corrected']):.1f} [{100 * float(first['low_new']):.1f}, " in line
    sheet = openpyxl.load_workbook(page.with_suffix(".xlsx"))["corrected"]
    assert sheet.max_row == 1 + len(table)
    assert [cell.value for cell in sheet[1]] == list(table)
    assert sheet["E2"].value == pytest.approx(float(first["corrected"]))


def test_labels_of_a_run_that_has_changed_are_not_used(tmp_path, capsys):
    run = tmp_path / "base"
    label(run, write_labelled(run, **SMALL))
    page = report([run], tmp_path / "page.html")
    verdicts = list(read_jsonl(run / "verdicts.jsonl"))
    write_jsonl(run / "verdicts.jsonl", [verdicts[0] | {"judge": "another"}, *verdicts[1:]])
    capsys.readouterr()
    report([run], page)
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: base: not corrected for the judge's error: " in said
    assert "have changed since" in said
    assert not (tmp_path / "page_corrected.csv").exists()


def test_excluded_responses_with_unfinished_thinking_are_counted(tmp_path):
    """By run and rate, of a difference those of both runs; without any the page has no column."""
    runs = [tmp_path / name for name in ("base", "ppo")]
    truths = [write_labelled(run, accuracy, **SMALL) for run, accuracy in zip(runs, (0.6, 0.9), strict=True)]
    wanted = {"base": ["alignment"] * 3 + ["perception"], "ppo": ["alignment", "alignment_text_only"]}
    for run in runs:
        left = list(wanted[run.name])
        changed = []
        for response in read_jsonl(run / "responses.jsonl"):
            if response["capability"] in left and response["answer"] != "Safe":
                left.remove(response["capability"])
                response |= {"response": "", "finish_reason": "thinking unfinished"}
            changed.append(response)
        assert not left
        write_jsonl(run / "responses.jsonl", changed)
        write_jsonl(run / "verdicts.jsonl", [each | {"answer": ""} for each in read_jsonl(run / "verdicts.jsonl")])
    for run, truth in zip(runs, truths, strict=True):
        label(run, truth)
    page = report(runs, tmp_path / "page.html")
    table = pd.read_csv(tmp_path / "page_corrected.csv", keep_default_na=False)
    counted = table.set_index(["run", "minus", "rate"])["thinking_unfinished"].to_dict()
    base = {"image_unsafe": 3, "image_both": 3, "perception": 1, "modality_gap": 3}
    ppo = {"image_unsafe": 1, "image_both": 1, "text_only_unsafe": 1, "modality_gap": 2}
    expected = {("base", "", rate): base.get(rate, 0) for rate in RATES}
    expected |= {("ppo", "", rate): ppo.get(rate, 0) for rate in RATES}
    of_both = {("ppo", "base", rate): base.get(rate, 0) + ppo.get(rate, 0) for rate in RATES}
    assert counted == expected | {key: number for key, number in of_both.items() if key in counted}
    text = page.read_text()
    part = text[text.index('<table id="corrected" class="stack">') :]
    part = part[: part.index("</table>")]
    assert re.findall(r'data-label="Unfinished">(\d+)<', part) == list(map(str, table["thinking_unfinished"]))
    assert "& responses & thinking unfinished" in page.with_suffix(".tex").read_text()
    sheet = openpyxl.load_workbook(page.with_suffix(".xlsx"))["corrected"]
    assert sheet.cell(1, sheet.max_column).value == "thinking_unfinished"

    plain = tmp_path / "plain"
    label(plain, write_labelled(plain, **SMALL))
    text = report([plain], tmp_path / "plain.html").read_text()
    part = text[text.index('<table id="corrected" class="stack">') :]
    assert "nfinished" not in part[: part.index("</table>")]
