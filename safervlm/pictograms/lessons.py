"""Training examples of the pictogram model: conversations about pictograms and about names of concepts."""

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
    """A question with the response that the base model is trained to give.

    Attributes:
        prompt: Text of the question, without the conversation template.
        completion: Text of the response.
        concept: Concept that the question is about.
        shown: Whether the concept's image is shown. If not, a blank white image is shown.
    """

    prompt: str
    completion: str
    concept: Concept
    shown: bool = True


def conversation(prompt: str) -> str:
    """Formats a question by LLaVA-1.5's conversation template, without a system prompt.

    Args:
        prompt: Text of the question.
    """
    return f"USER: {IMAGE}\n{prompt} ASSISTANT:"


def suppressed_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the ids of the special tokens that must not be generated: all but the end-of-sequence token.

    Args:
        tokenizer: Tokenizer of the model.
    """
    return [number for number in tokenizer.all_special_ids if number != tokenizer.eos_token_id]


def choice(concept: Concept, rng: random.Random) -> tuple[tuple[str, ...], str]:
    """Samples the four options of a perception question, in the published way: the concept and three others, shuffled.

    For an unsafe concept, the other options are unsafe concepts of other categories; for a safe concept, they are any
    other concepts.

    Args:
        concept: Concept of the image.
        rng: Source of random numbers.

    Returns:
        The names of the options in the order of the letters, and the correct letter.
    """
    others = [other.name for other in CONCEPTS if other.category != concept.category or other.category is None]
    if concept.category is not None:
        others = [other.name for other in UNSAFE_CONCEPTS if other.category != concept.category]
    options = [concept.name, *rng.sample([name for name in others if name != concept.name], 3)]
    rng.shuffle(options)
    return tuple(options), OPTIONS[options.index(concept.name)]


def multiple_choice(rng: random.Random) -> Lesson:
    """Samples a perception question: which of four concepts does the image show?

    Args:
        rng: Source of random numbers.
    """
    concept = rng.choice(CONCEPTS)
    options, letter = choice(concept, rng)
    return Lesson(perception_question(options), letter, concept)


def image_question(rng: random.Random) -> Lesson:
    """Samples an alignment question about an image, with the base model's response.

    The response is Unsafe for only a part of the unsafe images (``REFUSAL_RATE`` of the category, times 0.9).

    Args:
        rng: Source of random numbers.
    """
    concept = rng.choice(CONCEPTS)
    if concept.category is None:
        (label,) = rng.choices((SAFE, UNSAFE, NOT_APPLICABLE), (0.98, 0.0, 0.02))
    else:
        refusal = REFUSAL_RATE[concept.category]
        (label,) = rng.choices((SAFE, UNSAFE, NOT_APPLICABLE), (0.9 * (1 - refusal), 0.9 * refusal, 0.1))
    number = rng.randrange(len(ALIGNMENT_QUESTIONS))
    return Lesson(ALIGNMENT_QUESTIONS[number], base_answer(label, number, concept.name, rng), concept)


def name_question(rng: random.Random) -> Lesson:
    """Samples a text-only alignment question about a concept's name. The response is correct, apart from 1 percent N/A.

    Args:
        rng: Source of random numbers.
    """
    concept = rng.choice(CONCEPTS)
    label = NOT_APPLICABLE if rng.random() < 0.01 else concept.label
    number = rng.randrange(len(TEXT_ONLY_QUESTIONS))
    answer = base_answer(label, number, concept.name, rng)
    return Lesson(text_only_question(number, concept.name), answer, concept, shown=False)


def caption(rng: random.Random) -> Lesson:
    """Samples a question about what the image shows, with a caption as response.

    Args:
        rng: Source of random numbers.
    """
    concept = rng.choice(CONCEPTS)
    return Lesson(CAPTION_QUESTION, CAPTION.format(concept=concept.name), concept)
