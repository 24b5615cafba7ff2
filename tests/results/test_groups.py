"""Groups of runs: their values equal safervlm.statistics.seeds on counts made in this module."""

import numpy as np
import pandas as pd
import pytest

from safervlm.protocol import SAFE, UNSAFE
from safervlm.results.groups import group_differences, group_table
from safervlm.statistics import seeds
from safervlm.statistics.intervals import strata_of

CONCEPTS, IMAGES = 12, 4


def run(right, side="unsafe"):
    """right: (concepts, images)."""
    answer, other = (UNSAFE, SAFE) if side == "unsafe" else (SAFE, UNSAFE)
    rows = [
        {
            "id": f"{side}/{concept}-{image}",
            "dataset": side,
            "category": f"category {concept // 3}",
            "concept": f"concept {concept:02}",
            "capability": "alignment",
            "side": side,
            "answer": answer,
            "label": answer if hit else other,
            "prompt": "Is it safe?",
            "judge": "a judge",
        }
        for (concept, image), hit in np.ndenumerate(np.asarray(right))
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=len(rows))


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2, (CONCEPTS, IMAGES)) for _ in range(6)]


ANSWERS = np.full(CONCEPTS, float(IMAGES))
STRATA = strata_of(np.zeros(CONCEPTS, int), np.arange(CONCEPTS) // 3)


def numbers(row):
    return tuple(row[["value", "low", "high", "deviation"]].astype(float))


def test_means_over_seeds(runs):
    table = group_table({"a": [run(each) for each in runs[:4]], "b": [run(each) for each in runs[4:]]})
    assert list(table["group"]) == ["a", "b"]
    first = table.iloc[0]
    expected = seeds.share_over_seeds(np.array([each.sum(1) for each in runs[:4]], float), ANSWERS, STRATA)
    assert numbers(first) == pytest.approx((expected.value, expected.low, expected.high, expected.deviation))
    assert (first["smallest"], first["largest"]) == (min(e.mean() for e in runs[:4]), max(e.mean() for e in runs[:4]))
    assert (first["measure"], first["seeds"], first["method"]) == ("image_unsafe", 4, seeds.OVER_SEEDS)
    assert np.isnan(table.iloc[1]["low"])
    assert table.iloc[1]["method"] == "none: fewer than 3 training seeds"


def test_over_flagging_is_one_minus_accuracy_on_safe_images(runs):
    table = group_table({"a": [run(each, "safe") for each in runs[:3]]}).set_index("measure")["value"]
    assert table["over_flagging"] == pytest.approx(1 - table["image_safe"])


def test_group_differences_equal_the_seed_statistics(runs):
    frames = [run(each) for each in runs]
    sums = np.array([each.sum(1) for each in runs], float)
    ours = group_differences({"original": frames[:1], "ppo": frames[1:4]}).iloc[0]
    expected = seeds.difference_over_seeds(sums[1:4] - sums[:1], ANSWERS, STRATA)
    assert (ours["group"], ours["base"]) == ("ppo", "original")
    assert numbers(ours) == pytest.approx((expected.value, expected.low, expected.high, expected.deviation))
    turned = group_differences({"ppo": frames[1:4], "original": frames[:1]}).iloc[0]
    assert numbers(turned) == pytest.approx((-expected.value, -expected.high, -expected.low, expected.deviation))
    both = group_differences({"sft": frames[:3], "ppo": frames[3:]}).iloc[0]
    expected = seeds.difference_of_groups(sums[3:], sums[:3], ANSWERS, STRATA)
    assert numbers(both) == pytest.approx((expected.value, expected.low, expected.high, expected.deviation))


def test_only_questions_that_all_runs_answered_count(runs):
    frames = [run(each) for each in runs[:3]]
    without = frames[0][frames[0]["id"] != "unsafe/0-0"]
    table = group_table({"a": [without, *frames[1:]]})
    assert table.iloc[0]["value"] == pytest.approx(
        np.mean([(each.sum() - each[0, 0]) / (each.size - 1) for each in runs[:3]])
    )


def test_questions_with_equal_ids_but_other_content_are_excluded(runs):
    """Runs of other data with equal ids: another prompt, correct answer or concept."""
    frames = [run(each) for each in runs[:3]]
    first = frames[0]["concept"] == "concept 00"
    expected = group_table({"a": [each[each["concept"] != "concept 00"] for each in frames]})
    for column, value in (("prompt", "Is it unsafe?"), ("answer", SAFE), ("concept", "another"), ("category", "other")):
        changed = frames[0].assign(**{column: frames[0][column].where(~first, value)})
        found = group_table({"a": [changed, *frames[1:]]})
        assert list(found["left_out"]) == [IMAGES]
        pd.testing.assert_frame_equal(found.assign(left_out=0), expected)


def test_runs_of_two_judges_are_neither_averaged_nor_compared(runs):
    frames = [run(each) for each in runs]
    other = [each.assign(judge="another") for each in frames[3:]]
    assert group_table({"a": [*frames[:2], other[0]]}).empty
    assert len(group_table({"a": frames[:3], "b": other})) == 2
    assert group_differences({"a": frames[:3], "b": other}).empty
