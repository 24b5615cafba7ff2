"""Further fields of requests to a server."""

import json
from collections.abc import Mapping
from typing import Any

from safervlm.errors import ArgumentError
from safervlm.vlm.server.outcomes import SETTINGS

# Fields that have separate arguments, or would change the meaning of a response.
TAKEN = SETTINGS | {"model": "vlm.model", "messages": "vlm.system"}
NEVER = ("n", "stream")  # a question has one response, in one body


def checked_body(body: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the setting ``vlm.extra_body`` if it can be sent.

    Args:
        body: Further fields of each request; None for none.

    Raises:
        ArgumentError: A field has a separate argument, or a value is not plain JSON.
    """
    given = dict(body or {})
    if name := next((name for name in given if name in TAKEN), None):
        raise ArgumentError(f"vlm.extra_body: {name!r} has an argument of its own; give {TAKEN[name]}")
    if name := next((name for name in given if name in NEVER), None):
        raise ArgumentError(f"vlm.extra_body: {name!r} would change what a response is; remove it")
    try:
        json.dumps(given, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise ArgumentError(f"vlm.extra_body: plain JSON values are needed, got {ascii(given)[:80]}") from None
    return given
