"""Texts as a tokenizer takes them."""

import re
from dataclasses import replace

from safervlm.errors import RecordError
from safervlm.records import Example

CHARACTERS = 64  # of a token, on average over a text: more than any text has that is read by people
LONE = re.compile("[\ud800-\udfff]")  # half of a pair that makes one character


def tokenizable(text: str) -> str:
    """A text in which the replacement character U+FFFD stands for halves of surrogate pairs.

    Tokenizers encode texts in UTF-8, which has no halves. What is stored of the text is not changed.
    """
    return LONE.sub("\ufffd", text)


def tokenizable_example(example: Example, max_length: int) -> Example:
    """The same for the question and the completions of an example; its id stays.

    Args:
        example: a record.
        max_length: tokens that the model takes.

    Raises:
        RecordError: a text is so long that it can't fit, which is known without the minutes of tokenising it.
    """
    for text in (example.question.prompt, *example.completions):
        if len(text) > CHARACTERS * max_length:
            raise RecordError(
                f"{example.question.id}: a text of {len(text)} characters, the model takes {max_length} tokens; "
                "shorten the question or its completion"
            )
    question = replace(example.question, prompt=tokenizable(example.question.prompt))
    return replace(example, question=question, completions=tuple(map(tokenizable, example.completions)))
