"""Self-BLEU against NLTK."""

import random
import statistics
import sys
import time
from collections.abc import Sequence

from comparisons.timing import Row, say
from safervlm.statistics.diversity import self_bleu


def benchmark_bleu(repeats: int, count: int = 1000, sample: int = 40) -> list[Row]:
    """Compares self-BLEU with NLTK.

    The time of NLTK is measured for a sample of the texts and scaled, since its time per text is constant.

    Args:
        repeats: number of measured repetitions.
        count: number of texts.
        sample: number of texts for which NLTK is measured.

    Raises:
        SystemExit: the two values differ.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1

    def nltk(texts: Sequence[str], of: Sequence[int]) -> float:
        tokens = [text.split() for text in texts]
        return statistics.mean(
            sentence_bleu(tokens[:i] + tokens[i + 1 :], tokens[i], smoothing_function=smoothing) for i in of
        )

    rng = random.Random(0)
    stems = [[f"w{int(rng.paretovariate(0.6)) % 1500}" for _ in range(35)] for _ in range(60)]

    def answer() -> str:
        words = rng.choice(stems)[: rng.randint(15, 35)]
        return " ".join(word if rng.random() < 0.6 else f"w{int(rng.paretovariate(0.6)) % 1500}" for word in words)

    texts = [answer() for _ in range(count)]
    few = texts[:60]
    difference = abs(nltk(few, range(len(few))) - self_bleu(few))
    say(f"  self-BLEU of {len(few)} texts differs from NLTK's by {difference:.1e}")
    if not difference < 1e-9:
        sys.exit("self-BLEU is not NLTK's: the comparison is void")
    self_bleu(texts)
    theirs, ours = [], []
    for repeat in range(repeats):
        start = time.process_time()
        nltk(texts, rng.sample(range(count), sample))
        middle = time.process_time()
        for _ in range(5):
            self_bleu(texts)
        end = time.process_time()
        theirs.append((middle - start) * count / sample)
        ours.append((end - middle) / 5)
        say(f"  {repeat + 1}/{repeats}: NLTK {theirs[-1]:.1f} s (scaled), ours {ours[-1] * 1000:.1f} ms")
    return [Row(f"self-BLEU of {count:,} texts : NLTK (scaled from {sample} of them)", theirs, ours, 500)]
