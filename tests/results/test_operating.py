"""Operating curves of runs: against scikit-learn and by hand, and their tables and figure in the report."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from labelled import write_labelled, write_odds
from sklearn import metrics

from safervlm.errors import ArgumentError
from safervlm.labelling.plan import labelable
from safervlm.protocol import REVERSED, REVERSED_NUMBER, REVERSED_QUESTION
from safervlm.records import TURNED, Response, Verdict, read_jsonl, write_jsonl
from safervlm.reports.curve_plot import curve_plot
from safervlm.reports.kinds import report_runs
from safervlm.reports.operating import operating_tables
from safervlm.reports.runs import Run, load_runs
from safervlm.results.operating import OPERATING, operating, read_odds
from safervlm.results.runs import load_run
from safervlm.results.scores import scores
from safervlm.results.suite import load_suite
from safervlm.statistics import curves
from safervlm.statistics.intervals import coverage

CONCEPTS = 12


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Few samples of the bootstrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "bootstrap", partial(curves.bootstrap, samples=100))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "base"
    folder.mkdir()
    write_labelled(folder, concepts=CONCEPTS)
    write_odds(folder)
    return folder


@pytest.fixture(scope="module")
def table(run: Path) -> pd.DataFrame:
    return operating(load_run(run), read_odds(run), prevalence=0.2)


def value(table: pd.DataFrame, measure: str, **where: str) -> pd.Series:
    where = {"capability": "alignment", "category": "overall", "questions": "mean", **where}
    rows = table[(table["measure"] == measure) & (table[list(where)] == pd.Series(where)).all(axis=1)]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def by_hand(run: Path, category: str | None = None, one: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, score and share of answers that say unsafe, of each image."""
    odds = {record["id"]: record["log_odds"] for record in read_jsonl(run / "odds.jsonl")}
    labels = {record["id"]: record["label"] for record in read_jsonl(run / "verdicts.jsonl")}
    images: dict[str, list[tuple[bool, float, bool]]] = {}
    for record in read_jsonl(run / "responses.jsonl"):
        other = record["answer"] == "Unsafe" and category not in (None, record["category"])
        if record["capability"] != "alignment" or other:
            continue
        row = record["answer"] == "Unsafe", odds[record["id"]], labels[record["id"]] == "Unsafe"
        images.setdefault(record["dataset"] + record["image"], []).append(row)
    means = [np.mean(rows[:1] if one else rows, axis=0) for rows in images.values()]
    return tuple(np.array(means).T)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("category", "one"), [(None, False), (None, True), ("Hate", False), ("Deception", True)], ids=str
)
def test_operating_measures_equal_scikit_learn(run, table, category, one):
    truth, score, _ = by_hand(run, category, one)
    where = {"category": category or "overall", "questions": "one" if one else "mean"}
    assert value(table, "auroc", **where)["value"] == pytest.approx(metrics.roc_auc_score(truth, score))
    weights = np.where(truth == 1, 0.2 / truth.sum(), 0.8 / (1 - truth).sum())
    expected = metrics.average_precision_score(truth, score, sample_weight=weights)
    assert value(table, "auprc", **where)["value"] == pytest.approx(expected)
    fpr, tpr, _ = metrics.roc_curve(truth, score, drop_intermediate=False)
    for name, at in (("tpr_at_fpr_1", 0.01), ("tpr_at_fpr_5", 0.05), ("tpr_at_fpr_10", 0.1)):
        assert value(table, name, **where)["value"] == pytest.approx(tpr[fpr <= at].max())
    row = value(table, "auroc", **where)
    assert (row["unsafe_images"], row["safe_images"]) == (truth.sum(), (1 - truth).sum())
    assert np.isnan(row["low"]) == bool(category)  # a category has fewer than 10 concepts


def test_knowledge_behaviour_gap_is_separation_by_odds_minus_by_answers(run, table):
    truth, _, said = by_hand(run)
    answers = said[truth == 1].mean() - said[truth == 0].mean()
    odds, found = (value(table, f"separation_{name}") for name in ("odds", "answers"))
    gap = value(table, "knowledge_behaviour_gap")
    assert found["value"] == pytest.approx(answers)
    assert gap["value"] == pytest.approx(odds["value"] - answers)
    assert gap["low"] < gap["value"] < gap["high"]


def test_operating_table_has_all_measures_and_valid_intervals(table):
    assert list(table.columns) == OPERATING
    assert value(table, "median_mass")["value"] == 0.7
    names = table[table["capability"] == "alignment_text_only"]  # no safe names: the mass alone
    assert set(names["measure"]) == {"median_mass"}
    assert set(names["value"]) == {0.2}
    assert "share_bound" not in set(table["measure"])
    assert table[table["measure"] == "auprc"]["prevalence"].eq(0.2).all()
    ends = table[table["low"].notna()]
    assert (ends["low"] <= ends["value"]).all()
    assert (ends["value"] <= ends["high"]).all()
    assert set(ends["sampling_unit"]) == {"new concepts"}


@pytest.mark.parametrize("drawn", [False, True])
def test_one_question_per_image_is_the_sampled_one_or_else_the_first(run, drawn):
    frame = load_run(run)
    odds = read_odds(run).assign(log_odds=0.0)
    picked = frame["id"].str.endswith("/1" if drawn else "/0") & (frame["capability"] == "alignment")
    frame["drawn"] = drawn & picked
    side = dict(zip(frame["id"], frame["side"], strict=True))
    odds["log_odds"] = [float(side[name] == "unsafe") * (name in set(frame["id"][picked])) for name in odds["id"]]
    assert value(operating(frame, odds), "auroc", questions="one")["value"] == 1


def test_unfinished_thinking_has_odds_and_no_answer(run):
    frame = load_run(run)
    some = (frame["capability"] == "alignment") & (frame["prompt_number"] == 0)
    frame["label"] = frame["label"].mask(some, "thinking unfinished")
    changed, plain = operating(frame, read_odds(run)), operating(load_run(run), read_odds(run))
    assert value(changed, "auroc")["value"] == value(plain, "auroc")["value"]
    assert value(changed, "separation_answers")["value"] != value(plain, "separation_answers")["value"]
    frame["label"] = "thinking unfinished"
    assert "knowledge_behaviour_gap" not in set(operating(frame, read_odds(run))["measure"])


@pytest.mark.parametrize("prevalence", [0.0, 1.0, -1.0, float("nan")])
def test_prevalence_outside_0_and_1_is_rejected(prevalence, run):
    with pytest.raises(ArgumentError, match=r"^prevalence: "):
        operating(load_run(run), read_odds(run), prevalence)


# --- the reversed question --------------------------------------------------------------------------------------------


@pytest.fixture
def reversed_run(tmp_path: Path) -> Path:
    """Answers to the first question and its opposite: a third of the safe images gets Yes to both, no unsafe one."""
    folder = tmp_path / "reversed"
    folder.mkdir()
    write_labelled(folder, concepts=CONCEPTS)
    responses, verdicts = [], {record["id"]: record for record in read_jsonl(folder / "verdicts.jsonl")}
    for record in read_jsonl(folder / "responses.jsonl"):
        response = Response.from_dict(record)
        question = response.question
        if question.capability == "alignment" and question.prompt_number == 0:
            says = "Yes, it is." if question.answer == "Safe" else "No."
            response = replace(response, response=says)
            third = question.answer == "Safe" and int(question.concept.split()[1]) % 3 == 0
            turned = replace(
                question,
                id=f"{question.dataset}/{question.image}/{REVERSED}/{REVERSED_NUMBER}",
                capability=REVERSED,
                prompt_number=REVERSED_NUMBER,
                prompt=REVERSED_QUESTION,
                variant=TURNED,
            )
            text = "Yes, it is unsafe." if third else "No." if question.answer == "Safe" else "Perhaps."
            responses.append(Response(turned, text, "stop", 3))
            label = "Unsafe" if third else "Safe" if question.answer == "Safe" else "N/A"
            verdict = Verdict(turned.id, label, {label: 1.0}, "rule", Verdict.fingerprint_of(text))
            verdicts[turned.id] = verdict.to_dict()
            verdicts[question.id]["answer"] = Verdict.fingerprint_of(says)
        responses.append(response)
    write_jsonl(folder / "responses.jsonl", (each.to_dict() for each in responses))
    write_jsonl(folder / "verdicts.jsonl", verdicts.values())
    return folder


def test_yes_to_both_is_acquiescence(reversed_run):
    table = operating(load_run(reversed_run, variants=True), read_odds(reversed_run))
    assert set(table["measure"]) == {"acquiescence"}
    assert set(table["capability"]) == {REVERSED}
    new = table[table["sampling_unit"] == "new concepts"].set_index("side")
    assert new["value"].to_dict() == pytest.approx({"unsafe": 0, "safe": 1 / 3, "both": 4 / 60})
    assert new["na_rate"].to_dict() == pytest.approx({"unsafe": 1, "safe": 0, "both": 48 / 60})
    assert new.loc["safe", "low"] < 1 / 3 < new.loc["safe", "high"]


def test_reversed_question_is_excluded_from_published_scores(reversed_run, capsys):
    (loaded,) = load_runs([reversed_run])
    assert REVERSED not in set(loaded.frame["capability"])
    assert len(loaded.variants) == 60
    assert "aren't in a report" not in capsys.readouterr().out
    whole = load_run(reversed_run, variants=True)
    assert REVERSED in set(whole["capability"])
    pd.testing.assert_frame_equal(scores(whole), loaded.scores)
    evaluation = load_suite(reversed_run, "reversed")
    assert len(evaluation.answers) == len(loaded.frame)
    assert REVERSED not in set(evaluation.answers["capability"])
    assert labelable(whole)["id"].equals(labelable(loaded.frame)["id"])


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_writes_the_tables_and_the_figure(run, reversed_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # on a narrow terminal, not every remark fits
    report_runs([run, reversed_run], tmp_path / "report.html", prevalence=0.2)
    said = " ".join(capsys.readouterr().out.split())
    assert "base: log-odds separate unsafe from safe images with an AUROC of" in said
    assert "median probability of Yes or No 0.70" in said
    assert "reversed: says yes to the first question and to its opposite about 0.0 % (unsafe), 33.3 % (safe)" in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert REVERSED not in page
    assert page.count("<polyline") == 1
    for method, number in ((curves.OBUCHOWSKI, "AUROC"), (curves.AT_CHOSEN_THRESHOLDS, "knowledge-behaviour gap")):
        assert f"{number} {coverage(method)}" in page
    written = pd.read_csv(tmp_path / "report_operating.csv").fillna({"sampling_unit": ""})
    expected = operating(load_run(run), read_odds(run), 0.2)
    own = written[written["run"] == run.name].drop(columns=["run", "thinking_unfinished"])
    pd.testing.assert_frame_equal(own.reset_index(drop=True), expected, check_dtype=False)
    assert set(written[written["run"] == "reversed"]["measure"]) == {"acquiescence"}


def test_curve_plot_draws_only_runs_with_odds(run, reversed_run):
    runs = [Run(folder.name, folder, load_run(folder), pd.DataFrame(), {}) for folder in (run, reversed_run)]
    table = operating(runs[0].frame, read_odds(run))
    (drawn,) = curve_plot(runs, {"base": table})["runs"]
    assert drawn["points"].startswith("0,100 ")
    assert drawn["points"].endswith(" 100,0")
    assert len(drawn["bars"]) == 3
    assert drawn["said"].startswith("AUROC ")
    assert curve_plot(runs[1:], {}) is None


def test_odds_that_cannot_be_read_are_reported(run, tmp_path, capsys):
    line = (run / "odds.jsonl").read_text(encoding="utf-8").splitlines()[0]
    damaged = Run("damaged", tmp_path, load_run(run), pd.DataFrame(), {})
    for text, reason in ((f"{line}\n{line}\n", "occurs twice"), ('{"id": "a"}\n', "line 1 (a): invalid odds")):
        (tmp_path / "odds.jsonl").write_text(text, encoding="utf-8")
        assert operating_tables([damaged]) == {}
        assert reason in " ".join(capsys.readouterr().out.split())


def test_questions_without_odds_are_counted(run, tmp_path, capsys):
    lines = (run / "odds.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "odds.jsonl").write_text("".join(lines[7:]), encoding="utf-8")
    frame = load_run(run)
    asked = int((frame["capability"] != "perception").sum())
    for folder, said in ((run, False), (tmp_path, True)):
        operating_tables([Run("base", folder, frame, pd.DataFrame(), {}, frame.iloc[:0])])
        printed = " ".join(capsys.readouterr().out.split())
        assert (f"base: 7 of {asked} questions have no log-odds and are not in the curve" in printed) == said
        assert ("no log-odds" in printed) == said
