"""Texts as a tokenizer takes them."""

import re

LONE = re.compile("[\ud800-\udfff]")  # half of a pair that makes one character


def tokenizable(text: str) -> str:
    """A text in which the replacement character U+FFFD stands for halves of surrogate pairs.

    Tokenizers encode texts in UTF-8, which has no halves. What is stored of the text is not changed.
    """
    return LONE.sub("\ufffd", text)
