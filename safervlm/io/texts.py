"""Preparation of texts for tokenizers."""

import re

LONE = re.compile("[\ud800-\udfff]")  # lone surrogates


def tokenizable(text: str) -> str:
    """Replaces lone surrogates in a text by the replacement character U+FFFD.

    Tokenizers encode texts in UTF-8, which has no surrogates. The stored text is not changed.

    Args:
        text: Any text.
    """
    return LONE.sub("\ufffd", text)
