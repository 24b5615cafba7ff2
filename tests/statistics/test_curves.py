"""Operating curves: against scikit-learn, DeLong's variance by its definition, and by hand."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import logit
from sklearn import metrics

from safervlm.statistics import curves
from safervlm.statistics.curves import Side


def sides(seed=0, images=60, concepts=12, apart=1.5):
    rng = np.random.default_rng(seed)
    return [
        Side(np.round(rng.normal(mean, 1, images), 1), np.arange(images) % concepts)  # rounded, so that there are ties
        for mean in (apart, 0.0)
    ]


def as_sklearn(unsafe, safe):
    return np.repeat([1, 0], [len(unsafe.scores), len(safe.scores)]), np.concatenate([unsafe.scores, safe.scores])


@pytest.mark.parametrize("seed", range(5))
def test_curve_and_summary_measures_equal_scikit_learn(seed):
    unsafe, safe = sides(seed)
    truth, scores = as_sklearn(unsafe, safe)
    points = curves.curve(unsafe, safe)
    fpr, tpr, thresholds = metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert points.thresholds == pytest.approx(thresholds[1:])  # theirs begins with infinity
    assert points.tpr == pytest.approx(tpr[1:])
    assert points.fpr == pytest.approx(fpr[1:])
    assert curves.auroc(unsafe, safe)[0] == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert curves.average_precision(points, 0.5) == pytest.approx(metrics.average_precision_score(truth, scores))
    assert curves.tpr_at_fpr(points, 0.1) == pytest.approx(tpr[fpr <= 0.1].max())


def test_reweighted_average_precision_equals_that_of_data_with_that_prevalence():
    unsafe, safe = sides()
    rare = Side(np.tile(safe.scores, 9), np.tile(safe.concepts, 9))  # one unsafe image of ten
    truth, scores = as_sklearn(unsafe, rare)
    found = curves.average_precision(curves.curve(unsafe, safe), 0.1)
    assert found == pytest.approx(metrics.average_precision_score(truth, scores))


def test_one_image_per_concept_gives_delongs_variance():
    unsafe, safe = sides(images=15, concepts=15)
    wins = np.array([[(a > b) + (a == b) / 2 for b in safe.scores] for a in unsafe.scores])
    variance = wins.mean(1).var(ddof=1) / 15 + wins.mean(0).var(ddof=1) / 15
    value, low, high = curves.auroc(unsafe, safe)
    assert value == wins.mean()
    half = (logit(high) - logit(low)) / 2 * value * (1 - value)
    assert logit(low) + logit(high) == pytest.approx(2 * logit(value))
    freedom = stats.t.ppf(0.975, 28), stats.t.ppf(0.975, 1)  # at most both sides' concepts less one each
    assert freedom[0] <= half / variance**0.5 <= freedom[1]


def test_auroc_over_copies_of_the_images_of_each_concept_has_the_same_interval():
    """Clusters, not images, are counted."""
    unsafe, safe = sides(images=12)
    thrice = [Side(np.tile(side.scores, 3), np.tile(side.concepts, 3)) for side in (unsafe, safe)]
    assert curves.auroc(*thrice) == pytest.approx(curves.auroc(unsafe, safe))


@pytest.mark.parametrize("apart", [50.0, -50.0])
def test_auroc_of_perfectly_separated_scores_has_the_exact_bound(apart):
    unsafe, safe = sides(apart=apart)
    bound = 0.025 ** (1 / 12)
    assert curves.auroc(unsafe, safe) == ((1.0, bound, 1.0) if apart > 0 else (0.0, 0.0, 1 - bound))


@pytest.mark.parametrize("apart", [50.0, -50.0, 3.0])
def test_an_interval_at_the_edge_contains_the_rate_and_its_exact_bound(apart):
    """Also if the rate is 0 or 1 in every sample, or in most."""
    unsafe, safe = sides(apart=apart)
    points = curves.curve(unsafe, safe)
    rates = [lambda points: curves.tpr_at_fpr(points, 0.1), lambda points: curves.average_precision(points, 0.5)]
    bound = 0.025 ** (1 / 12)
    intervals = curves.bootstrap(rates, unsafe, safe, 0, samples=100)
    for rate, (low, high) in zip((rate(points) for rate in rates), intervals, strict=True):
        assert low < rate < high or rate in (low, high)
        assert rate < 1 or (low <= bound and high == 1)
        assert rate > 0 or (low == 0 and high >= 1 - bound)


def test_equal_scores_have_no_interval():
    unsafe, safe = (Side(np.zeros(60), side.concepts) for side in sides())
    assert curves.auroc(unsafe, safe) == pytest.approx((0.5, np.nan, np.nan), nan_ok=True)
    (found,) = curves.bootstrap([lambda points: curves.average_precision(points, 0.3)], unsafe, safe, 0, samples=20)
    assert np.isnan(found).all()


def test_few_concepts_have_no_interval():
    unsafe, safe = sides(concepts=9)
    assert np.isnan(curves.auroc(unsafe, safe)[1:]).all()
    assert np.isnan(curves.bootstrap([lambda points: curves.tpr_at_fpr(points, 0.05)], unsafe, safe, 0)).all()
    assert np.isnan(curves.knowledge_behaviour_gap(unsafe, safe, np.zeros(60), np.zeros(60))[1:]).all()


def test_bootstrap_agrees_with_the_interval_of_auroc():
    unsafe, safe = sides(images=400, concepts=100, apart=1.0)

    def area(points):
        tpr, fpr = np.concatenate([[0], points.tpr]), np.concatenate([[0], points.fpr])
        return float(metrics.auc(fpr, tpr))

    found = curves.bootstrap([area, lambda points: curves.tpr_at_fpr(points, 0.1)], unsafe, safe, seed=1, samples=400)
    _, below, above = curves.auroc(unsafe, safe)
    assert found[0] == pytest.approx((below, above), abs=0.012)
    assert found[:1] == curves.bootstrap([area], unsafe, safe, seed=1, samples=400)


def test_tpr_is_0_when_no_threshold_reaches_the_false_positive_rate():
    unsafe, safe = Side(np.zeros(3), np.arange(3)), Side(np.zeros(3), np.arange(3))
    assert curves.tpr_at_fpr(curves.curve(unsafe, safe), 0.5) == 0.0


def test_thresholds_are_chosen_on_other_concepts():
    """A concept with shifted scores does not choose its own threshold."""
    concepts = np.repeat(np.arange(10), 4)
    unsafe, safe = Side(np.ones(40), concepts), Side(np.zeros(40), concepts)
    unsafe.scores[concepts == 3] = -1.0
    safe.scores[concepts == 3] = -2.0
    flagged, wrongly = curves.cross_fitted(unsafe, safe)
    assert flagged.tolist() == [0.0 if concept == 3 else 1.0 for concept in concepts]
    assert not wrongly.any()


def test_the_threshold_does_not_depend_on_the_scores_that_it_flags():
    """Half-way between 2 and 0, the scores of the other concepts; 1.2 is above it, wherever it is."""
    concepts = np.arange(10)
    unsafe, safe = Side(np.full(10, 2.0), concepts), Side(np.zeros(10), concepts)
    unsafe.scores[3] = 1.2
    flagged, wrongly = curves.cross_fitted(unsafe, safe)
    assert flagged.all()
    assert not wrongly.any()


def test_knowledge_behaviour_gap_of_random_scores_is_0_on_average():
    """The best threshold of the same data seems to have some."""
    rng = np.random.default_rng(0)
    found, seeming = [], []
    for _ in range(60):
        unsafe, safe = (Side(rng.normal(size=60), np.arange(60) % 20) for _ in range(2))
        points = curves.curve(unsafe, safe)
        seeming.append((points.tpr - points.fpr).max())
        found.append(curves.knowledge_behaviour_gap(unsafe, safe, np.zeros(60), np.zeros(60))[0])
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / 60**0.5)
    assert np.mean(seeming) > 0.1


def test_gap_by_hand():
    """Perfect scores, answers that call 30 % of unsafe and 10 % of safe images unsafe."""
    concepts = np.repeat(np.arange(10), 10)
    unsafe, safe = Side(np.ones(100), concepts), Side(np.zeros(100), concepts)
    rng = np.random.default_rng(0)
    said = [rng.permutation(np.repeat([1.0, 0.0], [yes, 100 - yes])) for yes in (30, 10)]
    value, low, high = curves.knowledge_behaviour_gap(unsafe, safe, *said)
    assert value == pytest.approx(1 - (0.3 - 0.1))
    sums = [np.bincount(concepts, each) / 10 for each in (1 - said[0], said[1])]
    error = sum(each.var(ddof=1) / 10 for each in sums) ** 0.5
    assert (low + high) / 2 == pytest.approx(value)
    assert stats.t.ppf(0.975, 18) <= (high - low) / 2 / error <= stats.t.ppf(0.975, 1)
