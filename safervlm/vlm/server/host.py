"""One of the servers that share the work."""

import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from safervlm.errors import ArgumentError
from safervlm.io.escape import for_terminal


@dataclass
class Host:
    """One of the servers, and its state.

    Attributes:
        address: its base URL.
        client: speaks to it; made anew for each batch.
        left_out: parameters that it refused, to be sent under another name or not at all.
        busy: requests on their way.
        sent: requests so far.
        answered: answers so far.
        failures: in a row, counted once a rest.
        failing: the questions that met them.
        rested: when the last rest began, and
        ready: when it ends, by the monotonic clock.
        out: left out for good.
    """

    address: str
    client: Any = None
    left_out: set[str] = field(default_factory=set)
    busy: int = 0
    sent: int = 0
    answered: int = 0
    failures: int = 0
    failing: set[str] = field(default_factory=set)
    rested: float = -math.inf
    ready: float = -math.inf
    out: bool = False

    def succeed(self) -> None:
        """An answer came."""
        self.answered += 1
        self.recover()

    def recover(self) -> None:
        """What failed before says nothing about the server any more."""
        self.failures = 0
        self.failing.clear()


def hosts_at(addresses: Sequence[str]) -> list[Host]:
    """The servers at base URLs.

    Raises:
        ArgumentError: an address is no base URL, or contains more than one; a user name, password, query or fragment,
            which may be secret, is not repeated.
    """
    if not addresses or isinstance(addresses, str):
        raise ArgumentError(f"vlm.addresses: a list of base URLs, got {addresses!r}")
    return [Host(_checked(address)) for address in addresses]


def _checked(address: str) -> str:
    wanted = "a base URL such as http://localhost:8000/v1"
    if not isinstance(address, str):
        raise ArgumentError(f"vlm.addresses: {wanted}, got {address!r}")
    try:
        url: SplitResult | None = urlsplit(address)
        host = url.hostname if url is not None else None
    except ValueError:
        url, host = None, None
    if "@" in address or "?" in address or "#" in address:
        raise ArgumentError(
            f"vlm.addresses: the one at {for_terminal(host or '(no host)')} holds more than a place; a key is read "
            "from the environment variable vlm.api_key_variable"
        )
    if url is None or url.scheme not in ("http", "https") or not host:
        raise ArgumentError(f"vlm.addresses: {wanted}, got {address!r}")
    if not address.isascii() or not address.isprintable() or " " in address or "\\" in address:
        raise ArgumentError(
            f"vlm.addresses: a base URL has no spaces, backslashes, control characters or letters beyond ASCII, got "
            f"{address!a}"
        )
    try:
        _ = url.port
        if ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError as error:
        raise ArgumentError(f"vlm.addresses: {wanted}, got {address!r} ({error})") from None
    return address.rstrip("/")
