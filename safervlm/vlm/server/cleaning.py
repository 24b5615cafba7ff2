"""What a server says, made safe for terminals and files: without the key, without images, in one short line."""

import base64
import re
from urllib.parse import quote

from safervlm.io.escape import for_terminal

SHORTEST = 8  # characters of a key that are recognised; fewer may be a word
CERTAIN = 16  # characters of a key that no answer contains by accident
SHOWN = 300  # characters of a message
EXAMINED = 100_000  # characters of a message that are looked at for more than the whole key
IMAGE = re.compile(r"data:[\w/.+-]*;base64,[\w+/=-]*")


def forms(key: str) -> list[str]:
    """A key as it is, percent-encoded, in hexadecimal and in base64.

    In base64 three bytes become four characters, so there are three forms, by what stands before the key; the first
    and last characters of each, which depend on the neighbours, are left out.
    """
    content = key.encode()
    found = [key, quote(key, safe=""), content.hex(), content.hex().upper()]
    for before in range(3):
        coded = base64.b64encode(bytes(before) + content).rstrip(b"=").decode()
        core = coded[-(-before * 8 // 6) : len(coded) - bool((before + len(content)) % 3)]
        found += [core, core.replace("+", "-").replace("/", "_")]
    return list(dict.fromkeys(form for form in found if form))


class Cleaner:
    """Cleans what a server says.

    Args:
        key: the key that it was sent; None for none.
    """

    def __init__(self, key: str | None) -> None:
        self.forms = sorted(forms(key), key=len, reverse=True) if key else []
        self.long = [form for form in self.forms if len(form) >= CERTAIN]
        pieces = {form[start : start + SHORTEST] for form in self.forms for start in range(len(form) - SHORTEST + 1)}
        # Overlapping pieces: each match of the lookahead covers SHORTEST characters.
        self.pieces = re.compile("(?=" + "|".join(map(re.escape, sorted(pieces))) + ")") if pieces else None

    def answer(self, text: str) -> str:
        """A model's answer: as it is, but for a key of at least 16 characters."""
        for form in self.long:
            text = text.replace(form, "(key)")
        return text

    def line(self, message: object) -> str:
        """A server's message: one line of at most 300 characters, without the key or a part of it, and escaped."""
        text = str(message)
        for form in self.forms:
            text = text.replace(form, "(key)")
        text = self._without_parts(text[:EXAMINED])
        text = for_terminal(" ".join(IMAGE.sub("(image)", text).split()))
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    def _without_parts(self, text: str) -> str:
        """The text without any run of 8 characters or more of the key."""
        if self.pieces is None:
            return text
        shown: list[str] = []
        end = 0
        for found in self.pieces.finditer(text):
            if found.start() > end or not shown:
                shown.append(f"{text[end : found.start()]}(key)")
            end = found.start() + SHORTEST
        return "".join(shown) + text[end:]
