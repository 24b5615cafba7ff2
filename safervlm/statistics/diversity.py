"""Diversity of texts: 1 - self-BLEU, on a fixed number of texts and in the published form.

Self-BLEU compares each text with all others, so it increases with their number: for one run, 1 - self-BLEU was .49,
.27, .21 and .17 with 26, 104, 260 and 520 texts. :func:`diversity` is the mean over seeded subsamples of 100 texts, so
it is comparable between runs with different numbers of texts. The published form uses all texts.

References:
    Papineni et al. (2002), BLEU: a method for automatic evaluation of machine translation, ACL.
    Zhu et al. (2018), Texygen: a benchmarking platform for text generation models, SIGIR: self-BLEU.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from safervlm.hashing import seed_for
from safervlm.statistics.intervals import Floats

TEXTS = 100  # texts per subsample
SUBSAMPLES = 50

# Names of the methods. There is no interval, as each text is compared with the others.
NO_INTERVAL = "none: texts compared with each other"
BY_SUBSAMPLES = f"{NO_INTERVAL}; mean over {SUBSAMPLES} subsamples of {TEXTS} texts"
ALL_TEXTS = f"{NO_INTERVAL}; all texts"
TOO_FEW = f"{NO_INTERVAL}; all texts, fewer than {TEXTS}"


def diversity(texts: Sequence[str], ids: Sequence[str]) -> tuple[float, str]:
    """Computes 1 - self-BLEU of 100 texts: the mean over 50 seeded subsamples without replacement.

    It is independent of the order of the texts, and its expectation of their number. Runs with the same ids have the
    same subsamples.

    Args:
        texts: The responses.
        ids: The ids of their questions, in the same order; they determine the subsamples.

    Returns:
        The mean, and the name of the method. With fewer than 100 texts all of them are used, and the method states
        this; NaN for fewer than two texts.

    Raises:
        ValueError: The numbers of texts and ids differ.
    """
    if len(texts) != len(ids):
        raise ValueError(f"{len(texts)} texts and {len(ids)} ids")
    ordered = [text for _, text in sorted(zip(ids, texts, strict=True))]
    if len(ordered) < TEXTS:
        return 1 - self_bleu(ordered), TOO_FEW
    values = []
    for number in range(SUBSAMPLES if len(ordered) > TEXTS else 1):
        chosen = np.random.default_rng(seed_for("self-BLEU", number)).choice(len(ordered), TEXTS, replace=False)
        values.append(self_bleu([ordered[place] for place in chosen]))
    return 1 - float(np.mean(values)), BY_SUBSAMPLES


def published_diversity(texts: Sequence[str]) -> tuple[float, str]:
    """Computes 1 - self-BLEU of all texts, the published form; it decreases with their number.

    Args:
        texts: The responses.

    Returns:
        The value, NaN for fewer than two texts, and the name of the method.
    """
    return 1 - self_bleu(texts), ALL_TEXTS


def self_bleu(responses: Sequence[str], order: int = 4) -> float:
    """Mean sentence BLEU of each response against all others; lower is more diverse.

    Equal to NLTK's ``sentence_bleu`` with whitespace tokens, uniform weights and smoothing method 1 (a precision of 0
    becomes 0.1 / n), but computed without pairwise comparisons: a response's n-gram counts are clipped by the largest
    count in any other response, which is the largest of all, or the second largest if the largest is the response's
    own. A response without a word scores 0, as in NLTK; the first implementation excludes it.

    Args:
        responses: The texts.
        order: Length of the longest n-grams.

    Returns:
        The mean, 0 to 1; NaN for fewer than two responses.
    """
    count = len(responses)
    if count < 2:
        return float("nan")
    tokens = [response.split() for response in responses]
    vocabulary: dict[str, int] = {}
    words = np.array([vocabulary.setdefault(word, len(vocabulary)) for text in tokens for word in text], np.int64)
    lengths = np.array([len(text) for text in tokens], np.int64)
    owner = np.repeat(np.arange(count), lengths)
    end = np.repeat(np.cumsum(lengths), lengths)

    log_precision = np.zeros(count)
    grams = words  # index of the n-gram that starts at each position
    unigram_matches = np.zeros(count)
    for n in range(1, order + 1):
        start = np.flatnonzero(np.arange(len(words)) + n <= end)
        if n > 1:
            # Pairs of (n-1)-gram and next word, renumbered for each n to keep the numbers small.
            pairs = grams[start] * len(vocabulary) + words[start + n - 1]
            grams = np.zeros_like(words)
            grams[start] = np.unique(pairs, return_inverse=True)[1]
        matches, total = _clipped_matches(grams[start], owner[start], count)
        if n == 1:
            unigram_matches = matches
        log_precision += np.log(np.where(matches > 0, matches, 0.1) / np.maximum(total, 1)) / order

    reference = _closest_other_length(lengths)
    with np.errstate(divide="ignore"):
        brevity = np.exp(np.minimum(1 - reference / np.maximum(lengths, 1), 0))
    # Without a common word NLTK returns 0 even with smoothing; this includes empty responses.
    return float(np.where(unigram_matches > 0, brevity * np.exp(log_precision), 0.0).mean())


def _clipped_matches(grams: npt.NDArray[np.int64], owner: npt.NDArray[np.int64], count: int) -> tuple[Floats, Floats]:
    """Returns, per response, the clipped number of n-grams found in another response and of all n-grams; (count,)."""
    if not len(grams):
        return np.zeros(count), np.zeros(count)
    keys, times = np.unique(grams * count + owner, return_counts=True)  # unique (gram, response), sorted by gram
    gram, who = keys // count, keys % count
    ranked = np.lexsort((-times, gram))  # within each gram the most frequent first
    first = np.flatnonzero(np.diff(gram, prepend=-1))
    users = np.diff(first, append=len(gram))
    largest, largest_owner = times[ranked][first], who[ranked][first]
    second = np.where(users > 1, times[ranked][np.minimum(first + 1, len(gram) - 1)], 0)
    group = np.repeat(np.arange(len(first)), users)
    limit = np.where(who == largest_owner[group], second[group], largest[group])
    matched, total = (np.bincount(who, weights, count) for weights in (np.minimum(times, limit), times))
    return matched.astype(np.float64), total.astype(np.float64)


def _closest_other_length(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns, per response, the closest length among the others, the shorter of two equally close; (count,)."""
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    far = int(lengths.max()) * 3 + 3
    below = np.concatenate([[-far], ascending[:-1]])
    above = np.concatenate([ascending[1:], [far]])
    closest = np.empty_like(lengths)
    closest[order] = np.where(ascending - below <= above - ascending, below, above)
    return closest
