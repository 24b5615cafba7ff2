"""Makes messages of a server safe for terminals and files: one short line without the API key and without images."""

import base64
import re
from urllib.parse import quote

from safervlm.io.escape import for_terminal

SHORTEST = 8  # minimum length of a recognised part of a key, in characters; shorter parts may be words
CERTAIN = 16  # minimum length of a key that no response contains by chance, in characters
SHOWN = 300  # maximum length of a shown message, in characters
EXAMINED = 100_000  # characters of a message that are searched for parts of the key; the rest is dropped
IMAGE = re.compile(r"data:[\w/.+-]*;base64,[\w+/=-]*")


def forms(key: str) -> list[str]:
    """Returns the encodings under which a key is recognised: plain, percent-encoded, hexadecimal and base64.

    Base64 encodes three bytes as four characters, so there are three forms, depending on the offset of the key. The
    first and last characters of each form depend on the neighbouring bytes, and are omitted.

    Args:
        key: The API key.
    """
    content = key.encode()
    found = [key, quote(key, safe=""), content.hex(), content.hex().upper()]
    for before in range(3):
        coded = base64.b64encode(bytes(before) + content).rstrip(b"=").decode()
        core = coded[-(-before * 8 // 6) : len(coded) - bool((before + len(content)) % 3)]
        found += [core, core.replace("+", "-").replace("/", "_")]
    return list(dict.fromkeys(form for form in found if form))


class Cleaner:
    """Removes secrets, images and control characters from text of a server.

    Args:
        key: The API key that the server was sent; None for none.
    """

    def __init__(self, key: str | None) -> None:
        self.forms = sorted(forms(key), key=len, reverse=True) if key else []
        self.long = [form for form in self.forms if len(form) >= CERTAIN]
        pieces = {form[start : start + SHORTEST] for form in self.forms for start in range(len(form) - SHORTEST + 1)}
        # A lookahead, so that matches may overlap; each covers SHORTEST characters.
        self.pieces = re.compile("(?=" + "|".join(map(re.escape, sorted(pieces))) + ")") if pieces else None

    def answer(self, text: str) -> str:
        """Returns a model's response without the key; only forms of the key with at least 16 characters are removed.

        Args:
            text: The response.
        """
        for form in self.long:
            text = text.replace(form, "(key)")
        return text

    def line(self, message: object) -> str:
        """Returns a server's message as one escaped line of at most 300 characters, without the key or parts of it.

        A longer message is truncated, and ends in an ellipsis. Images are replaced by ``(image)``.

        Args:
            message: The message; converted to a string.
        """
        text = str(message)
        for form in self.forms:
            text = text.replace(form, "(key)")
        text = self._without_parts(text[:EXAMINED])
        text = for_terminal(" ".join(IMAGE.sub("(image)", text).split()))
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    def _without_parts(self, text: str) -> str:
        """Replaces any run of 8 or more characters of the key."""
        if self.pieces is None:
            return text
        shown: list[str] = []
        end = 0
        for found in self.pieces.finditer(text):
            if found.start() > end or not shown:
                shown.append(f"{text[end : found.start()]}(key)")
            end = found.start() + SHORTEST
        return "".join(shown) + text[end:]
