"""``callbacks.X`` is the user's module, or ours where the user has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from safervlm.plugins import OURS

ROOT = Path(__file__).parent.parent


def imported(folder: Path, *modules: str) -> list[str]:
    """The files that modules would be imported from, in a process that is started in a folder."""
    code = f"import safervlm; from importlib.util import find_spec\nfor name in {modules!r}:\n"
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


def test_without_a_folder_of_the_users_they_are_ours(tmp_path: Path) -> None:
    (tmp_path / "callbacks.py").write_text("raise RuntimeError")  # no package: it can't hold ours
    assert imported(tmp_path, "callbacks.record_writer") == [str(OURS / "record_writer.py")]
