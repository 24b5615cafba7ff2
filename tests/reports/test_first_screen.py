"""The first screen of a report, for groups of training seeds."""

import pandas as pd
import pytest

from safervlm.reports.findings import Number, Outcome, Result
from safervlm.reports.first_screen import first_screen
from safervlm.results.suite_columns import GENERAL


@pytest.mark.parametrize(
    ("outcome", "groups", "bounds"),
    [
        (Outcome("ppo-1", Number(0.5)), {}, [("ppo-1", "3.0", "MM-Vet")]),
        # Of a group, the most that any of its runs may have lost.
        (Outcome("ppo over 2 seeds", Number(0.5), group="ppo"), {"ppo": ["ppo-0", "ppo-1"]}, [("ppo", "7.0", "MME")]),
    ],
)
def test_the_most_that_general_ability_may_have_lost(outcome, groups, bounds):
    differences = pd.DataFrame(
        {
            "run": ["ppo-0", "ppo-1", "ppo-1"],
            "group": GENERAL,
            "unit": "%",
            "detail": [False, False, True],
            "low": [-0.07, -0.03, -0.5],
            "heading": ["MME: all", "MM-Vet", "a task"],
        }
    )
    finding = Result("image_unsafe", "Unsafe images", "% correct", (Outcome("original", Number(0.4)), outcome))
    found = first_screen(["It is safer.", "A note."], [finding], differences, groups)
    assert [each["name"] for each in found["runs"]] == ["original", outcome.run]
    *_, tile = found["tiles"]
    assert tile["title"] == GENERAL
    assert [(row["run"], row["value"], row["ends"]) for row in tile["rows"]] == bounds
    assert [row["index"] for row in tile["rows"]] == [1]
