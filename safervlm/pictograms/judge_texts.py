"""Labelled texts that the judges of the pictogram world are trained on.

They are the base model's responses, the aligned responses, other wordings of both, and degenerate outputs. A policy is
rewarded by the alignment judge, so garbage, empty responses and self-contradictions must not receive a high reward.
"""

import random
from collections.abc import Callable

from safervlm.pictograms.concepts import CONCEPTS, base_answer
from safervlm.protocol import (
    ALIGNMENT_QUESTIONS,
    LABELS,
    NOT_APPLICABLE,
    OPTIONS,
    SAFE,
    UNSAFE,
    Capability,
    aligned_response,
    other_label,
)

SUBJECTS = ("this image", "the image", "it", "this", "the picture", "{concept}", "the content")
CLAIMS = {
    SAFE: (
        "is safe",
        "is harmless",
        "is fine",
        "is okay",
        "is appropriate",
        "is acceptable",
        "is suitable",
        "can be shared",
        "can be shown",
        "may be posted",
        "should be allowed",
        "does not contain anything harmful",
        "follows the guidelines",
        "is not harmful",
        "isn't harmful",
        "is not dangerous",
        "has no problem",
    ),
    UNSAFE: (
        "is not safe",
        "isn't safe",
        "is unsafe",
        "is harmful",
        "is not fine",
        "is not okay",
        "is inappropriate",
        "is not appropriate",
        "is not acceptable",
        "is not suitable",
        "is dangerous",
        "cannot be shared",
        "should not be shared",
        "should not be shown",
        "must not be posted",
        "should not be allowed",
        "contains harmful content",
        "violates the guidelines",
        "does not follow the guidelines",
        "may cause harm",
        "is a problem",
    ),
}
OPENINGS = {
    SAFE: ("", "", "", "Yes, ", "Yes, ", "Sure, ", "Absolutely, ", "Of course, "),
    UNSAFE: ("", "", "", "No, ", "No, ", "Sorry, ", "Unfortunately, ", "I am afraid not, "),
}
SCENES = (
    "",
    "",
    "",
    " for everyone",
    " on social media",
    " for a general audience",
    " for viewing",
    " in online forums",
)
OPINIONS = {
    SAFE: (
        "Yes",
        "Yes!",
        "Sure.",
        "Of course.",
        "I would share this image.",
        "I see nothing harmful.",
        "There is no harm in it.",
    ),
    UNSAFE: (
        "No",
        "No!",
        "No, never.",
        "Not at all.",
        "Of course not.",
        "I would not share it.",
        "I see a problem with this.",
        "There is harm in it.",
    ),
}
DOUBTS = (
    "It depends.",
    "I do not know.",
    "I am not sure.",
    "I cannot tell.",
    "Maybe.",
    "I cannot see the image.",
    "It is unclear.",
    "As an AI, I have no opinion.",
    "Sorry, I cannot help with that.",
    "This question has no answer.",
)


def statement(label: str, rng: random.Random) -> str:
    """Samples a response that states a label, worded like the base model, like an aligned response, or otherwise.

    The first sentence determines the label: an aligned response followed by the other label's remark keeps its own
    label.

    Args:
        label: ``Safe`` or ``Unsafe``.
        rng: Source of random numbers.
    """
    concept = rng.choice(CONCEPTS).name
    number = rng.randrange(len(ALIGNMENT_QUESTIONS))
    kind = rng.random()
    if kind < 0.4:
        return base_answer(label, number, concept, rng)
    if kind < 0.65:
        remark = label if kind < 0.6 else other_label(label)
        answer, _ = aligned_response(label, number, concept).split(". ")
        return f"{answer}. {aligned_response(remark, number, concept).split('. ')[1]}"
    if kind < 0.7:
        return rng.choice(OPINIONS[label])
    claim = f"{rng.choice(SUBJECTS)} {rng.choice(CLAIMS[label])}{rng.choice(SCENES)}.".format(concept=concept)
    text = rng.choice(OPENINGS[label]) + claim
    return text[0].upper() + text[1:]


def garbage(rng: random.Random) -> str:
    """Samples a degenerate output: empty, letters, captions, repetitions, shuffled words, contradictions.

    Args:
        rng: Source of random numbers.
    """
    concept = rng.choice(CONCEPTS).name
    label = rng.choice((SAFE, UNSAFE))
    words = statement(label, rng).split() + statement(other_label(label), rng).split()
    yes, no = (
        aligned_response(x, rng.randrange(len(ALIGNMENT_QUESTIONS)), concept) for x in (label, other_label(label))
    )
    return rng.choice(
        (
            "",
            rng.choice(("A", "B", "C", "D", ".", ",", "?", "0", "\n", "is", "the", "image")),
            concept,
            f"{rng.choice(('It shows', 'The image shows', 'This is', 'I see', 'A picture of'))} {concept}.",
            rng.choice(("The image", "It shows", "The image is", "This image", "It is", "The image shows")),
            " ".join([rng.choice(words)] * rng.randint(3, 12)),
            " ".join([rng.choice(("Yes", "No", "Yes,", "No,", "safe", "harmful", "not"))] * rng.randint(3, 12)),
            " ".join(rng.choice(CONCEPTS).name for _ in range(rng.randint(2, 6))),
            " ".join(rng.sample(words, len(words))),
            " ".join(rng.choices(words, k=rng.randint(3, 15))),
            rng.choice(ALIGNMENT_QUESTIONS),
            yes.split(",", 1)[0] + "," + no.split(",", 1)[1],
        )
    )


def alignment_answer(rng: random.Random) -> tuple[str, str]:
    """Samples a response to an alignment question.

    Args:
        rng: Source of random numbers.

    Returns:
        The response and its label.
    """
    label = rng.choice(LABELS["alignment"])
    if label == NOT_APPLICABLE:
        kind = rng.random()
        if kind < 0.25:
            return base_answer(label, 0, rng.choice(CONCEPTS).name, rng), label
        return (rng.choice(DOUBTS) if kind < 0.35 else garbage(rng)), label
    text = statement(label, rng)
    if rng.random() < 0.15:
        text = text.rstrip(".")
    return (text.lower() if rng.random() < 0.1 else text), label


def perception_answer(rng: random.Random) -> tuple[str, str]:
    """Samples a response to a perception question.

    Args:
        rng: Source of random numbers.

    Returns:
        The response and its label: the letter that it chooses, or ``N/A``.
    """
    label = rng.choice(LABELS["perception"])
    concept = rng.choice(CONCEPTS).name
    if label == NOT_APPLICABLE:
        several = " ".join(rng.sample(OPTIONS, rng.randint(2, 4)))
        return rng.choice(
            (several, garbage(rng).lstrip("ABCD"), statement(rng.choice((SAFE, UNSAFE)), rng), rng.choice(DOUBTS))
        ), label
    forms = (
        "{letter}",
        "{letter}",
        "{letter}.",
        "({letter})",
        "{letter})",
        "{letter}: {concept}",
        "{letter}: {concept}.",
        "Option {letter}",
        "Option {letter}.",
        "The answer is {letter}.",
        "Answer: {letter}",
        "It is {letter}.",
        "The correct option is {letter}: {concept}",
        "{letter}, {concept}",
        "I choose {letter}.",
        "I think {letter}",
        "The image shows {concept}, so {letter}.",
        "The most relevant option is {letter}.",
    )
    return rng.choice(forms).format(letter=label, concept=concept), label


ANSWER: dict[Capability, Callable[[random.Random], tuple[str, str]]] = {
    "alignment": alignment_answer,
    "perception": perception_answer,
}
