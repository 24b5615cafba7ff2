"""95 % intervals for clustered responses: over new images of the same concepts or tasks, or over new concepts.

Their coverage is simulated on the datasets' clusters: ``scripts/coverage.py``, docs/intervals.md, and :func:`coverage`
for table captions. Differences between runs: :mod:`safervlm.statistics.differences`.
"""

import csv
from functools import cache
from importlib.resources import files
from math import ceil, floor
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

FEWEST_CONCEPTS = 10  # minimum number of concepts for an interval over new concepts; also of images of a task

# Names of interval methods, for table captions; :func:`coverage` also has those of ``safervlm.results.measures``.
BY_TASK = "stratified t (Price-Bonett), images within tasks"
BY_IMAGE = "Wilson, effective number of images"
SHARE_BY_IMAGE = "Korn-Graubard, images"
RATIO_BY_IMAGE = "t, images (CR2)"

# Files of simulated coverages, each of the script of its name in scripts/.
COVERAGES = ("coverage.csv", "coverage_curves.csv", "coverage_seeds.csv", "coverage_labels.csv")
# Simulation in which few concepts make the errors, see :func:`coverage`.
SKEWED = "skewed concepts"

NORMAL = float(stdtrit(np.inf, 0.975))
# Intra-cluster correlation that is assumed if all responses are right, or all wrong, so that it can't be estimated.
ASSUMED_CORRELATION = 0.5

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.integer]


def effective_interval(
    share: float, variance: float, freedom: float, least: float, most: float, edge: float
) -> tuple[float, float]:
    """Korn and Graubard's 95 % interval of a proportion from a clustered sample.

    The effective sample size is ``share (1 - share) / variance``, multiplied by the squared ratio of the normal to the
    t quantile because the variance is itself an estimate. Clopper and Pearson's exact interval is computed for this
    size.

    Args:
        share: The proportion, 0 to 1.
        variance: The estimated variance of ``share``. A value of 0 is not used, as the clusters may be alike by chance.
        freedom: The degrees of freedom of ``variance``; 0 if it can't be estimated.
        least: Lower bound of the effective size, :func:`effective_clusters`: as if all responses of a cluster were the
            same. It is used if the variance is uninformative (no degrees of freedom). The interval is still valid then:
            the variance of clusters of equal size is at most that of this binomial (Hoeffding 1956).
        most: Upper bound of the effective size.
        edge: The effective size at a share of 0 or 1, :func:`size_if_all_alike`.

    Returns:
        Lower and upper end.
    """
    size = least if 0 < share < 1 else edge
    if 0 < share < 1 and freedom > 0 and variance > 1e-15:
        shrink = float(NORMAL / stdtrit(freedom, 0.975)) ** 2
        size = min(max(share * (1 - share) / variance * shrink, least), most)
    return exact_interval(share, size)


def exact_interval(share: float, size: float) -> tuple[float, float]:
    """Computes Clopper and Pearson's 95 % interval (1934, Biometrika 26) of a share of independent responses.

    Args:
        share: The share, 0 to 1.
        size: Number of responses; may be an effective number, with a fraction.

    Returns:
        Lower and upper end.
    """
    right = share * size
    low = float(betaincinv(right, size - right + 1, 0.025)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, size - right, 0.975)) if right < size else 1.0
    return low, high


def effective_clusters(answers: Floats) -> float:
    """Returns the number of clusters of equal size with the same information, ``(sum n)^2 / sum n^2``.

    Args:
        answers: (clusters,) number of responses n of each.
    """
    return float(answers.sum() ** 2 / (answers**2).sum())


def size_if_all_alike(answers: Floats) -> float:
    """Returns the effective number of responses if all are right or all are wrong.

    The intra-cluster correlation can't be estimated then and is assumed to be r = .5: ``N / (1 + (m - 1) r)`` with the
    mean cluster size ``m = sum n^2 / sum n`` (Kish 1965, Survey Sampling). With r = 1 it would be
    :func:`effective_clusters`, by which 100 % has a much longer interval than 98 %. The cost: if the responses of each
    cluster were always the same, a bound would be exceeded in more than 2.5 % of the samples without an error, for 26
    concepts of 4 images in 10 %.

    Args:
        answers: (clusters,) number of responses n of each.
    """
    total = answers.sum()
    return float(total / (1 + ((answers**2).sum() / total - 1) * ASSUMED_CORRELATION))


def strata_of(*labels: npt.NDArray[Any]) -> Numbers:
    """Returns the strata within which concepts are sampled: the categories of each dataset.

    The categories of a dataset are fixed: new concepts would belong to the same ones. A category with a single concept
    has no variance, so all such categories form one stratum. If there is only one, it joins the dataset's smallest
    other category (the first of several). Both make the variance too large rather than too small, by the differences
    between the categories that are pooled.

    Args:
        *labels: (concepts,) arrays: the dataset of each concept, and its category.

    Returns:
        (concepts,) the stratum of each, as a number from 0 without gaps. A dataset with a single concept is a stratum
        of one.
    """
    datasets, categories = (np.unique(each, return_inverse=True)[1] for each in labels)
    strata = np.unique(datasets * (categories.max(initial=0) + 1) + categories, return_inverse=True)[1]
    for dataset in range(int(datasets.max(initial=-1)) + 1):
        own = np.flatnonzero(datasets == dataset)
        names, counts = np.unique(strata[own], return_counts=True)
        single = names[counts == 1]
        pooled = single[:1] if len(single) > 1 else names[counts > 1][np.argsort(counts[counts > 1], kind="stable")][:1]
        if len(single) and len(pooled):
            strata[own[np.isin(strata[own], single)]] = pooled[0]
    return np.unique(strata, return_inverse=True)[1]


def effective_freedom(squares: Floats, last: float | None = None) -> float:
    """Satterthwaite's degrees of freedom of a sum of squares, estimated from the squares themselves.

    ``2 (sum s)^2 / sum s^2 - 1``: 1 if a single cluster contributes all the variance, 3 if two do, so intervals remain
    valid if a few concepts account for all errors. It lies half-way between two estimators. Satterthwaite's plain ratio
    is a third of the true value for normal clusters, as every square is estimated with one degree of freedom; its
    intervals have coverage .96 to 1. The ratio without that bias, ``3 (sum s)^2 / sum s^2 - 2`` (von Davier 2025, An
    improved Satterthwaite effective degrees of freedom estimator, arXiv 2503.22080; by simulation Johnson and Rust
    1992, Journal of Educational Statistics 17), yields intervals of shares near 1 with coverage .91.

    Args:
        squares: (clusters,) each cluster's contribution to the variance, not negative.
        last: Upper bound of the degrees of freedom; None is the number of clusters less one.
    """
    last = float(len(squares) - 1) if last is None else float(last)
    total = squares.sum()
    return float(min(2 * total**2 / (squares**2).sum() - 1, last)) if total > 0 else last


def freedom_within(squares: Floats, strata: Numbers | None = None) -> float:
    """Degrees of freedom of a sum of squares that are deviations from the means of strata.

    A cluster that deviates alone also makes the others of its stratum deviate from their common mean. In a small
    stratum these count as if further clusters contributed to the variance: a single deviating one of n has
    ``(sum s)^2 / sum s^2 = n^2 (n - 1) / ((n - 1)^3 + 1)``, 1.26 for n = 9. So the squares s^2 are multiplied by this
    ratio of their stratum, which restores one degree of freedom for a single deviating cluster, see
    :func:`effective_freedom`. Without it, the coverage for rates near 1 is up to .02 lower.

    Args:
        squares: (clusters,) each cluster's contribution to the variance, from :func:`ratio_squares`.
        strata: (clusters,) the stratum of each, as a number from 0 without gaps; None is a single stratum.

    Returns:
        At most the number of clusters less that of strata.
    """
    strata = np.zeros(len(squares), int) if strata is None else strata
    sizes = np.bincount(strata)[strata].astype(np.float64)
    spread = sizes**2 * np.maximum(sizes - 1, 1) / ((sizes - 1) ** 3 + 1)  # a stratum of one contributes 0
    last = float(len(strata) - int(strata.max(initial=-1)) - 1)
    total = squares.sum()
    return float(min(2 * total**2 / (squares**2 * spread).sum() - 1, last)) if total > 0 else last


def ratio_squares(numerators: Floats, denominators: Floats, strata: Numbers | None = None) -> Floats:
    """Returns each cluster's contribution to the linearised variance of ``sum(numerators) / sum(denominators)``.

    It is Bell and McCaffrey's CR2 (2002, Survey Methodology 28) of a mean: each squared residual is divided by one
    minus the cluster's share in the denominator of its stratum.

    Args:
        numerators: (clusters,) the sum over each cluster.
        denominators: (clusters,) the sum over each cluster, positive.
        strata: (clusters,) the stratum of each, as a number from 0 without gaps, if new clusters are sampled within
            strata (:func:`strata_of`); None is a single stratum. A stratum of one cluster contributes 0, as its
            variance can't be estimated.

    Returns:
        (clusters,) contributions, which sum to the variance.
    """
    if strata is None:
        strata = np.zeros(len(denominators), int)
    above, below = np.bincount(strata, numerators), np.bincount(strata, denominators)
    residuals = numerators - (above / below)[strata] * denominators
    alone = np.bincount(strata)[strata] == 1
    shares = np.where(alone, 0.0, denominators / below[strata])
    return residuals**2 / (1 - shares) / denominators.sum() ** 2


def interval_these_concepts(right: Floats, answers: Floats, concepts: Numbers) -> tuple[float, float]:
    """Computes the 95 % interval of ``sum(right) / sum(answers)`` over new images of the same concepts.

    The variance is the linearised variance of a ratio, stratified by concept and clustered by image. Concepts with a
    single image share one (collapsed) stratum, which makes their variance too large rather than too small. If concepts
    differ, the variance is smaller than that of independent responses, by the factor 1 - r for an intra-concept
    correlation of r. The factor is limited to at least one half.

    Args:
        right: (images,) number of right responses to each image (or to each question about a name).
        answers: (images,) number of responses to each image, at least 1.
        concepts: (images,) the concept of each, as a number from 0.

    Returns:
        Lower and upper end.
    """
    share = right.sum() / answers.sum()
    residuals = (right - share * answers) / answers.sum()
    images = np.bincount(concepts)
    singles = len(images)  # index of the stratum of all concepts with one image
    strata = np.where(images[concepts] == 1, singles, concepts)
    images = np.bincount(strata, minlength=singles + 1)
    means = np.bincount(strata, residuals, singles + 1) / np.maximum(images, 1)
    if images[singles] == 1:
        means[singles] = 0.0  # a stratum of one image: residual from the overall mean, again too large a variance
    squares = (residuals - means[strata]) ** 2 * images[strata] / np.maximum(images[strata] - 1, 1)
    freedom = effective_freedom(squares, np.maximum(images - 1, 0).sum())
    least, edge = effective_clusters(answers), size_if_all_alike(answers)
    return effective_interval(share, squares.sum(), freedom, least, 2 * answers.sum(), edge)


def interval_new_concepts(
    right: Floats, answers: Floats, datasets: Numbers | None = None, categories: Numbers | None = None
) -> tuple[float, float] | None:
    """Computes the 95 % interval of ``sum(right) / sum(answers)`` over new concepts of the same categories.

    The variance is CR2's within categories (:func:`ratio_squares`, :func:`strata_of`): the categories are fixed,
    so a difference between them is not uncertainty. The effective size is at most the number of responses,
    as if they were independent. With several datasets an interval is computed for each, and their distances from the
    shares are added like standard errors (MOVER: Zou and Donner 2008, Construction of confidence limits about effect
    measures, Statistics in Medicine 27).

    Args:
        right: (concepts,) number of right responses about each concept.
        answers: (concepts,) number of responses about each concept, at least 1.
        datasets: (concepts,) the dataset of each (unsafe or safe), as a number from 0 without gaps; None is one.
        categories: (concepts,) the category of each, as a number; None is a single category.

    Returns:
        Lower and upper end; None if a dataset has fewer than 10 concepts.
    """
    none = np.zeros(len(answers), int)
    categories = none if categories is None else categories
    if datasets is not None and datasets.any():
        share, squares = float(right.sum() / answers.sum()), np.zeros(2)
        for dataset in range(int(datasets.max()) + 1):
            own = datasets == dataset
            interval = interval_new_concepts(right[own], answers[own], categories=categories[own])
            if interval is None:
                return None
            weight, value = answers[own].sum() / answers.sum(), right[own].sum() / answers[own].sum()
            squares += (weight * (np.array(interval) - value)) ** 2
        below, above = np.sqrt(squares)
        return share - float(below), share + float(above)
    if len(answers) < FEWEST_CONCEPTS:
        return None
    strata = strata_of(none, categories)
    total, squares = answers.sum(), ratio_squares(right, answers, strata)
    freedom = freedom_within(squares, strata)
    least, edge = effective_clusters(answers), size_if_all_alike(answers)
    return effective_interval(right.sum() / total, squares.sum(), freedom, least, total, edge)


def interval_ratio(numerators: Floats, denominators: Floats, clusters: Numbers) -> tuple[float, float] | None:
    """Computes the 95 % t interval of ``sum(numerators) / sum(denominators)`` over new clusters.

    Args:
        numerators: (questions,) for example the model's ratings of questions about images.
        denominators: (questions,) for example the reference's ratings, positive.
        clusters: (questions,) the cluster of each, for example its image, as a number from 0 without gaps.

    Returns:
        Lower and upper end; None for fewer than 10 clusters, or if all have the same ratio.
    """
    above, below = (np.bincount(clusters, x).astype(np.float64) for x in (numerators, denominators))
    if len(below) < FEWEST_CONCEPTS:
        return None
    squares = ratio_squares(above, below)
    if squares.sum() < 1e-15:
        return None
    return t_interval(float(above.sum() / below.sum()), squares.sum(), freedom_within(squares))


def interval_sum_of_means(
    values: Floats, strata: Numbers, least: float = 0.0, most: float = 200.0
) -> tuple[float, float] | None:
    """Computes the 95 % interval of the sum over strata of the mean of their values, over new images of the same tasks.

    With several strata it is Price and Bonett's interval of a sum of proportions (2004, An improved confidence interval
    for a linear function of binomial proportions, Computational Statistics and Data Analysis 45), generalised to
    bounded values: 2/k pseudo-images at the least value and 2/k at the greatest are added to each of k strata, so a
    stratum of equal values has a variance, too (:func:`smoothed_sum`). With one stratum it is Wilson's interval (1927)
    of the effective number of images, which is at most four times the actual number (a rarer value may not have been
    sampled).

    Args:
        values: (images,) each from ``least`` to ``most``. For MME: the percentage of right responses to the image's two
            questions, plus 100 if both are right.
        strata: (images,) the task of each, as a number from 0 without gaps.
        least: The least possible value.
        most: The greatest possible value.

    Returns:
        Lower and upper end; None if a stratum has fewer than 10 images.
    """
    images = np.bincount(strata)
    if images.min() < FEWEST_CONCEPTS:
        return None
    value = float((np.bincount(strata, values) / images).sum())
    if len(images) > 1:
        centre, variance, freedom = smoothed_sum(values, strata, least, most, 2 / len(images))
        low, high = t_interval(centre, variance, freedom)
        return max(min(low, value), least * len(images)), min(max(high, value), most * len(images))
    share = (value - least) / (most - least)
    size, variance = float(len(values)), float(values.var(ddof=1) / (most - least) ** 2)
    if 0 < share < 1 and variance > 1e-15:
        shrink = float(NORMAL / stdtrit(size - 1, 0.975)) ** 2
        size *= min(share * (1 - share) / variance * shrink, 4.0)
    pull = NORMAL**2 / size
    half = NORMAL * float(np.sqrt(share * (1 - share) / size + pull / size / 4)) / (1 + pull)
    low, high = ((share + pull / 2) / (1 + pull) + side * half for side in (-1, 1))
    return least + (most - least) * min(low, share), least + (most - least) * max(high, share)


def smoothed_sum(
    values: Floats, strata: Numbers, least: float, most: float, extra: float
) -> tuple[float, float, float]:
    """Computes a sum of stratum means after adding pseudo-values at both bounds to each stratum.

    Args:
        values: (images,) each from ``least`` to ``most``.
        strata: (images,) the stratum of each, as a number from 0 without gaps; at least two images in each.
        least: The least possible value.
        most: The greatest possible value.
        extra: Number of pseudo-values added to each stratum at ``least``, and as many at ``most``; may be a fraction.

    Returns:
        The sum of the means, its variance and Satterthwaite's degrees of freedom.
    """
    counted = np.bincount(strata)
    images = counted + 2 * extra
    means = (np.bincount(strata, values) + extra * (least + most)) / images
    squares = np.bincount(strata, (values - means[strata]) ** 2) + extra * ((least - means) ** 2 + (most - means) ** 2)
    variances = squares / (images - 1) / images
    total = variances.sum()
    return float(means.sum()), float(total), float(total**2 / (variances**2 / (counted - 1)).sum())


def t_interval(value: float, variance: float, freedom: float) -> tuple[float, float]:
    """Computes Student's 95 % interval.

    Args:
        value: The estimate.
        variance: Its estimated variance.
        freedom: The degrees of freedom of ``variance``.

    Returns:
        Lower and upper end.
    """
    half = float(stdtrit(freedom, 0.975) * np.sqrt(variance))
    return value - half, value + half


def interval_paired(differences: Floats, categories: Numbers | None = None) -> tuple[float, float] | None:
    """Computes the 95 % t interval of a mean of differences, one per concept, over new concepts of the same categories.

    Args:
        differences: (concepts,) each between -1 and 1.
        categories: (concepts,) the category of each, as a number; None is a single category.

    Returns:
        Lower and upper end; None for fewer than 10 concepts, or if all differences within each stratum are the same.
    """
    none = np.zeros(len(differences), int)
    strata = strata_of(none, none if categories is None else categories)
    squares = ratio_squares(differences, np.ones(len(differences)), strata)
    if len(differences) < FEWEST_CONCEPTS or squares.sum() < 1e-15:
        return None
    low, high = t_interval(float(differences.mean()), squares.sum(), freedom_within(squares, strata))
    return max(low, -1.0), min(high, 1.0)


@cache
def _coverage() -> tuple[tuple[str, str, float, float], ...]:
    texts = [files("safervlm").joinpath(name).read_text(encoding="utf-8") for name in COVERAGES]
    rows = [row for text in texts for row in csv.DictReader(text.splitlines())]
    return tuple((row["method"], row["part"], float(row["lowest"]), float(row["highest"])) for row in rows)


def coverage(method: str, part: str | None = None) -> str | None:
    """Returns the simulated coverage of an interval method, such as ".94 to .98"; None if it was not simulated.

    Args:
        method: Name of the method as stated in tables: a constant such as :data:`BY_TASK` of this module or of
            :mod:`safervlm.statistics.differences`, or a method of ``safervlm.results.measures``.
        part: ``overall``, ``category`` for the few concepts of a category, :data:`SKEWED`, or a number of an operating
            curve, of groups of training seeds or of corrected rates; None is the range over all simulations but those
            of skewed concepts.
    """
    found = [
        (low, high) for name, of, low, high in _coverage() if name == method and (of == part if part else of != SKEWED)
    ]
    if not found:
        return None
    # Round outward, so that the rounded range contains all simulated coverages.
    lowest = floor(100 * min(low for low, _ in found) + 1e-9) / 100
    highest = ceil(100 * max(high for _, high in found) - 1e-9) / 100
    return " to ".join(f"{end:.2f}".removeprefix("0") for end in (lowest, highest))


def simulated_coverage(method: str) -> str | None:
    """Returns the simulated :func:`coverage` of a method as tables state it; None if it was not simulated.

    Args:
        method: Name of the method, as in a table.
    """
    # Images without concepts are simulated as independent images of one concept.
    as_one = ("Korn-Graubard, images within concepts", "independent images")
    name, part = as_one if method == SHARE_BY_IMAGE else (method, "overall")
    return coverage(name, part) or coverage(name)
