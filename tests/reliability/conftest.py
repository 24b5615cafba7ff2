"""Fixtures shared by the tests of servers."""

from collections.abc import Callable, Iterator

import pytest
from raw_server import RawServer, Reply


@pytest.fixture
def raw() -> Iterator[Callable[..., RawServer]]:
    servers = []

    def start(play: Callable[[int], Reply]) -> RawServer:
        servers.append(RawServer(play))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
