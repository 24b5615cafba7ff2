"""State of one server."""

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
    """One server, and its state.

    Attributes:
        address: Base URL.
        client: HTTP client; created anew for each batch.
        omitted: Parameters that the server rejected; sent under another name or not at all.
        busy: Number of requests in progress.
        sent: Number of requests so far.
        answered: Number of responses so far.
        failures: Number of consecutive failures, counted once per back-off period.
        failing: Ids of the questions that met these failures.
        suspended: Start of the last back-off period, by the monotonic clock.
        ready: End of the last back-off period, by the monotonic clock.
        excluded: Whether the server is permanently excluded.
        reported_marks: Whether it was reported that its responses begin inside the reasoning.
    """

    address: str
    client: Any = None
    omitted: set[str] = field(default_factory=set)
    busy: int = 0
    sent: int = 0
    answered: int = 0
    failures: int = 0
    failing: set[str] = field(default_factory=set)
    suspended: float = -math.inf
    ready: float = -math.inf
    excluded: bool = False
    reported_marks: bool = False

    def succeed(self) -> None:
        """Records a response, and resets the failures."""
        self.answered += 1
        self.recover()

    def recover(self) -> None:
        """Resets the consecutive failures."""
        self.failures = 0
        self.failing.clear()


def hosts_at(addresses: Sequence[str]) -> list[Host]:
    """Validates base URLs, and returns a server for each.

    Args:
        addresses: Base URLs, for example http://localhost:8000/v1.

    Raises:
        ArgumentError: An address is not a base URL, or has a user name, password, query or fragment. These may be
            secret, and are not repeated in the message.
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
            f"vlm.addresses: the one at {for_terminal(host or '(no host)')} contains a user name, a query (?) or a "
            "fragment (#); give only the base URL: a key is read from the environment variable vlm.api_key_variable"
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
