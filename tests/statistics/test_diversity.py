"""Self-BLEU against NLTK's, and its mean over subsamples against the mean over all subsamples."""

import random
from itertools import combinations

import numpy as np
import pytest
from self_bleu import nltk_self_bleu

from safervlm.statistics import diversity as module
from safervlm.statistics.diversity import diversity, published_diversity, self_bleu


def texts(count, seed, words=40, longest=30):
    rng = random.Random(seed)
    sentences = [[f"w{min(int(rng.paretovariate(0.7)), words)}" for _ in range(longest)] for _ in range(8)]
    made = []
    for _ in range(count):
        sentence = rng.choice(sentences)[: rng.randint(0, longest)]
        made.append(" ".join(w if rng.random() < 0.7 else f"w{rng.randrange(words)}" for w in sentence))
    return made


@pytest.mark.parametrize(
    "responses",
    [
        ["a b c d e", "a b c d f", "a b x d e f g"],
        ["", "a b c", "a b"],
        ["", ""],
        ["", "", "a b c d"],
        ["a", "b", "c"],
        ["a", "a", "a b"],
        ["same words all along here"] * 4,
        ["a a a a a a a", "a a", "a a a b", "b b"],
        ["no word in common", "other things entirely stand here"],
        ["a b c d", "a b c d e f", "a b"],  # closest length: a tie, the shorter counts
        ["tab\tand  double\nspaces", "tab and double spaces"],
        *[texts(40, seed) for seed in range(5)],
        texts(30, 9, words=5, longest=8),
    ],
)
def test_self_bleu_equals_nltk(responses):
    assert self_bleu(responses) == pytest.approx(np.mean(nltk_self_bleu(responses)), abs=1e-9)


def test_self_bleu_of_another_order():
    responses = texts(30, 3)
    assert self_bleu(responses, order=2) == pytest.approx(np.mean(nltk_self_bleu(responses, 2)), abs=1e-9)


@pytest.mark.parametrize("responses", [[], ["one answer alone"]])
def test_self_bleu_needs_two(responses):
    assert np.isnan(self_bleu(responses))


# --- on a fixed number of texts ---------------------------------------------------------------------------------------


def ids(count):
    return [f"Made/{number}.png/alignment/0" for number in range(count)]


def test_diversity_of_each_subsample_equals_nltk_self_bleu(monkeypatch):
    monkeypatch.setattr(module, "TEXTS", 12)
    monkeypatch.setattr(module, "SUBSAMPLES", 4)
    made = texts(30, 1)
    seen = []
    monkeypatch.setattr(module, "self_bleu", lambda chosen: seen.append(chosen) or self_bleu(chosen))
    value, _ = diversity(made, ids(30))
    assert value == pytest.approx(1 - np.mean([np.mean(nltk_self_bleu(chosen)) for chosen in seen]), abs=1e-9)
    assert [len(chosen) for chosen in seen] == [12] * 4
    pool = {text: made.count(text) for text in made}
    for chosen in seen:  # without replacement
        assert all(chosen.count(text) <= pool[text] for text in chosen)
    assert len({tuple(sorted(chosen)) for chosen in seen}) == 4


def test_diversity_estimates_the_mean_over_all_subsamples(monkeypatch):
    monkeypatch.setattr(module, "TEXTS", 4)
    monkeypatch.setattr(module, "SUBSAMPLES", 400)
    made = texts(8, 2, words=12, longest=12)
    every = [self_bleu(list(chosen)) for chosen in combinations(made, 4)]
    value, _ = diversity(made, ids(8))
    assert value == pytest.approx(1 - np.mean(every), abs=4 * np.std(every) / np.sqrt(400))


def test_diversity_is_independent_of_the_order_and_number_of_texts():
    made, names = texts(520, 3), ids(520)
    value, method = diversity(made, names)
    assert "50 subsamples of 100 texts" in method
    order = np.random.default_rng(0).permutation(520)
    assert diversity([made[i] for i in order], [names[i] for i in order]) == (value, method)
    half, _ = diversity(made[:260], names[:260])
    assert value == pytest.approx(half, abs=0.02)
    published, _ = published_diversity(made)
    assert published < published_diversity(made[:26])[0] - 0.05  # which is why


def test_diversity_of_exactly_100_texts_equals_the_published_measure():
    made = texts(100, 4)
    assert diversity(made, ids(100))[0] == pytest.approx(published_diversity(made)[0], abs=1e-12)


@pytest.mark.parametrize("count", [2, 26, 99])
def test_fewer_texts_are_reported(count):
    made = texts(count, 5)
    value, method = diversity(made, ids(count))
    assert value == pytest.approx(1 - np.mean(nltk_self_bleu(made)), abs=1e-9)
    assert method.endswith("all texts, fewer than 100")


@pytest.mark.parametrize("count", [0, 1])
def test_one_text_has_no_diversity(count):
    assert np.isnan(diversity(["a b"] * count, ids(count))[0])
