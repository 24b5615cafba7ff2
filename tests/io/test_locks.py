"""Locks: who is rejected, who waits, and when the operating system releases them."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safervlm.io import locks
from safervlm.io.caches import TEMPORARY, remove_leftovers, temporary
from safervlm.io.locks import acquire, holder


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    held = acquire(tmp_path / "a", create=True)
    held.write_process()
    assert holder(tmp_path / "a") == str(os.getpid())
    with pytest.raises(BlockingIOError):
        acquire(tmp_path / "a")
    begun = time.monotonic()
    with pytest.raises(BlockingIOError):
        acquire(tmp_path / "a", wait=0.2)
    assert time.monotonic() - begun >= 0.2
    held.close()
    held.close()
    acquire(tmp_path / "a").close()
    acquire(tmp_path).close()  # a folder


def test_garbage_collected_lock_is_released(tmp_path: Path) -> None:
    acquire(tmp_path / "a", create=True)
    acquire(tmp_path / "a").close()


@pytest.mark.parametrize("content", ["mine", "12 apples", "\x00"])
def test_user_file_with_the_name_of_a_lock_keeps_its_content(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(content)
    held = acquire(tmp_path / ".lock", create=True)
    held.write_process()
    held.close()
    assert (tmp_path / ".lock").read_text() == content
    assert holder(tmp_path / ".lock") is None


def test_symbolic_link_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (tmp_path / ".lock").symlink_to("mine")
    with pytest.raises(OSError, match="symbolic links"):
        acquire(tmp_path / ".lock", create=True)


@pytest.mark.parametrize("worker", ["fork", "subprocess"])
def test_a_killed_holder_frees_the_lock_though_its_worker_lives(worker: str, tmp_path: Path) -> None:
    """A worker of a data loader inherits open files; it may outlive the process that was killed."""
    program = (
        "import os, subprocess, sys, time; from pathlib import Path\n"
        "from safervlm.io.locks import acquire; from safervlm.io.caches import temporary\n"
        "where = Path(sys.argv[1]); held = acquire(where / 'a', create=True)\n"
        "with temporary(where / 'b.csv'):\n"
        "    if sys.argv[2] == 'fork':\n"
        "        child = os.fork()\n"
        "        if not child: time.sleep(60); os._exit(0)\n"
        "    else: child = subprocess.Popen(['sleep', '60'], close_fds=False).pid\n"
        "    print(child, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), worker], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        time.sleep(0.2)  # the child closes what it inherited
        with pytest.raises(BlockingIOError):
            acquire(tmp_path / "a")
        assert remove_leftovers(tmp_path) == []
        process.kill()
        process.wait()
        os.kill(child, 0)  # alive
        acquire(tmp_path / "a").close()
        assert len(remove_leftovers(tmp_path)) == 1
    finally:
        process.kill()
        process.stdout.close()
        os.kill(child, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_forked_process_that_closes_a_lock_keeps_that_of_its_parent(tmp_path: Path) -> None:
    held = acquire(tmp_path / "a", create=True)
    if not (child := os.fork()):
        held.close()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(BlockingIOError):
        acquire(tmp_path / "a")
    held.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_file_system_without_locks_is_reported_and_nothing_is_removed(
    code: int, tmp_path: Path, monkeypatch, capfd
) -> None:
    """Files are written, files of other processes are not removed, and this is reported in one line."""

    def fails(descriptor: int, blocking: bool) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks, "lock_descriptor", fails)
    monkeypatch.setattr(locks, "_without_locks", set())
    (tmp_path / f"{TEMPORARY}1-alive").mkdir()
    for _ in range(2):
        with temporary(tmp_path / "a.csv") as file:
            file.write_text("a")
            file.replace(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "a"
    said = capfd.readouterr().err
    assert said.count("has no locks") == (0 if code == errno.EBADF else 1)
    if code != errno.EBADF:  # which is about files that can't be opened for writing
        assert (tmp_path / f"{TEMPORARY}1-alive").is_dir()
