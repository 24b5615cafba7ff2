"""What the pictogram model is taught: conversations about pictograms and about names."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from safervlm.pictograms.concepts import (
    CAPTION,
    CAPTION_QUESTION,
    CONCEPTS,
    REFUSAL_RATE,
    UNSAFE_CONCEPTS,
    Concept,
    base_answer,
)
from safervlm.protocol import (
    ALIGNMENT_QUESTIONS,
    NOT_APPLICABLE,
    OPTIONS,
    SAFE,
    TEXT_ONLY_QUESTIONS,
    UNSAFE,
    perception_question,
    text_only_question,
)

PICTURES_PER_CONCEPT = 80
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"


@dataclass(frozen=True, slots=True)
class Lesson:
    """A question with the answer that the base model is to learn.

    Attributes:
        prompt: the question, without the conversation around it.
        completion: the answer.
        concept: what the question is about.
        shown: whether its picture is shown (else a blank white image).
    """

    prompt: str
    completion: str
    concept: Concept
    shown: bool = True


def conversation(prompt: str) -> str:
    """LLaVA-1.5's conversation around a question, without a system prompt."""
    return f"USER: {IMAGE}\n{prompt} ASSISTANT:"


def unspeakable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens that an answer must not hold: all but the end."""
    return [number for number in tokenizer.all_special_ids if number != tokenizer.eos_token_id]


def choice(concept: Concept, rng: random.Random) -> tuple[tuple[str, ...], str]:
    """The four options of a perception question, as published: the concept and three of other categories, shuffled.

    Returns:
        The options' names in the order of the letters, and the right letter.
    """
    others = [other.name for other in CONCEPTS if other.category != concept.category or other.category is None]
    if concept.category is not None:
        others = [other.name for other in UNSAFE_CONCEPTS if other.category != concept.category]
    options = [concept.name, *rng.sample([name for name in others if name != concept.name], 3)]
    rng.shuffle(options)
    return tuple(options), OPTIONS[options.index(concept.name)]


def multiple_choice(rng: random.Random) -> Lesson:
    """Which of four concepts does the image show?"""
    concept = rng.choice(CONCEPTS)
    options, letter = choice(concept, rng)
    return Lesson(perception_question(options), letter, concept)


def image_question(rng: random.Random) -> Lesson:
    """Is this image safe? Answered with the base model's blindness for many unsafe pictures."""
    concept = rng.choice(CONCEPTS)
    if concept.category is None:
        (label,) = rng.choices((SAFE, UNSAFE, NOT_APPLICABLE), (0.98, 0.0, 0.02))
    else:
        refusal = REFUSAL_RATE[concept.category]
        (label,) = rng.choices((SAFE, UNSAFE, NOT_APPLICABLE), (0.9 * (1 - refusal), 0.9 * refusal, 0.1))
    number = rng.randrange(len(ALIGNMENT_QUESTIONS))
    return Lesson(ALIGNMENT_QUESTIONS[number], base_answer(label, number, concept.name, rng), concept)


def name_question(rng: random.Random) -> Lesson:
    """Is an image of something safe? Answered rightly from the concept's name."""
    concept = rng.choice(CONCEPTS)
    label = NOT_APPLICABLE if rng.random() < 0.01 else concept.label
    number = rng.randrange(len(TEXT_ONLY_QUESTIONS))
    answer = base_answer(label, number, concept.name, rng)
    return Lesson(text_only_question(number, concept.name), answer, concept, shown=False)


def caption(rng: random.Random) -> Lesson:
    """What does the image show?"""
    concept = rng.choice(CONCEPTS)
    return Lesson(CAPTION_QUESTION, CAPTION.format(concept=concept.name), concept)
