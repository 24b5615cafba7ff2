"""``callbacks.X`` resolves to the user's module, or to the shipped one if the user has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from safervlm.plugins import OURS

ROOT = Path(__file__).parent.parent


def imported(folder: Path, *modules: str, first: str = "") -> list[str]:
    """The files that modules would be imported from, in a process that is started in a folder; ``first`` is run."""
    code = f"import os, safervlm; from importlib.util import find_spec\n{first}\nfor name in {modules!r}:\n"
    code += "    print(find_spec(name).origin)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


@pytest.mark.parametrize("is_package", [False, True])
def test_the_users_callbacks_come_first(is_package: bool, tmp_path: Path) -> None:
    own = tmp_path / "callbacks"
    own.mkdir()
    for name in ("mine", "metrics_csv", *(["__init__"] if is_package else [])):
        (own / f"{name}.py").write_text("")
    found = imported(tmp_path, "callbacks.mine", "callbacks.metrics_csv", "callbacks.record_writer")
    assert found == [str(own / "mine.py"), str(own / "metrics_csv.py"), str(OURS / "record_writer.py")]


def test_they_come_first_while_a_configuration_elsewhere_is_read(tmp_path: Path) -> None:
    """The parser changes the current folder to that of the file; the path is that of ``safervlm predict``."""
    own = tmp_path / "callbacks"
    own.mkdir()
    (own / "mine.py").write_text("")
    moved = "from safervlm.io import trust; trust.allow_imports_from_current_folder(); os.chdir('/')"
    found = imported(tmp_path, "callbacks.mine", "callbacks.record_writer", first=moved)
    assert found == [str(own / "mine.py"), str(OURS / "record_writer.py")]


def test_shipped_callbacks_are_used_without_a_user_package(tmp_path: Path) -> None:
    (tmp_path / "callbacks.py").write_text("raise RuntimeError")  # no package: it can't hold ours
    assert imported(tmp_path, "callbacks.record_writer") == [str(OURS / "record_writer.py")]
