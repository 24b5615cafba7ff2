"""Library errors after the death of another process become one line; SaferVLM's own errors are unchanged."""

import pytest

from safervlm.errors import RecordError
from safervlm.io import signals
from safervlm.io.signals import Peer, _Requests, exit_code_and_reason, listening

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"


@pytest.mark.parametrize(
    ("error", "peers", "ended"),
    [
        (RuntimeError(GLOO), True, True),
        (RuntimeError("NCCL communicator was aborted on rank 0"), True, True),
        (RuntimeError(GLOO), False, False),
        (RuntimeError("shape mismatch"), True, False),
        (RecordError("x: NCCL is not an image"), True, False),
    ],
)
def test_library_error_after_the_death_of_a_peer_process_is_explained(
    error: Exception, peers: bool, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_requests", _Requests())
    with pytest.raises(type(error)), listening():  # noqa: PT012
        signals._requests.peers = [Peer(1, 1, "", "")] if peers else []
        raise error
    why = exit_code_and_reason(error)
    assert (why is not None) == ended
    if why:
        code, line = why
        assert code == 1
        assert line.startswith("another process of this run has ended")
        assert len(line.splitlines()) == 1
