"""Requests to end a command: SIGTERM and SIGINT (Ctrl-C), with one process or several.

A request is handled in the first of these ways that applies:

* Within :func:`safe_points` (the steps of training and prediction) the command completes the current step, writes it to
  disk and ends.
* Elsewhere the command ends at once: ``SystemExit`` or ``KeyboardInterrupt`` is raised, and temporary files are removed
  while it propagates.
* A thread ends the process ``SAFERVLM_GRACE`` seconds after the request (an environment variable; 4 by default), even
  while a library computes or waits outside Python. The files on disk are consistent at any moment: records are flushed
  after each batch, and other files are moved into place.

The processes of a run forward the request to each other, and end if one of them dies.
"""

import multiprocessing
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from safervlm.errors import ArgumentError, UserError, first_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = "SAFERVLM_GRACE"
LOST = 1  # exit code if another process of the run died


@dataclass(frozen=True)
class Peer:
    """Another process of the run.

    Attributes:
        rank: Rank of the process in the run.
        pid: Process id.
        started: Start time, which distinguishes it from a later process with the same id.
        host: Machine (its boot id) and the namespace of the process id.
    """

    rank: int
    pid: int
    started: str
    host: str

    def alive(self) -> bool:
        """Returns whether the process is still running."""
        return start_time(self.pid) == self.started


@dataclass
class _Requests:
    """State of the requests to this process."""

    listening: bool = False
    signum: int | None = None  # the first request
    handled: bool = False  # whether the handler has run in the main thread
    safe_points: int = 0  # number of open blocks that defer a request
    lost: str = ""  # message about another process that died
    peers: list[Peer] = field(default_factory=list)
    children: Sequence["subprocess.Popen[Any]"] = ()


_requests = _Requests()


def asked_to_end() -> bool:
    """Returns whether this process is asked to end; loops that wait or retry must check this and stop."""
    return _requests.signum is not None or bool(_requests.lost)


def grace() -> float:
    """Returns the seconds between a request to end and the forced end of the process.

    Raises:
        ArgumentError: The environment variable is not a positive number.
    """
    given = os.environ.get(GRACE, "4")
    with suppress(ValueError):
        if 0 < (seconds := float(given)) < 1e6:
            return seconds
    raise ArgumentError(f"{GRACE}: a number of seconds greater than 0, got {given!r}; correct it, or unset it")


@contextmanager
def listening() -> Iterator[None]:
    """Context manager that handles requests to end as described in this module; a nested call has no effect.

    A signal that the process has ignored since its start (``nohup``, a shell's ``&``) remains ignored.

    Raises:
        ArgumentError: The environment variable ``SAFERVLM_GRACE`` is invalid.
    """
    if _requests.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = grace()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # Python runs handlers only between instructions of the main thread; the wakeup socket notifies the thread at once.
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _requests.listening = True
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    watcher = threading.Thread(target=_watch, args=(reader, seconds), daemon=True, name="safervlm-signals")
    watcher.start()
    try:
        yield
        forget_peers()  # not after an exception, as exit_code_and_reason() uses the peers
    finally:
        if not asked_to_end():  # else the thread is needed until the process has ended
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            writer.close()
            watcher.join()
            reader.close()
            _requests.listening = False


@contextmanager
def safe_points() -> Iterator[None]:
    """Context manager that defers a first request to end; the code must check :func:`asked_to_end` at safe points.

    Raises:
        SystemExit: The process was asked to end inside the block; raised at its end.
    """
    wait_for_safe_point()
    try:
        yield
    except BaseException:
        _requests.safe_points = max(0, _requests.safe_points - 1)
        raise
    pass_safe_point()


def wait_for_safe_point() -> None:
    """Begins to defer requests to end, like :func:`safe_points`, where a ``with`` block is impossible."""
    _requests.safe_points += 1


def pass_safe_point() -> None:
    """Ends the deferral begun by :func:`wait_for_safe_point`.

    Raises:
        SystemExit: The process was asked to end in between.
    """
    _requests.safe_points = max(0, _requests.safe_points - 1)
    if not _requests.safe_points and asked_to_end():
        raise SystemExit(exit_code())


def exit_code() -> int:
    """Returns the exit code of a command that was asked to end.

    It is 143 after SIGTERM, 130 after SIGINT, and 1 after the death of another process.
    """
    if _requests.signum is None and _requests.lost:
        return LOST
    return 128 + (_requests.signum or signal.SIGTERM)


def exit_code_and_reason(error: BaseException | None) -> tuple[int, str] | None:
    """Returns whether a command ended because of a request to end, or the death of another process.

    Args:
        error: Exception that ended the command.

    Returns:
        The exit code and the line to print, which is empty after a signal; None if the error has another cause.
    """
    if _requests.signum is not None:
        return exit_code(), ""
    if _requests.lost:
        return LOST, _requests.lost
    if error is not None and not isinstance(error, UserError) and _requests.peers:
        text = f"{type(error).__name__} {error}"
        if any(sign in text for sign in ("DistBackendError", "DistNetworkError", "DistStoreError", "gloo/", "NCCL")):
            return LOST, _peer_lost_message(f"one that can't be reached: {first_line(error)[:200]}")
    return None


def watch_peers(rank: int) -> None:
    """Exchanges the process ids of a run's processes; a collective operation that requires the process group.

    The processes on one machine then forward requests to end, and end if one of them dies.

    Args:
        rank: Rank of this process.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return
    me = Peer(rank, os.getpid(), start_time(os.getpid()), _host())
    everyone: list[Peer | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, me)
    _requests.peers = [peer for peer in everyone if peer is not None and peer.host == me.host and peer.pid != me.pid]


def forget_peers() -> None:
    """Stops monitoring the other processes, which may end from now on."""
    _requests.peers, _requests.children, _requests.lost = [], (), ""


def observe(child_processes: list["subprocess.Popen[Any]"]) -> None:
    """Replaces Lightning's observer of the processes that it launched.

    Lightning's observer kills this process by SIGKILL once one of them has ended, possibly in the middle of a write.

    Args:
        child_processes: Other processes of the run, started by this one.
    """
    _requests.children = child_processes


def defer_signal_in_worker(worker: int = 0) -> None:
    """Lets a data-loading process survive a signal to its process group, so that the current step can be completed.

    Args:
        worker: Index of the worker; unused, as required by DataLoader's ``worker_init_fn``.

    Raises:
        ArgumentError: The environment variable ``SAFERVLM_GRACE`` is invalid.
    """
    seconds = grace() + 1

    def end_later(number: int, frame: FrameType | None) -> None:
        if sys.platform != "win32":  # there, nothing sends this signal
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM's default action ends it

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def start_time(pid: int) -> str:
    """Returns when a process was started, in the kernel's clock ticks; empty if it does not exist or is a zombie.

    Args:
        pid: Process id.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state[0] in "ZX" else state[19]


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {os.getpid()}"  # equals no other process's host, so that none is monitored


def _handle(signum: int, frame: FrameType | None) -> None:
    first, _requests.handled = not _requests.handled, True
    _ask(signum)
    if _requests.safe_points and first:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _say(f"asked to end: the current step is completed first, within {grace():g} seconds")
    elif signum == signal.SIGINT:
        raise KeyboardInterrupt
    elif first:
        raise SystemExit(exit_code())


def _ask(signum: int) -> None:
    """Records the first request and forwards it to the other processes."""
    if _requests.signum is not None:
        return
    _requests.signum = signum
    for child in _requests.children:
        with suppress(OSError):
            child.send_signal(signal.SIGTERM)
    for peer in _requests.peers:
        with suppress(OSError):
            if peer.alive():
                os.kill(peer.pid, signal.SIGTERM)


def _watch(reader: socket.socket, seconds: float) -> None:
    """Body of the thread: receives signals, detects dead processes, and ends the process after the grace period."""
    gone = ""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while not asked_to_end():
            if selector.select(timeout=1.0):
                numbers = reader.recv(64)
                if not numbers:
                    return
                for number in numbers:
                    if number in SIGNALS:
                        _ask(number)
            else:
                # Only if found twice: at the regular end of a run another process may end a moment earlier.
                before, gone = gone, _gone()
                if gone and gone == before:
                    _requests.lost = _peer_lost_message(gone)
        time.sleep(seconds)
    _end()


def _gone() -> str:
    """Returns a description of a process of the run that has ended before this one; empty if there is none."""
    gone = [f"rank {peer.rank}, process {peer.pid}" for peer in _requests.peers if not peer.alive()]
    gone += [f"process {child.pid}, exit code {child.poll()}" for child in _requests.children if child.poll()]
    return gone[0] if gone else ""


def _peer_lost_message(which: str) -> str:
    return f"another process of this run has ended ({which}), so this one ends; the same command resumes the run"


def _end() -> None:
    """Ends the process and its data-loading processes at once."""
    if _requests.lost and _requests.signum is None:
        _say(_requests.lost)
    else:
        _say("ended in the middle of a step, which the same command repeats")
    with suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(exit_code())


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"safervlm: {line}\n".encode())


def _forget() -> None:
    """Resets the state in a forked process, which has no watching thread and handles signals itself."""
    if not _requests.listening:
        return
    _requests.__init__()  # type: ignore[misc]
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent handles it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
