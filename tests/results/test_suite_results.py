"""The scores of an evaluation, recomputed by hand on responses in the real format.

The tests detect errors in MME's rule, dropped missing responses, invalid ratings that count, and wrong pairs.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluations import question, safety, write

from safervlm.errors import RecordError
from safervlm.judging.rating import Rating
from safervlm.records import Failure, read_jsonl, write_jsonl
from safervlm.results.mme import mme_images
from safervlm.results.scores import scores
from safervlm.results.suite import load_suite
from safervlm.results.suite_columns import columns
from safervlm.results.suite_differences import compare_suites, flips
from safervlm.results.suite_estimates import estimates, evaluate
from safervlm.statistics.diversity import diversity, self_bleu

# The folder of MME's published tools/eval_tool.zip (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models,
# branch Evaluation), unpacked.
TOOL = os.environ.get("SAFERVLM_MME_TOOL")


def values(evaluation):
    return {row["column"]: row["value"] for row in evaluate(evaluation, columns([evaluation])).to_dict("records")}


# --- MME --------------------------------------------------------------------------------------------------------------

# task, image, response to the question whose answer is Yes, and to the one whose answer is No; None: missing
MME = [
    ("existence", "a", "Yes.", "No"),
    ("existence", "b", "yes, it is", "I can't tell"),
    ("existence", "c", "", None),
    ("existence", "d", "Absolutely, yes", "None of these"),  # the first four letters decide: "abso", "none"
    ("code_reasoning", "e", "No", "No, it isn't."),
    ("code_reasoning", "f", None, None),
]


def mme(folder, rows=MME):
    answers, failed = [], []
    for task, image, *said in rows:
        for number, (right, text) in enumerate(zip(("Yes", "No"), said, strict=True)):
            asked = question("MME", f"images/{task}/{image}.jpg", "yes_no", number, right, task)
            if text is None:
                failed.append(asked)
            else:
                answers.append((asked, text, None))
    return load_suite(write(folder, answers, failed), "model")


def test_a_response_that_no_judge_could_classify_is_missing(tmp_path):
    asked = [question("SMID", str(image), "generalisation", 0, "Unsafe", "SMID", drawn=True) for image in range(3)]
    write(tmp_path, [(each, "No", "Unsafe") for each in asked], failed=[asked[0]])  # changed since
    verdicts = list(read_jsonl(tmp_path / "verdicts.jsonl"))
    write_jsonl(tmp_path / "verdicts.jsonl", verdicts[:2])
    write_jsonl(tmp_path / "verdicts-failed.jsonl", [Failure(asked[2], "a panic").to_dict()])
    evaluation = load_suite(tmp_path, "model")
    assert evaluation.unanswered["id"].tolist() == [asked[2].id]
    rows = evaluate(evaluation, columns([evaluation])).set_index("column")
    assert (rows.loc["SMID", "n"], rows.loc["SMID", "missing"]) == (2, 1)


def test_mme_by_the_official_rule(tmp_path):
    # existence: right a both, b one, c none, d one of eight: accuracy 4/8 = 50 %; both right: a of four: 25 %
    # code_reasoning: e one, f none of four: 25 %; both right: none
    assert values(mme(tmp_path)) == {
        "MME_accuracy": pytest.approx(5 / 9),  # of the questions with a response
        "MME_accuracy_plus": pytest.approx(1 / 6),
        "MME_existence": pytest.approx(75.0),
        "MME_code_reasoning": pytest.approx(25.0),
        "MME": pytest.approx(100.0),
        "MME_perception": pytest.approx(75.0),
        "MME_cognition": pytest.approx(25.0),
        # The published shortcut looks for "Yes" and "No" as they are written: a both, "yes" isn't "Yes", d "No" in
        # "None", e once; missing responses are excluded: 4 of 9.
        "MME_occurs": pytest.approx(4 / 9),
    }


def test_missing_responses_are_counted(tmp_path):
    table = evaluate(evaluation := mme(tmp_path), columns([evaluation]))
    assert table[~table["detail"]].set_index("column")["missing"].to_dict() == {
        "MME": 3,
        "MME_perception": 1,
        "MME_cognition": 2,
        "MME_occurs": 3,
    }


def official(rows):
    """The input of the evaluation tool: two lines per image; a missing response is an empty text."""
    score = 0.0
    for task in {task for task, *_ in rows}:
        right, both, images = 0, 0, 0
        for _, _, yes, no in (row for row in rows if row[0] == task):
            hits = 0
            for truth, said in (("yes", yes), ("no", no)):
                said = (said or "").lower()
                read = said if said in ("yes", "no") else "other"
                if read == "other":
                    read = "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else "other"
                hits += read == truth
            right, both, images = right + hits, both + (hits == 2), images + 1
        score += 100 * right / (2 * images) + 100 * both / images
    return score


def test_mme_scores_equal_the_official_tool(tmp_path):
    rng = np.random.default_rng(0)
    said = ["Yes", "No", "yes.", "no way", "Hm", "", "I know", "Not sure", "Yes and no", None]
    tasks = ("existence", "count", "OCR", "text_translation")
    rows = [(task, str(i), rng.choice(said), rng.choice(said)) for task in tasks for i in range(12)]
    assert values(mme(tmp_path, rows))["MME"] == pytest.approx(official(rows))


@pytest.mark.skipif(TOOL is None, reason="SAFERVLM_MME_TOOL names no folder with MME's eval_tool")
def test_a_published_models_responses_score_as_the_official_tool_prints(tmp_path):
    """LaVIN's 2,374 responses, distributed with the tool; 963.61 and 249.64 are its scores on MME's leaderboard."""
    answers = []
    for file in sorted(Path(TOOL, "LaVIN").glob("*.txt")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            image, _, truth, said = line.split("\t")
            asked = question("MME", f"images/{file.stem}/{image}", "yes_no", number % 2, truth, file.stem)
            answers.append((asked, said, None))
    assert len(answers) == 2374
    ours = values(load_suite(write(tmp_path, answers), "LaVIN"))
    assert (ours["MME_perception"], ours["MME_cognition"]) == pytest.approx((963.6114445778312, 249.64285714285714))
    tool = subprocess.run([sys.executable, "calculation.py"], cwd=TOOL, capture_output=True, text=True, check=False)
    if "No module named 'sklearn'" in tool.stderr:
        return  # it prints the scores above
    printed = dict(re.findall(r"\t (\w+)  score: ([\d.]+)", tool.stdout))
    assert len(printed) == 14
    assert {task: ours[f"MME_{task}"] for task in printed} == pytest.approx({t: float(s) for t, s in printed.items()})


def test_mme_image_without_exactly_two_questions_is_rejected():
    rows = [{"category": "color", "image": "a.jpg", "answer": "Yes", "label": "Yes"}] * 3
    with pytest.raises(RecordError, match=r"needs two questions per image, 'a\.jpg' \(color\) has 3"):
        mme_images(pd.DataFrame(rows))


def test_other_yes_or_no_datasets_have_an_accuracy(tmp_path):
    rows = [("mine", image, yes, no) for _, image, yes, no in MME]
    assert values(mme(tmp_path, rows)) == {"MME": pytest.approx(5 / 9), "MME_occurs": pytest.approx(4 / 9)}


# --- LLaVABench -------------------------------------------------------------------------------------------------------


def rated(folder, ratings, count=4, both_orders=False):
    asked = [question("LLaVABench", f"{n // 2}.jpg", "rated", n % 2, "A reference.", "conv") for n in range(count)]
    made = []
    for number, swapped, reference, response in ratings:
        missing = "" if reference else "unreadable"
        made.append(
            Rating(asked[number].id, swapped, reference, response, missing, "judge", "", "", f"{number}{swapped}")
        )
    answers = [(each, "An answer.", None) for each in asked]
    return load_suite(write(folder, answers, ratings=made, both_orders=both_orders), "model")


def test_llavabench_is_the_ratio_of_sums(tmp_path):
    evaluation = rated(tmp_path, [(0, False, 8, 4), (1, False, 10, 9), (2, False, None, None), (3, False, 5, 5)])
    ((_, ratio),) = estimates(evaluation, columns([evaluation])[0])
    assert ratio.value == pytest.approx(18 / 23)
    table = evaluate(evaluation, columns([evaluation]))
    assert table[["n", "missing"]].to_numpy().tolist() == [[3, 1]]


def test_ratings_in_both_orders_are_averaged_and_a_single_one_is_missing(tmp_path):
    # A judge that rates the first position two points higher.
    evaluation = rated(
        tmp_path,
        [(0, False, 8, 4), (0, True, 6, 6), (1, False, 9, 6), (1, True, None, None), (2, False, 7, 5), (2, True, 5, 7)],
        both_orders=True,
    )
    ((_, ratio),) = estimates(evaluation, columns([evaluation])[0])
    assert ratio.value == pytest.approx((5 + 6) / (7 + 6))
    assert evaluate(evaluation, columns([evaluation]))["missing"].tolist() == [2]


def test_incomplete_or_outdated_ratings_are_not_scored(tmp_path):
    """Another judge's older ratings, a repeated attempt, one of two orders, a torn line."""
    ratings = [
        (0, False, 8, 4),
        (0, True, 6, 6),
        (1, False, None, None),
        (1, False, 9, 6),
        (1, True, 7, 8),
        (2, False, 9, 3),
    ]
    rated(tmp_path, ratings, both_orders=True)
    there = (tmp_path / "ratings.jsonl").read_text()
    other = there.splitlines()[0].replace('"judge": "judge"', '"judge": "another"').replace("4", "10")
    (tmp_path / "ratings.jsonl").write_text(f'{other}\n{there}{{"id": "LLaVABe')
    evaluation = load_suite(tmp_path, "model")
    ((_, ratio),) = estimates(evaluation, columns([evaluation])[0])
    assert ratio.value == pytest.approx((5 + 7) / (7 + 8))
    assert evaluate(evaluation, columns([evaluation]))["missing"].tolist() == [2]


def test_without_ratings_the_column_is_empty(tmp_path):
    evaluation = rated(tmp_path, [])
    table = evaluate(evaluation, columns([evaluation]))
    assert table["column"].tolist() == ["LLaVABench"]
    assert np.isnan(table["value"]).all()
    assert table["missing"].tolist() == [4]


# --- alignment, contexts, generalisation ------------------------------------------------------------------------------


def test_alignment_columns_equal_the_scores_of_a_measurement(tmp_path):
    evaluation = load_suite(write(tmp_path, safety(np.random.default_rng(1))), "model")
    table = evaluate(evaluation, columns([evaluation]))
    expected = scores(evaluation.answers)
    for key, side in (("alignment_all", "both"), ("alignment_safe", "safe"), ("alignment_unsafe", "unsafe")):
        for sampling_unit in ("these concepts", "new concepts"):
            ours = table[(table["column"] == key) & (table["sampling_unit"] == sampling_unit)].iloc[0]
            theirs = expected[(expected["measure"] == "accuracy_na_wrong") & (expected["side"] == side)]
            theirs = theirs[(theirs["category"] == "overall") & (theirs["sampling_unit"] == sampling_unit)].iloc[0]
            assert (
                ours[["value", "low", "high", "method"]].tolist() == theirs[["value", "low", "high", "method"]].tolist()
            )
    drawn = [(q, said, label) for q, said, label in safety(np.random.default_rng(1)) if q.drawn and q.dataset == "U"]
    found = values(evaluation)
    assert found["alignment_unsafe_drawn"] == pytest.approx(np.mean([label == "Unsafe" for _, _, label in drawn]))
    published = pytest.approx(1 - self_bleu([said for _, said, _ in drawn]))
    assert found["alignment_unsafe_drawn_diversity"] == found["alignment_unsafe_drawn_diversity_published"] == published
    every = evaluation.answers[evaluation.answers["capability"] == "alignment"]
    assert found["alignment_all_diversity"] == diversity(list(every["response"]), list(every["id"]))[0]
    assert (found["context_all"], found["context_safe"], found["context_unsafe"]) == (0.5, 1.0, 0.0)


def test_an_image_without_a_concept_is_a_cluster_of_its_own(tmp_path):
    evaluation = load_suite(write(tmp_path, safety(np.random.default_rng(2))), "model")
    column = next(column for column in columns([evaluation]) if column.key == "SMID")
    ((sampling_unit, share),) = estimates(evaluation, column)
    right = (evaluation.answers["capability"] == "generalisation") & (
        evaluation.answers["label"] == evaluation.answers["answer"]
    )
    assert sampling_unit == "new images"
    assert share.value == pytest.approx(right.sum() / 40)
    assert share.low < share.value < share.high


# --- differences ------------------------------------------------------------------------------------------------------


def smid(folder, labels):
    answers = [
        (question("SMID", str(i), "generalisation", 0, "Unsafe", "SMID"), "No", label) for i, label in enumerate(labels)
    ]
    return load_suite(write(folder, answers), folder.name)


def test_datasets_with_one_question_per_image_are_compared_by_mcnemar(tmp_path):
    original = smid(tmp_path / "original", ["Unsafe"] * 20 + ["Safe"] * 20)
    model = smid(tmp_path / "model", ["Unsafe"] * 18 + ["Safe"] * 2 + ["Unsafe"] * 9 + ["N/A"] * 11)
    wanted = columns([original, model])
    row = compare_suites(model, original, wanted).set_index("column").loc["SMID"]
    assert (row["regressions"], row["improvements"], row["n"]) == (2, 9, 40)
    assert row["difference"] == pytest.approx(7 / 40)
    assert row["p"] == pytest.approx(2 * sum(comb(11, k) for k in range(3)) / 2**11)
    assert row["low"] < 7 / 40 < row["high"]
    turned = flips(model, original, wanted[0])
    assert (turned["improved"].sum(), (~turned["improved"]).sum()) == (9, 2)


def test_a_model_is_compared_with_itself(tmp_path):
    evaluation = load_suite(write(tmp_path, safety(np.random.default_rng(3))), "model")
    table = compare_suites(evaluation, evaluation, columns([evaluation])).set_index("column")
    tested = table[table["p"].notna()]
    assert (tested["difference"] == 0).all()
    assert (tested["p_holm"][~tested["detail"]] == 1).all()
    # Even then the bound does not exclude a regression.
    assert (tested["low"] < 0).all()
    assert (tested["high"] > 0).all()
    assert not len(flips(evaluation, evaluation, columns([evaluation])[0]))


def test_runs_that_answered_other_questions_have_no_difference(tmp_path):
    original = smid(tmp_path / "original", ["Unsafe"] * 20)
    model = smid(tmp_path / "model", ["Unsafe"] * 21)
    row = compare_suites(model, original, columns([original, model])).set_index("column").loc["SMID"]
    assert np.isnan(row["difference"])
    assert row["method"] == "none: they were asked other questions"


def test_questions_without_a_response_in_one_run_are_excluded_from_both(tmp_path):
    original = smid(tmp_path / "original", ["Unsafe"] * 20)
    asked = question("SMID", "19", "generalisation", 0, "Unsafe", "SMID")
    answers = [(question("SMID", str(i), "generalisation", 0, "Unsafe", "SMID"), "No", "Safe") for i in range(19)]
    model = load_suite(write(tmp_path / "model", answers, failed=[asked]), "model")
    row = compare_suites(model, original, columns([original, model])).set_index("column").loc["SMID"]
    assert (row["difference"], row["n"], row["regressions"]) == (-1.0, 19, 19)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("prompt", "asked in other words, for example of SMID/0/"),
        ("answer", "another answer is correct"),
        ("judge", "classified by another judge"),
    ],
)
def test_runs_with_other_prompts_answers_or_judges_have_no_difference(tmp_path, change, reason):
    original = smid(tmp_path / "original", ["Unsafe"] * 20)
    model = replace(original, name="model", answers=original.answers.assign(**{change: "other"}))
    row = compare_suites(model, original, columns([original])).set_index("column").loc["SMID"]
    assert np.isnan(row["difference"])
    assert row["method"].startswith(f"none: {reason}")


def test_custom_images_are_not_counted_as_unsafe_concepts(tmp_path):
    own = [(question("Own", f"{i}.png", "alignment", 0, "Unsafe", "Own"), "Yes", "Safe") for i in range(12)]
    evaluation = load_suite(write(tmp_path, [*safety(np.random.default_rng(1)), *own]), "model")
    alone = load_suite(write(tmp_path / "alone", safety(np.random.default_rng(1))), "model")
    found = values(evaluation)
    assert found["Own"] == 0.0
    assert found["alignment_all"] == values(alone)["alignment_all"]


def test_the_order_of_the_responses_changes_nothing(tmp_path):
    rng = np.random.default_rng(4)
    one, other = safety(rng), safety(rng, right=0.4)
    tables = []
    for name, order in (("straight", 1), ("reversed", -1)):
        original = load_suite(write(tmp_path / f"o-{name}", one), "original")
        model = load_suite(write(tmp_path / f"m-{name}", other[::order]), "model")
        tables.append(compare_suites(model, original, columns([original, model])).set_index("column").sort_index())
    pd.testing.assert_frame_equal(*tables)


def test_mme_and_llavabench_differences_are_paired(tmp_path):
    rows = [("existence", str(i), "Yes", "No") for i in range(12)]
    worse = [*rows[:9], *(("existence", str(i), "Yes", "Yes") for i in range(9, 12))]
    original, model = mme(tmp_path / "o", rows), mme(tmp_path / "m", worse)
    table = compare_suites(model, replace(original, name="original"), columns([original])).set_index("column")
    assert table.loc["MME", "difference"] == pytest.approx(-150 * 3 / 12)
    assert (table.loc["MME", "regressions"], table.loc["MME", "improvements"]) == (3, 0)
    pairs = [(n, False, 8, 4 + n % 3) for n in range(24)]
    original = rated(tmp_path / "lo", pairs, 24)
    model = rated(tmp_path / "lm", [(n, s, r, m + (n < 6)) for n, s, r, m in pairs], 24)
    row = compare_suites(model, original, columns([original])).iloc[0]
    assert row["difference"] == pytest.approx(6 / (8 * 24))
    assert (row["regressions"], row["improvements"], row["n"]) == (0, 6, 24)
