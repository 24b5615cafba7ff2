"""scripts/decoding.py: both sides return the same responses, on a shape too small to measure time."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = str(Path(__file__).parent.parent.parent / "scripts")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)
    script = import_module("decoding")
    tiny = {"hidden": 32, "intermediate": 64, "layers": 2, "heads": 2, "vocabulary": 160, "image_size": 28, "rank": 4}
    monkeypatch.setattr(script, "SHAPE", script.Shape(**tiny, vision_hidden=16, vision_layers=2))
    monkeypatch.setattr(script, "machine", lambda: "a machine")
    yield script
    for name in {"decoding", "benchmark"} - before:
        sys.modules.pop(name, None)


def test_growing_and_fixed_decoding_are_compared(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--repeats", "1", "--tokens", "5"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(script.CASES)
    operators = {cells[1].strip(): cells[7:9] for cells in (line.split("|") for line in table[1:])}
    growing, fixed = (int(count) for count in operators["Llava, 16 questions, greedy, adapter"])
    assert 0 < fixed < growing


def test_different_responses_end_the_script_with_an_error(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.Measured, "generate", lambda self, side, tokens: (1.0, side))
    with pytest.raises(SystemExit, match="are not equal"):
        script.main(["--repeats", "1", "--tokens", "5"])
