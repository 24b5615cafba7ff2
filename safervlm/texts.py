"""Texts as a tokenizer takes them."""

import re
from dataclasses import replace

from safervlm.records import Example

LONE = re.compile("[\ud800-\udfff]")  # half of a pair that makes one character


def tokenizable(text: str) -> str:
    """A text in which the replacement character U+FFFD stands for halves of surrogate pairs.

    Tokenizers encode texts in UTF-8, which has no halves. What is stored of the text is not changed.
    """
    return LONE.sub("\ufffd", text)


def tokenizable_example(example: Example) -> Example:
    """The same for the question and the completions of an example; its id stays."""
    question = replace(example.question, prompt=tokenizable(example.question.prompt))
    return replace(example, question=question, completions=tuple(map(tokenizable, example.completions)))
