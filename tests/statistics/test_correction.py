"""Judge-corrected rates: against the power-tuned prediction-powered estimator, simulated truth, and by hand."""

import numpy as np
import pytest
from ppi_py import ppi_mean_pointestimate
from scipy import stats

from safervlm.statistics import correction, intervals
from safervlm.statistics.correction import Labelled


def judged(rng, responses=800, accuracy=0.9):
    right = (rng.random(responses) < 0.7).astype(float)
    wrong = rng.random(responses) > accuracy
    verdicts = np.where(wrong, 1 - right, right).astype(int)
    confidence = np.where(wrong, rng.uniform(0.5, 0.9, responses), rng.uniform(0.7, 1.0, responses))
    return right, verdicts, confidence


def labelled(right, verdicts, confidence, labels, rng):
    strata = correction.strata_of_verdicts(np.zeros(len(right), int), verdicts, confidence)
    chosen = correction.sample(strata, correction.allocation(strata, confidence, labels), rng)
    return Labelled(verdicts, strata, np.isin(np.arange(len(right)), chosen), right)


def test_verdict_strata_give_the_power_tuned_prediction_powered_estimator():
    """PPI++ with the labelled responses among the judged ones; lambda minimises the variance."""
    rng = np.random.default_rng(0)
    right, verdicts, _ = judged(rng)
    chosen = np.isin(np.arange(800), rng.choice(800, 120, replace=False))
    value = Labelled(verdicts, verdicts, chosen, right).values().mean()
    judge, people = verdicts[chosen].astype(float), right[chosen]
    tuned = np.cov(people, judge)[0, 1] / judge.var(ddof=1)
    assert value == pytest.approx(tuned * verdicts.mean() + (people - tuned * judge).mean(), abs=1e-12)
    theirs = ppi_mean_pointestimate(people, judge, verdicts.astype(float), lam=tuned)
    assert value == pytest.approx(theirs.item(), abs=1e-12)


def test_corrected_values_match_hand_calculation():
    """Two strata of four and two responses; z of the unlabelled is their stratum's share."""
    right = np.array([1.0, 0, 9, 9, 1, 9])  # 9: never labelled, so never used
    given = Labelled(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1]), right < 9, right)
    assert given.values().tolist() == [0.5 + 2 * 0.5, 0.5 - 2 * 0.5, 0.5, 0.5, 1.0, 1.0]
    assert given.values().mean() == pytest.approx((4 * 0.5 + 2 * 1.0) / 6)
    with pytest.raises(ValueError, match="no label"):
        Labelled(given.verdicts, given.strata, np.array([True, True, False, False, False, False]), right).values()


def test_corrected_rate_is_unbiased_for_an_inaccurate_judge():
    rng = np.random.default_rng(1)
    right, verdicts, confidence = judged(rng, 600, accuracy=0.6)
    found = [labelled(right, verdicts, confidence, 60, rng).values().mean() for _ in range(600)]
    assert np.mean(found) == pytest.approx(right.mean(), abs=4 * np.std(found) / 600**0.5)


def test_rate_equals_the_human_labels_when_every_response_is_labelled():
    rng = np.random.default_rng(2)
    right, verdicts, confidence = judged(rng, 300)
    given = labelled(right, verdicts, confidence, 300, rng)
    assert given.labelled.all()
    assert correction.interval_this_run(given) == (pytest.approx(right.mean()), pytest.approx(right.mean()))
    concepts = np.arange(300) % 20
    new = correction.interval_over_new_concepts(given, concepts, np.zeros(20, int), np.zeros(20, int))
    assert new == pytest.approx(intervals.interval_new_concepts(np.bincount(concepts, right), np.full(20, 15.0)))


def test_interval_of_one_verdict_by_hand():
    """A single stratum: Clopper and Pearson's interval of the labels, over the share that is not labelled."""
    right = np.repeat([1.0, 0.0], [30, 10])
    everyone = np.tile(right, 5)
    given = Labelled(np.zeros(200, int), np.zeros(200, int), np.arange(200) < 40, everyone)
    share, variance = 0.75, 0.75 * 0.25 * 40 / 39 / 40 * (1 - 40 / 200)
    size = share * (1 - share) / variance
    expected = (
        stats.beta.ppf(0.025, 0.75 * size, 0.25 * size + 1),
        stats.beta.ppf(0.975, 0.75 * size + 1, 0.25 * size),
    )
    assert correction.interval_this_run(given) == pytest.approx(expected)
    # Without an error: 40 labels of 200 responses are as good as 50 of many.
    given = Labelled(given.verdicts, given.strata, given.labelled, np.ones(200))
    assert correction.interval_this_run(given) == (pytest.approx(0.025 ** (1 / 50)), 1.0)


def test_weights_of_equal_size_change_nothing():
    rng = np.random.default_rng(3)
    given = labelled(*judged(rng), 100, rng)
    plain = correction.interval_this_run(given)
    assert correction.interval_this_run(given, np.full(800, 0.25)) == pytest.approx(plain)
    doubled = correction.interval_this_run(given, np.where(np.arange(800) % 2, 2.0, 0.5))
    assert doubled[1] - doubled[0] > plain[1] - plain[0]


def test_strata_are_verdicts_by_thirds_of_confidence_in_each_cell():
    rng = np.random.default_rng(4)
    verdicts = np.repeat([0, 1, 0], [60, 45, 30])
    cells = np.repeat([0, 0, 1], [60, 45, 30])
    confidence = rng.random(135)
    strata = correction.strata_of_verdicts(cells, verdicts, confidence)
    assert np.bincount(strata).tolist() == [20, 20, 20, 23, 22, 30]
    assert confidence[strata == 0].max() < confidence[strata == 1].min()
    assert set(strata[cells == 1]) == {5}
    assert correction.strata_of_verdicts(cells[:1], verdicts[:1], confidence[:1]).tolist() == [0]


def test_allocation_is_neymans_with_at_least_five():
    strata = np.repeat([0, 1, 2], [1000, 100, 3])
    confidence = np.repeat([0.5, 1.0, 0.9], [1000, 100, 3])
    wanted = correction.allocation(strata, confidence, 100)
    assert wanted.sum() == 100
    assert wanted[2] == 3  # all of a small stratum
    mean = (1000 * 0.5 + 100 * 0 + 3 * 0.3) / 1103
    sizes = 1000 * (0.5 + mean) / 2, 100 * mean / 2
    assert wanted[0] / wanted[1] == pytest.approx(sizes[0] / sizes[1], rel=0.2) or wanted[1] == 5
    assert correction.allocation(strata, confidence, 1).tolist() == [5, 5, 3]
    assert correction.allocation(strata, confidence, 5000).tolist() == [1000, 100, 3]


def test_a_sample_is_seeded_and_has_no_response_twice():
    strata = np.repeat([0, 1], [50, 30])
    first, again = (correction.sample(strata, np.array([10, 30]), np.random.default_rng(7)) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert len(set(first)) == 40
    assert np.bincount(strata[first]).tolist() == [10, 30]
    assert first.tolist() != sorted(first)


def test_a_difference_of_corrected_rates_corrects_both():
    """The judge misclassifies the second run; the judged difference is wrong, the corrected one is not."""
    rng = np.random.default_rng(5)
    concepts = np.arange(2000) % 40
    before = (rng.random(2000) < 0.3).astype(float)
    after = (rng.random(2000) < 0.6).astype(float)
    verdicts = (before.astype(int), np.where(rng.random(2000) < 0.6, 1, after).astype(int))
    confidence = np.full(2000, 0.95)
    held = []
    for _ in range(60):
        both = [labelled(y, v, confidence, 100, rng) for y, v in zip((before, after), verdicts, strict=True)]
        categories = np.zeros(40, int)
        new = correction.difference_new_concepts(both[1], both[0], concepts, categories, categories)
        assert new.value == pytest.approx(both[1].values().mean() - both[0].values().mean())
        ends = [correction.interval_this_run(each) for each in both]
        run = correction.difference_this_run(both[1].values().mean(), ends[1], both[0].values().mean(), ends[0])
        truth = after.mean() - before.mean()
        held.append((run.low <= truth <= run.high, new.low <= 0.3 <= new.high))
    assert verdicts[1].mean() - verdicts[0].mean() > 0.5
    assert (np.mean(held, axis=0) >= 0.9).all()


@pytest.mark.parametrize(("rate", "accuracy"), [(0.3, 0.85), (0.9, 0.95)])
def test_simulated_coverage_of_corrected_intervals(rate, accuracy):
    """A short form of scripts/coverage_labels.py."""
    rng = np.random.default_rng(6)
    concepts = np.repeat(np.arange(40), 20)
    held = []
    for _ in range(200):
        by_concept = rng.beta(rate * 6, (1 - rate) * 6, 40)
        right = (rng.random(800) < by_concept[concepts]).astype(float)
        score = stats.norm.ppf(accuracy) * (2 * right - 1) + rng.standard_normal(800)
        given = labelled(right, (score > 0).astype(int), 1 / (1 + np.exp(-2 * np.abs(score))), 100, rng)
        run = correction.interval_this_run(given)
        new = correction.interval_over_new_concepts(given, concepts, np.zeros(40, int), np.zeros(40, int))
        held.append((run[0] <= right.mean() <= run[1], new[0] <= rate <= new[1]))
    assert (np.mean(held, axis=0) >= 0.92).all(), np.mean(held, axis=0)


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ((0.45, 0.55), (0.4, 0.6)),  # no labelled response contradicted the judge: no variance between concepts
        ((0.3, 0.8), (0.3, 0.8)),
        ((0.45, 0.8), (0.4, 0.8)),
        ((np.nan, np.nan), (np.nan, np.nan)),  # too few concepts
    ],
)
def test_interval_for_new_concepts_contains_the_interval_of_the_run(new, expected):
    assert correction.at_least((0.4, 0.6), new) == pytest.approx(expected, nan_ok=True)
