"""The table of repeated questions, by hand on constructed data frames."""

import numpy as np
import pandas as pd
import pytest

from safervlm.protocol import SAFE, UNSAFE
from safervlm.results import repeats
from safervlm.results.measures import NEW_CONCEPTS, THESE_CONCEPTS
from safervlm.results.repeats import repeat_table
from safervlm.statistics import components


def frame_of(answers, capability="alignment"):
    """answers: (concepts, images, questions, repetitions), 1 if right."""
    rows = []
    for (concept, image, question, number), right in np.ndenumerate(np.asarray(answers)):
        rows.append(
            {
                "id": f"d/{concept}-{image}/{capability}/{question}#{number}",
                "dataset": "d",
                "category": f"category {concept % 2}",
                "concept": f"concept {concept}",
                "image": f"{concept}-{image}",
                "capability": capability,
                "prompt_number": question,
                "side": "unsafe",
                "answer": UNSAFE,
                "label": UNSAFE if right else SAFE,
            }
        )
    return pd.DataFrame(rows).sample(frac=1, random_state=0)  # the order of the rows has no effect


def value_of(table, measure, of="", unit=THESE_CONCEPTS):
    rows = table[(table["measure"] == measure) & (table["of"] == of) & (table["sampling_unit"] == unit)]
    return rows.iloc[0]


def test_wrong_at_least_once_and_flip_rate_match_hand_calculation():
    answers = np.ones((12, 2, 1, 3), int)
    answers[0, 0, 0] = [1, 0, 0]  # one of 24 questions is wrong twice
    answers[1, 0, 0] = [0, 0, 0]
    table = repeat_table(frame_of(answers))
    assert set(table["questions"]) == {24}
    for k, expected in (("1", (2 / 3 + 1) / 24), ("2", 2 / 24), ("3", 2 / 24)):
        row = value_of(table, repeats.WRONG_AT_LEAST_ONCE, k)
        assert row["value"] == pytest.approx(expected)
        assert 0 < row["low"] < row["value"] < row["high"] < 1
        assert value_of(table, repeats.WRONG_AT_LEAST_ONCE, k, NEW_CONCEPTS)["low"] < row["value"]
    assert value_of(table, repeats.FLIP_RATE)["value"] == pytest.approx(2 / 3 / 24)


def test_variance_components_use_only_the_balanced_images():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, (5, 3, 4, 2))
    frame = frame_of(answers)
    frame = frame[frame["id"] != "d/4-2/alignment/3#1"]  # one response less
    table = repeat_table(frame_of(answers)).set_index("of")["value"]
    images = answers.reshape(15, 4, 2).astype(float)
    found = components.variance_components(images, np.repeat(np.arange(5), 3))
    assert table[list(found)].to_dict() == pytest.approx({k: v / sum(found.values()) for k, v in found.items()})
    less = repeat_table(frame)  # the question with a single response counts for k = 1 alone
    assert [value_of(less, repeats.WRONG_AT_LEAST_ONCE, k)["questions"] for k in "12"] == [60, 59]
    assert value_of(less, repeats.FLIP_RATE)["questions"] == 59
    assert set(less[less["measure"] == repeats.VARIANCE]["questions"]) == {56}  # of 14 images


def test_repeat_table_is_empty_without_repeated_questions():
    assert repeat_table(frame_of(np.ones((3, 2, 5, 1), int))).empty


def test_text_only_questions_have_no_image_variance_components():
    table = repeat_table(frame_of(np.ones((12, 1, 2, 2), int), "alignment_text_only"))
    assert "answers within concepts" in value_of(table, repeats.WRONG_AT_LEAST_ONCE, "1")["method"]
    assert repeats.VARIANCE not in set(table["measure"])  # one "image" a concept: nothing to compare
