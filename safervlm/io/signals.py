"""Requests to end a command: SIGTERM and SIGINT (Ctrl-C), with one process or several.

A request is met in three ways, whichever comes first:

* Within :func:`safe_points` (the steps of training and predicting) the command completes the step at work, writes it to
  disk and ends.
* Anywhere else the command ends at once: ``SystemExit`` or ``KeyboardInterrupt`` is raised, which removes temporary
  files on its way.
* A thread ends the process ``SAFERVLM_GRACE`` seconds after the request (an environment variable; 4 by default), even
  while a library computes or waits outside of Python. What is on disk is consistent at any moment: records are flushed
  after each batch, and other files are moved into place.

Several processes of a run pass the request on to each other, and end when one of them dies.
"""

import multiprocessing
import os
import selectors
import signal
import socket
import subprocess
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
LOST = 1  # exit code where another process of the run died


@dataclass(frozen=True)
class Peer:
    """Another process of the run.

    Attributes:
        rank: its number in the run.
        pid: its process id.
        started: when it was started, so that a later process of the same id is not taken for it.
        host: the machine (its boot) and the name space of the process id.
    """

    rank: int
    pid: int
    started: str
    host: str

    def alive(self) -> bool:
        """Whether it is still running."""
        return start_time(self.pid) == self.started


@dataclass
class _Requests:
    """What this process was asked for."""

    listening: bool = False
    signum: int | None = None  # the first request
    handled: bool = False  # the main thread has heard of it
    safe_points: int = 0  # how many blocks wait for one
    lost: str = ""  # which other process died
    peers: list[Peer] = field(default_factory=list)
    children: Sequence["subprocess.Popen[Any]"] = ()


_requests = _Requests()


def asked_to_end() -> bool:
    """Whether this process is asked to end: whatever waits or repeats asks this, and stops."""
    return _requests.signum is not None or bool(_requests.lost)


def grace() -> float:
    """Seconds between a request to end and the end of the process.

    Raises:
        ArgumentError: the environment variable is not a positive number.
    """
    given = os.environ.get(GRACE, "4")
    with suppress(ValueError):
        if 0 < (seconds := float(given)) < 1e6:
            return seconds
    raise ArgumentError(f"{GRACE}: a number of seconds greater than 0, got {given!r}; correct it, or unset it")


@contextmanager
def listening() -> Iterator[None]:
    """Within it, requests to end are met as this module's description says; one within another changes nothing.

    A signal that the process ignores from its start (``nohup``, a shell's ``&``) stays ignored.
    """
    if _requests.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = grace()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # Python runs its handlers between two instructions of the main thread; this reaches the thread at any time.
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _requests.listening = True
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    watcher = threading.Thread(target=_watch, args=(reader, seconds), daemon=True, name="safervlm-signals")
    watcher.start()
    try:
        yield
        apart()  # after an exception they stay: why_ended() asks for them
    finally:
        if not asked_to_end():  # else the thread stays, until the process has ended
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            writer.close()
            watcher.join()
            reader.close()
            _requests.listening = False


@contextmanager
def safe_points() -> Iterator[None]:
    """Within it a first request to end raises nothing: the code asks :func:`asked_to_end` where it can end safely."""
    wait_for_safe_point()
    try:
        yield
    except BaseException:
        _requests.safe_points = max(0, _requests.safe_points - 1)
        raise
    pass_safe_point()


def wait_for_safe_point() -> None:
    """Begins what :func:`safe_points` does, where it can't be a ``with``."""
    _requests.safe_points += 1


def pass_safe_point() -> None:
    """Ends what :func:`wait_for_safe_point` began.

    Raises:
        SystemExit: the process was asked to end in between.
    """
    _requests.safe_points = max(0, _requests.safe_points - 1)
    if not _requests.safe_points and asked_to_end():
        raise SystemExit(exit_code())


def exit_code() -> int:
    """Of a command that was asked to end: 143 after SIGTERM, 130 after SIGINT, 1 after another process's death."""
    if _requests.signum is None and _requests.lost:
        return LOST
    return 128 + (_requests.signum or signal.SIGTERM)


def why_ended(error: BaseException | None) -> tuple[int, str] | None:
    """Whether an exception is how a request to end, or the death of another process, came to the main thread.

    Args:
        error: that ended the command.

    Returns:
        The exit code and the line to print, which is empty after a signal; None where the error has other causes.
    """
    if _requests.signum is not None:
        return exit_code(), ""
    if _requests.lost:
        return LOST, _requests.lost
    if error is not None and not isinstance(error, UserError) and _requests.peers:
        text = f"{type(error).__name__} {error}"
        if any(sign in text for sign in ("DistBackendError", "DistNetworkError", "DistStoreError", "gloo/", "NCCL")):
            return LOST, _line_of_the_lost(f"one that can't be reached: {first_line(error)[:200]}")
    return None


def together(rank: int) -> None:
    """Makes the processes of a run known to each other; all of them call it, with their process group at work.

    Those on one machine pass requests to end on, and end when one of them dies.

    Args:
        rank: of this process.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return
    me = Peer(rank, os.getpid(), start_time(os.getpid()), _host())
    everyone: list[Peer | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, me)
    _requests.peers = [peer for peer in everyone if peer is not None and peer.host == me.host and peer.pid != me.pid]


def apart() -> None:
    """From here on other processes may end without this one."""
    _requests.peers, _requests.children, _requests.lost = [], (), ""


def observe(child_processes: list["subprocess.Popen[Any]"]) -> None:
    """Takes the place of what Lightning starts to observe the processes that it launched.

    Lightning's kills this process by SIGKILL once one of them has ended, in the middle of whatever it writes.

    Args:
        child_processes: the other processes of the run, which this one has started.
    """
    _requests.children = child_processes


def keep_until_asked(worker: int = 0) -> None:
    """Run in a process that loads data: it outlives a signal to the whole group, so that its step can be completed.

    Args:
        worker: its number; the form that DataLoader's ``worker_init_fn`` has.
    """
    seconds = grace() + 1

    def end_later(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM's default action ends it

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def start_time(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty where there is none, or one that is dead already."""
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
        return f"unknown {os.getpid()}"  # no machine's, so that none of its processes is watched


def _handle(signum: int, frame: FrameType | None) -> None:
    first, _requests.handled = not _requests.handled, True
    _ask(signum)
    if _requests.safe_points and first:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _say(f"asked to end: the step at work is completed first, within {grace():g} seconds")
    elif signum == signal.SIGINT:
        raise KeyboardInterrupt
    elif first:
        raise SystemExit(exit_code())


def _ask(signum: int) -> None:
    """Notes the first request and passes it on."""
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
    """The thread: hears of signals and of other processes' deaths, and ends the process when its time is over."""
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
                # Twice: one that has come to its end as this one does may be a moment ahead.
                before, gone = gone, _gone()
                if gone and gone == before:
                    _requests.lost = _line_of_the_lost(gone)
        time.sleep(seconds)
    _end()


def _gone() -> str:
    """A process of the run that has ended before this one; empty while there is none."""
    gone = [f"rank {peer.rank}, process {peer.pid}" for peer in _requests.peers if not peer.alive()]
    gone += [f"process {child.pid}, exit code {child.poll()}" for child in _requests.children if child.poll()]
    return gone[0] if gone else ""


def _line_of_the_lost(which: str) -> str:
    return f"another process of this run has ended ({which}), so this one ends; the same command resumes the run"


def _end() -> None:
    """Ends the process at once. The processes that load its data end with it."""
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
    """In a forked process: signals are its own, and it has no watcher."""
    if not _requests.listening:
        return
    _requests.__init__()  # type: ignore[misc]
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: its parent decides


os.register_at_fork(after_in_child=_forget)
