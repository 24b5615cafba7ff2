"""Folders that are built in a temporary place: complete or absent, safe under concurrency, without leftovers."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safervlm.errors import ArgumentError
from safervlm.io.caches import TEMPORARY, build_folder, remove_leftovers, temporary
from safervlm.io.files import write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "x.1"
    build_folder(folder, lambda aside: (aside / "a").write_text("first"))
    build_folder(folder, lambda aside: (aside / "a").write_text("second"))
    assert (folder / "a").read_text() == "first"
    assert names(folder.parent) == ["x.1"]


def test_builder_exception_is_raised_and_leaves_no_files(tmp_path: Path) -> None:
    def fails(aside: Path) -> None:
        (aside / "half").mkdir()
        (aside / "half" / "a").write_text("a")
        raise OSError(28, "No space left on device", str(aside))

    with pytest.raises(OSError, match="No space left"):
        build_folder(tmp_path / "x", fails)
    assert names(tmp_path) == []


def test_slower_concurrent_builder_uses_the_folder_of_the_faster(tmp_path: Path) -> None:
    """Two concurrent builders: the second one to finish uses the folder of the first."""

    def slow(aside: Path) -> None:
        (aside / "a").write_text("slow")
        build_folder(tmp_path / "x", lambda other: (other / "a").write_text("fast"))

    build_folder(tmp_path / "x", slow)
    assert (tmp_path / "x" / "a").read_text() == "fast"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("place", ["file/cache/x", "file/x", "file"])
def test_uncreatable_cache_folder_names_the_argument(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArgumentError, match=r"^data\.cache_dir: .*: (name|remove)") as caught:
        build_folder(tmp_path / place, lambda aside: (aside / "a").write_text("a"))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file"]


def test_only_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    for mine in (".tmp-mine", "tmp-safervlm-x", f"x{TEMPORARY}"):
        (tmp_path / mine).write_text("mine")
    with temporary(tmp_path / "a.csv") as file, temporary(tmp_path / "b", directory=True) as folder:
        assert file.name.startswith(TEMPORARY)
        assert file.suffix == ".csv"
        (tmp_path / f"{TEMPORARY}1-dead").mkdir()
        (tmp_path / f"{TEMPORARY}1-dead" / "a").write_text("a")
        (tmp_path / f"{TEMPORARY}2-dead.csv").write_text("a")
        assert remove_leftovers(tmp_path) == [f"{TEMPORARY}1-dead", f"{TEMPORARY}2-dead.csv"]
        assert file.is_file()
        assert folder.is_dir()
    assert names(tmp_path) == sorted([".tmp-mine", "tmp-safervlm-x", f"x{TEMPORARY}"])


def test_symbolic_link_is_not_followed_when_removing_leftovers(tmp_path: Path) -> None:
    """A user's folder is never emptied through a link."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("a")
    (tmp_path / f"{TEMPORARY}link").symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert (tmp_path / "mine" / "a").read_text() == "a"


def test_leftovers_of_a_killed_builder_are_removed_by_the_next_build(tmp_path: Path) -> None:
    """After a process is killed while writing a folder and a file, the next build in the same place removes both."""
    program = (
        "import sys, time; from pathlib import Path; from safervlm.io.caches import build_folder\n"
        "from safervlm.io.files import write_atomically\n"
        "def hang(path): path.write_text('half'); print('there', flush=True); time.sleep(60)\n"
        "where = Path(sys.argv[1])\n"
        "build_folder(where / 'x', lambda aside: (aside / 'a').write_text('half') and "
        "write_atomically(where / 'f.csv', hang))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"there\n"
    assert len(names(tmp_path)) == 2
    assert remove_leftovers(tmp_path) == []  # the process is alive
    child.kill()
    child.communicate()
    write_atomically(tmp_path / "y", lambda file: file.write_text("whole"))
    assert names(tmp_path) == ["y"]


def test_concurrent_builds_all_succeed_with_one_folder(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        if not (child := os.fork()):
            try:
                build_folder(
                    tmp_path / "x", lambda aside, n=number: [(aside / "a").write_text(str(n)), time.sleep(0.05)]
                )
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert names(tmp_path) == ["x"]


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.txt", lambda file: file.write_text("a"))
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_private_files_get_umask_permissions_when_published(tmp_path: Path) -> None:
    def private(file: Path) -> None:  # as safetensors does
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)

    def build(folder: Path) -> None:
        (folder / "sub").mkdir()
        private(folder / "sub" / "a.bin")
        (folder / "run.sh").touch(mode=0o755)
        (folder / "link").symlink_to(tmp_path / "elsewhere")

    private(tmp_path / "elsewhere")
    before = os.umask(0o026)
    try:
        build_folder(tmp_path / "world", build)
        write_atomically(tmp_path / "b.bin", private)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.*") if file.is_file()}
    assert modes == {"a.bin": 0o640, "run.sh": 0o751, "b.bin": 0o640}
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["b.bin", "elsewhere", "world"]


@pytest.mark.parametrize("parent", ["nowhere", "file"])
def test_error_names_the_unwritable_parent_folder(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=parent) as caught, temporary(tmp_path / parent / "x"):
        pass
    assert caught.value.filename == str(tmp_path / parent)
