"""The sentences at the top of a report: which claims the intervals support."""

import numpy as np
import pytest

from safervlm.reports.findings import BY_NAME, GAP, OVER_FLAGGED, PERCEPTION, SAFE, UNSAFE, Number, Outcome, Result
from safervlm.reports.headline import NOTHING, headline, headline_note, in_no_group

NO = Number(0.5)  # without an interval
SAFER_NOW = Number(0.94, 0.88, 0.975)
BASE = Outcome("original", Number(0.26, 0.221, 0.311))


def found(key, *outcomes, unit="new concepts", corrected=False):
    return Result(key, "", "", outcomes, unit, corrected=corrected)


def ppo(low=np.nan, high=np.nan, run="ppo", value=SAFER_NOW, **more):
    return Outcome(run, value, Number((low + high) / 2, low, high), **more)


START = "ppo answers 94.0 % [88.0, 97.5] of the questions about unsafe images correctly, original 26.0 % [22.1, 31.1]"
SAFER = "ppo calls safe images unsafe in 94.0 % [88.0, 97.5] of the answers, original 26.0 % [22.1, 31.1]"
CASES = {
    "more": ([found(UNSAFE, BASE, ppo(0.613, 0.739))], [f"{START}: [61.3, 73.9] points more."]),
    "fewer": ([found(UNSAFE, BASE, ppo(-0.3, -0.1))], [f"{START}: [10.0, 30.0] points fewer."]),
    "contains 0": ([found(UNSAFE, BASE, ppo(-0.03, 0.05))], [f"{START}: no difference is shown, [-3.0, +5.0] points."]),
    "an end is 0": ([found(UNSAFE, BASE, ppo(0, 0.1))], [f"{START}: no difference is shown, [+0.0, +10.0] points."]),
    "an end is 0 as printed": (
        [found(UNSAFE, BASE, ppo(0.0004, 0.1))],
        [f"{START}: no difference is shown, [+0.0, +10.0] points."],
    ),
    "no interval of the difference": (
        [found(UNSAFE, BASE, ppo())],
        [f"{START}: without an interval of the difference (ppo)."],
    ),
    "no interval at all": (
        [found(UNSAFE, Outcome("original", NO), Outcome("ppo", NO, Number(0.0)))],
        [
            "ppo answers 50.0 % of the questions about unsafe images correctly, original 50.0 %: without an interval "
            "of the difference (ppo)."
        ],
    ),
    "not comparable": (
        [found(UNSAFE, BASE, Outcome("ppo", Number(0.94, 0.88, 0.975)))],
        [f"{START}: ppo and original are not comparable."],
    ),
    "the harm may be nothing": ([found(OVER_FLAGGED, BASE, ppo(-0.01, 0.06))], [f"{SAFER}: at most 6.0 points more."]),
    "no harm as printed": (
        [found(OVER_FLAGGED, BASE, ppo(-0.05, -0.0004))],
        [f"{SAFER}: at most 0.0 points more."],
    ),
    "harm": ([found(OVER_FLAGGED, BASE, ppo(0.01, 0.06))], [f"{SAFER}: [1.0, 6.0] points more."]),
    "less over-flagging": ([found(OVER_FLAGGED, BASE, ppo(-0.06, -0.01))], [f"{SAFER}: [1.0, 6.0] points fewer."]),
    "safe images": (
        [found(SAFE, BASE, ppo(-0.05, 0.01))],
        [START.replace("unsafe", "safe") + ": at most 5.0 points fewer."],
    ),
    "over-flagging rather than safe images": (
        [found(SAFE, BASE, ppo(-0.05, 0.01)), found(OVER_FLAGGED, BASE, ppo(-0.01, 0.06))],
        [f"{SAFER}: at most 6.0 points more."],
    ),
    "both sides": (
        [found(UNSAFE, BASE, ppo(0.613, 0.739)), found(OVER_FLAGGED, BASE, ppo(-0.01, 0.06))],
        [f"{START}: [61.3, 73.9] points more.", f"{SAFER}: at most 6.0 points more."],
    ),
    "several runs that agree": (
        [found(UNSAFE, BASE, ppo(0.6, 0.7, "sft"), ppo(0.5, 0.8, "ppo"))],
        [
            "sft answers 94.0 % [88.0, 97.5] of the questions about unsafe images correctly, ppo 94.0 % [88.0, 97.5], "
            "original 26.0 % [22.1, 31.1]: [60.0, 70.0] (sft) and [50.0, 80.0] (ppo) points more."
        ],
    ),
    "several runs that differ": (
        [found(UNSAFE, BASE, ppo(0.6, 0.7, "sft"), ppo(-0.1, 0.1, "dpo"), Outcome("kto", NO), ppo(0.5, 0.8, "ppo"))],
        [
            "sft answers 94.0 % [88.0, 97.5] of the questions about unsafe images correctly, dpo 94.0 % [88.0, 97.5], "
            "kto 50.0 %, ppo 94.0 % [88.0, 97.5], original 26.0 % [22.1, 31.1]: [60.0, 70.0] (sft) and [50.0, "
            "80.0] (ppo) points more; no difference is shown, [-10.0, +10.0] (dpo) points; kto and original are not "
            "comparable."
        ],
    ),
    "many runs": (
        [
            found(
                UNSAFE,
                BASE,
                *(ppo(0.5 + each / 10, 0.9, f"ppo-{each}", Number(0.9 + each / 100)) for each in range(4)),
                ppo(-0.1, 0.2, "sft"),
                Outcome("kto", NO),
            )
        ],
        [
            "original answers 26.0 % [22.1, 31.1] of the questions about unsafe images correctly, the 6 others 50.0 % "
            "(kto) to 94.0 % (sft): at least 50.0 points more in 4 of them; no difference is shown in sft, [-10.0, "
            "+20.0] points; kto and original are not comparable."
        ],
    ),
    "many runs that agree": (
        [found(OVER_FLAGGED, BASE, *(ppo(-0.05 - each / 100, 0.01, f"ppo-{each}") for each in range(5)))],
        [
            "original calls safe images unsafe in 26.0 % [22.1, 31.1] of the answers, the 5 others 94.0 % (ppo-0) to "
            "94.0 % (ppo-4): at most 1.0 points more in all of them."
        ],
    ),
    "many runs, of which the original was not asked": (
        [found(UNSAFE, Outcome("original", None), *(ppo(run=f"ppo-{each}") for each in range(5)))],
        [
            "ppo-0 answers 94.0 % [88.0, 97.5] of the questions about unsafe images correctly, ppo-4 94.0 % [88.0, "
            "97.5]: the lowest and the highest of 5 runs."
        ],
    ),
    "a run that was not asked": (
        [found(UNSAFE, BASE, Outcome("sft", None), ppo(0.613, 0.739))],
        [f"{START}: [61.3, 73.9] points more."],
    ),
    "the original was not asked": (
        [found(UNSAFE, Outcome("original", None), ppo())],
        [f"{START.partition(', orig')[0]}."],
    ),
    "only the original was asked": (
        [found(UNSAFE, BASE, Outcome("ppo", None))],
        ["original answers 26.0 % [22.1, 31.1] of the questions about unsafe images correctly."],
    ),
    "all N/A": (
        [found(UNSAFE, BASE, ppo(-0.31, -0.2, value=Number(0.0, 0.0, 0.05), only_na=True))],
        [
            "ppo answers 0.0 % [0.0, 5.0] (every response is N/A) of the questions about unsafe images correctly, "
            "original 26.0 % [22.1, 31.1]: [20.0, 31.0] points fewer."
        ],
    ),
    "one run": (
        [found(UNSAFE, BASE), found(OVER_FLAGGED, BASE), found(GAP, Outcome("original", Number(0.736, 0.692, 0.779)))],
        [
            "original answers 26.0 % [22.1, 31.1] of the questions about unsafe images correctly.",
            "original calls safe images unsafe in 26.0 % [22.1, 31.1] of the answers.",
            "The modality gap of original is 73.6 points [69.2, 77.9].",
        ],
    ),
    "one run without a gap": (
        [found(GAP, Outcome("original", Number(0.005, -0.082, 0.091)))],
        ["The modality gap of original is 0.5 points [-8.2, 9.1]: no gap is shown."],
    ),
    "names alone": (
        [found(BY_NAME, BASE), found(PERCEPTION, BASE)],
        ["original answers 26.0 % [22.1, 31.1] of the questions about the names of unsafe concepts correctly."],
    ),
    "perception alone": (
        [found(PERCEPTION, BASE)],
        ["original recognises what is shown in 26.0 % [22.1, 31.1] of the questions."],
    ),
    "nothing": ([], [NOTHING]),
    "another column": ([found("MM-Vet_occurs", BASE)], [NOTHING]),
    "not measured": ([found(UNSAFE, Outcome("original", None))], [NOTHING]),
}


@pytest.mark.parametrize(("findings", "said"), CASES.values(), ids=CASES)
def test_the_headline_claims_what_the_intervals_allow(findings, said):
    assert headline(findings) == said


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ([found(UNSAFE, BASE)], "95 % intervals for new concepts; not corrected for the judge's error"),
        (
            [found(UNSAFE, BASE, corrected=True)],
            "for new concepts; corrected for the judge's error with people",
        ),
        ([found(UNSAFE, BASE, corrected=True), found(SAFE, BASE)], "; partly corrected for the judge's error"),
        ([found(UNSAFE, BASE), found(SAFE, BASE, unit="these concepts")], "for new concepts or these concepts; not"),
        (
            [found(UNSAFE, BASE, ppo(), ppo())],
            "(bounds are their ends) for new concepts, each by itself; not corrected",
        ),
        ([found(UNSAFE, BASE, unit="")], "95 % intervals; not corrected"),
        ([], "95 % intervals; not corrected"),
    ],
)
def test_the_note_states_what_the_intervals_are(findings, said):
    note = headline_note(findings)
    assert said in note
    assert "without differences between training seeds" in note


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a"], "a is in no group: see the numbers of single runs."),
        (["a", "b"], "a and b are in no group: see the numbers of single runs."),
        (list("abcd"), "4 more runs are in no group: their numbers are among those of single runs."),
    ],
)
def test_runs_of_no_group_are_named(names, said):
    assert in_no_group(names) == said
