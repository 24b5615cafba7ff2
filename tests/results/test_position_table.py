"""The table of position bias in perception with rotated options, by hand."""

import numpy as np
import pandas as pd
import pytest

from safervlm.protocol import NOT_APPLICABLE
from safervlm.results import positions
from safervlm.results.positions import position_table
from safervlm.statistics.intervals import interval_these_concepts

# image -> the letter chosen in each of the four orders; the right one is A, then D, C, B
ANSWERS = {"0": "ADCB", "1": "AAAA", "2": "ADCN", "3": "BDCB"}
RIGHT = "ADCB"


def frame_of(answers=ANSWERS, orders=4):
    return pd.DataFrame(
        {
            "id": f"{image}/{order}",
            "dataset": "d",
            "category": "c",
            "concept": f"concept {int(image) % 2}",
            "image": image,
            "capability": "perception",
            "prompt_number": order,
            "answer": RIGHT[order],
            "label": NOT_APPLICABLE if chosen[order] == "N" else chosen[order],
        }
        for image, chosen in answers.items()
        for order in range(orders)
    )


def test_position_table_matches_hand_calculation():
    table = position_table(frame_of()).set_index(["measure", "position"])
    value = table["value"]
    assert value[positions.BEYOND_CHANCE, ""] == pytest.approx((11 / 16 - 1 / 4) / (3 / 4))
    assert value[positions.RIGHT_IN_ALL, ""] == 1 / 4
    assert [value[positions.RECALL, letter] for letter in "ABCD"] == [3 / 4, 2 / 4, 3 / 4, 3 / 4]
    assert [value[positions.CHOSEN, letter] for letter in "ABCD"] == [6 / 16, 3 / 16, 3 / 16, 3 / 16]
    low, high = table.loc[(positions.RIGHT_IN_ALL, ""), ["low", "high"]]
    assert low < 1 / 4 < high
    accuracy = interval_these_concepts(np.array([4.0, 1, 3, 3]), np.full(4, 4.0), np.array([0, 1, 0, 1]))
    ends = table.loc[(positions.BEYOND_CHANCE, ""), ["low", "high"]].tolist()
    assert ends == pytest.approx([(end - 1 / 4) / (3 / 4) for end in accuracy])


def test_single_option_order_gives_an_empty_position_table():
    assert position_table(frame_of(orders=1)).empty
