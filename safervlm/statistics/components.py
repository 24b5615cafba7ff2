"""Variance components of an accuracy: concepts, images, wordings, their interactions, and sampling.

``y[i, j, k]`` is 1 if answer k to question j about image i is right. Images are nested in concepts; the questions are
crossed with both, and fixed. The components are estimated by the method of moments (Henderson 1953, Estimation of
variance and covariance components, Biometrics 9), for I images of C concepts and J questions:

    E[mean square of images]              = e + J image
    E[mean square of concept x question]  = e + n0 (concept x question)
    E[mean square of the residual]        = e
    E[mean square of concepts]            = e + J image + n0 (concept x question) + J n0 concept

on I - C, (C - 1)(J - 1), (I - C)(J - 1) and C - 1 degrees of freedom, with ``n0 = (I - sum n^2 / I) / (C - 1)``. With
several answers to a question, e is divided into the interaction of image and question, and sampling, which is the mean
variance within a question.
"""

import numpy as np

from safervlm.statistics.intervals import Floats, Numbers

CONCEPT = "concept"
IMAGE = "image"
WORDING = "wording"
CONCEPT_BY_WORDING = "concept x wording"
IMAGE_BY_WORDING = "image x wording"
SAMPLING = "sampling"
REST = "image x wording, and sampling"


def variance_components(right: Floats, concepts: Numbers) -> dict[str, float]:
    """Estimates the variance components of a share of right answers.

    Args:
        right: (images, questions, answers) 1 if the answer is right, else 0; at least 2 questions.
        concepts: (images,) the concept of each, as a number from 0 without gaps; at least 2 concepts, and more images
            than concepts.

    Returns:
        The components, which are not negative (a negative estimate is 0). With one answer to a question the
        interaction of image and wording can't be separated from sampling: they are one component, :data:`REST`.
        ``wording`` is the variance between the questions' accuracies, a description of these questions: they are
        fixed, so it is not a source of error.
    """
    images, questions, answers = right.shape
    y = right.mean(-1)
    sizes = np.bincount(concepts).astype(np.float64)
    count = len(sizes)
    n0 = (images - (sizes**2).sum() / images) / (count - 1)
    cells = np.stack([np.bincount(concepts, column) for column in y.T], axis=1) / sizes[:, None]
    by_image, by_concept, by_question, mean = y.mean(1), cells.mean(1), y.mean(0), y.mean()
    of_images = questions * ((by_image - by_concept[concepts]) ** 2).sum() / (images - count)
    residuals = y - by_image[:, None] - cells[concepts] + by_concept[concepts][:, None]
    rest = (residuals**2).sum() / ((images - count) * (questions - 1))
    crossed = cells - by_concept[:, None] - by_question + mean
    of_crossed = (sizes[:, None] * crossed**2).sum() / ((count - 1) * (questions - 1))
    of_concepts = questions * (sizes * (by_concept - mean) ** 2).sum() / (count - 1)
    found = {
        CONCEPT: (of_concepts - of_images - of_crossed + rest) / questions / n0,
        IMAGE: (of_images - rest) / questions,
        WORDING: by_question.var(ddof=1),
        CONCEPT_BY_WORDING: (of_crossed - rest) / n0,
    }
    if answers > 1:
        sampling = right.var(-1, ddof=1).mean()
        found |= {IMAGE_BY_WORDING: rest - sampling / answers, SAMPLING: sampling}
    else:
        found[REST] = rest
    return {name: max(float(value), 0.0) for name, value in found.items()}
