"""Self-BLEU computed by NLTK."""


def nltk_self_bleu(responses, order=4, only=None):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    texts = [response.split() for response in responses]
    smooth = SmoothingFunction().method1
    weights = (1 / order,) * order
    return [
        sentence_bleu(texts[:i] + texts[i + 1 :], texts[i], weights=weights, smoothing_function=smooth)
        for i in (range(len(texts)) if only is None else only)
    ]
