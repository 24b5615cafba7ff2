"""Imports only go down: a lower layer never knows a higher one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    (
        "errors",
        "limits",
        "escape",
        "signals",
        "caches",
        "reading",
        "names",
        "texts",
        "finite",
        "trust",
        "boundary",
        "recipes",
        "protocol",
        "records",
        "functional",
        "intervals",
        "differences",
        "diversity",
        "tables",
    ),
    ("images", "image_hashes", "pixels", "rules", "rating", "__init__"),
    ("scoring", "run"),
    ("checkpoints",),
    ("evaluation",),
    ("vlm", "data", "judge", "reports", "evaluation_report"),
    ("objectives", "measure"),
    ("pictograms", "arguments", "messages", "lightning_cli"),
    ("cli", "demo", "doctor", "verify"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = sorted((ROOT / "safervlm").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f".{alias.name}" for alias in node.names] if node.module == "safervlm" else [""]
            modules |= {f"{node.module}{name}" for name in names}
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(ROOT / "safervlm").parts[0].removesuffix(".py")
    assert part in LEVEL, f"{part} stands in no layer"
    for module in imported(path):
        top, *rest = module.split(".")
        assert top not in ("callbacks", "tests", "scripts"), f"{path} imports {module}"
        if top == "safervlm" and rest:
            assert LEVEL.get(rest[0], 0) <= LEVEL[part], f"{path} imports {module}, of a higher layer"


def test_callbacks_know_nothing_of_the_command_line() -> None:
    for path in (ROOT / "callbacks").glob("*.py"):
        assert not {"safervlm.cli", "safervlm.lightning_cli", "safervlm.demo"} & imported(path), path


def test_an_objective_is_one_short_file() -> None:
    for path in (ROOT / "safervlm" / "objectives").glob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines < (300 if path.stem == "ppo" else 150), f"{path}: {lines} lines"
