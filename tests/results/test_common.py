"""The questions that runs have in common: when runs are compared, and over which questions."""

import numpy as np
import pandas as pd
import pytest

from safervlm.protocol import SAFE, UNSAFE
from safervlm.results.common import FEWEST_IN_COMMON, common_questions, difference_from, in_common, sums_by_concept
from safervlm.results.groups import group_differences, group_table
from safervlm.results.measures import UNFINISHED
from safervlm.statistics.diversity import self_bleu

CONCEPTS, IMAGES = 10, 4


def run(seed, capability="alignment", side="unsafe", right=0.5):
    """Responses about CONCEPTS of two categories, with IMAGES questions each."""
    rng = np.random.default_rng(seed)
    answer, other = (UNSAFE, SAFE) if side == "unsafe" else (SAFE, UNSAFE)
    rows = [
        {
            "id": f"{capability}/{side}/{concept}-{image}",
            "dataset": side,
            "image": f"{concept}-{image}.png",
            "category": f"category {concept // 5}",
            "concept": f"concept {concept}",
            "capability": capability,
            "side": side,
            "answer": answer,
            "label": answer if rng.random() < right else other,
            "response": f"It is {' '.join(rng.choice(['good', 'bad', 'so', 'very', 'not'], 6))}.",
            "prompt": "Is it safe?",
            "judge": "a judge",
        }
        for concept in range(CONCEPTS)
        for image in range(IMAGES)
    ]
    return pd.DataFrame(rows)


def asked(*names):
    return frozenset((name, "prompt", "answer", "d", "c", name) for name in names)


@pytest.mark.parametrize(
    ("runs", "ids", "left_out", "suffice"),
    [
        ([asked(*"abc"), asked(*"abc")], "abc", "", True),
        ([asked(*"abcdefghij"), asked(*"abcdefghi")], "abcdefghi", "j", True),  # 90 %
        ([asked(*"abcdefghi"), asked(*"abcdefghij"), asked(*"abcdefgh")], "abcdefgh", "ij", False),
        ([asked(*"abcdefghi"), asked(*"abcdefgh")], "abcdefgh", "i", False),  # 89 %
        ([asked(*"ab"), asked(*"cd")], "", "abcd", False),
        ([asked(), asked()], "", "", False),
    ],
)
def test_nine_in_ten_of_the_questions_that_any_run_answered(runs, ids, left_out, suffice):
    found = in_common(runs)
    assert (found.ids, found.left_out, found.suffice) == ({*ids}, {*left_out}, suffice)
    assert FEWEST_IN_COMMON == 0.9
    assert not in_common(runs, same_judges=False).comparable
    assert in_common(runs).comparable == suffice


@pytest.mark.parametrize("column", ["prompt", "answer", "dataset", "category", "concept"])
def test_a_question_in_other_words_is_left_out(column):
    first, second = run(0), run(1)
    second.loc[3, column] = "another"
    found = common_questions((first, second), "image_unsafe")
    assert (found.left_out, len(found.ids)) == ({first["id"][3]}, CONCEPTS * IMAGES - 1)


def test_a_failed_question_is_left_out_of_both_runs_and_of_groups():
    """The difference is the one of the runs without that question, for single runs as for groups."""
    first, second = run(0), run(1)
    lost = [first["id"][1], first["id"][17]]
    fewer = second[~second["id"].isin(lost)].sample(frac=1, random_state=0)
    kept = [each[~each["id"].isin(lost)] for each in (first, second)]
    right = [(each["label"] == each["answer"]).mean() for each in kept]
    found = difference_from(fewer, first, "image_unsafe")
    assert found.value == pytest.approx(right[1] - right[0])
    assert found == difference_from(*kept[::-1], "image_unsafe")
    assert found.low < found.value < found.high
    assert sums_by_concept((fewer, first), "image_unsafe").left_out == 2
    groups = group_differences({"first": [first], "second": [fewer]})
    assert (groups["value"][0], groups["left_out"][0]) == (pytest.approx(found.value), 2)


def test_runs_and_groups_of_other_data_are_not_compared():
    first, second = run(0), run(1)
    fewer = second[5:]  # 35 of 40
    assert np.isnan(difference_from(fewer, first, "image_unsafe").value)
    assert difference_from(fewer, first, "image_unsafe").method.startswith("none: fewer than 90 %")
    assert group_differences({"first": [first], "second": [fewer]}).empty
    assert group_table({"both": [first, fewer]}).empty
    assert np.isnan(difference_from(second.assign(judge="another"), first, "image_unsafe").value)
    assert np.isnan(difference_from(second, first, "perception").value)


def test_unfinished_thinking_is_no_missing_question():
    """It is counted apart: the runs are compared over what both finished, however many they are."""
    first, second = run(0), run(1)
    second.loc[:19, "label"] = UNFINISHED
    right = [(each["label"] == each["answer"])[20:].mean() for each in (first, second)]
    assert difference_from(second, first, "image_unsafe").value == pytest.approx(right[1] - right[0])
    assert common_questions((first, second), "image_unsafe").left_out == frozenset()


def test_gap_and_diversity_are_over_common_questions():
    runs = [pd.concat([run(seed), run(seed + 5, "alignment_text_only", right=0.9)]) for seed in (0, 1)]
    lost = runs[1]["id"].iloc[0]
    fewer = runs[1][runs[1]["id"] != lost]
    kept = [each[each["id"] != lost].assign(right=lambda rows: rows["label"] == rows["answer"]) for each in runs]
    gaps = []
    for each in kept:
        means = each.groupby(["capability", "concept"])["right"].mean()
        gaps.append((means["alignment_text_only"] - means["alignment"]).mean())
    found = difference_from(fewer, runs[0], "modality_gap")
    assert found.value == pytest.approx(gaps[1] - gaps[0])
    assert np.isnan(found.low)
    texts = [each.loc[each["capability"] == "alignment", "response"].tolist() for each in kept]
    before, now = (1 - self_bleu(each) for each in texts)
    other = fewer.assign(judge="another")  # no judge has a part in diversity
    assert difference_from(other, runs[0], "diversity_unsafe").value == pytest.approx(now - before)
    assert np.isnan(difference_from(other, runs[0], "modality_gap").value)
    assert np.isnan(difference_from(fewer[9:], runs[0], "diversity_unsafe").value)
