"""Removal of secrets from addresses, messages and command lines before they are recorded or shown.

A user name, a password and a query (often a token or a signature) of an address may be secret. They are used for the
request alone, and are in no manifest, configuration, record, log, page or message. The same applies to the keys in
environment variables, wherever an exception or an argument contains one.
"""

import os
import re
from urllib.parse import quote

from safervlm.hashing import fingerprint

# An address in a text, up to a character that is rarely part of one. An address converted to a path has one slash.
_IN_TEXT = re.compile(r"""[A-Za-z][\w+.-]*:/+[^\s"'<>`]*[^\s"'<>`.,:;!)\]}]""")
_PARTS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*:/+)(?P<host>[^/?#\s]*)(?P<path>[^?#\s]*)(?P<rest>\S*)")
_NO_PORT = re.compile(r"(?!\[).*:(?!\d*$)")  # the beginning of a password with characters that have to be encoded
_HASHED = re.compile(r"#query-[0-9a-f]{8}")

# Environment variables whose values are secret; a server adds that of its key. The values are not stored.
SECRET_VARIABLES = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"}
SHORTEST_KEY = 8  # characters; a shorter value, such as EMPTY, may be a word


def is_address(text: str) -> bool:
    """Returns whether a text is an address, such as ``https://host/file.tsv``, and not a path.

    Args:
        text: Value of an argument.
    """
    return re.match(r"\s*[A-Za-z][\w+.-]*://", text) is not None


def has_user(address: str) -> bool:
    """Returns whether an address contains a user name or a password.

    Args:
        address: Address.
    """
    parts = _PARTS.fullmatch(address.strip())
    return parts is not None and ("@" in parts["host"] or _NO_PORT.match(parts["host"]) is not None)


def public(address: str) -> str:
    """Returns an address without user name and password, and with a hash in place of its query and fragment.

    ``https://me:pw@host/x.tsv?token=1`` becomes ``https://host/x.tsv#query-1a2b3c4d``. The hash distinguishes addresses
    that differ in their query. An address without such parts, or one that this function returned, is unchanged.

    Args:
        address: Address; any other text is returned unchanged.
    """
    parts = _PARTS.fullmatch(address)
    if parts is None:
        return address
    host, rest = parts["host"].rpartition("@")[2], parts["rest"]
    if _NO_PORT.match(host):
        return f"{parts['scheme']}..."
    if rest and not _HASHED.fullmatch(rest):
        rest = f"#query-{fingerprint(rest)[:8]}"
    return f"{parts['scheme']}{host}{parts['path']}{rest}"


def public_text(text: str) -> str:
    """Returns a text without keys, in which each address has its public form (see :func:`public`).

    Args:
        text: Message, command line or traceback.
    """
    for variable in SECRET_VARIABLES:
        key = os.environ.get(variable, "").strip()
        if len(key) >= SHORTEST_KEY:
            for form in (key, quote(key, safe="", errors="replace")):
                text = text.replace(form, "(key)")
    return _IN_TEXT.sub(lambda found: public(found[0]), text) if ":/" in text else text
