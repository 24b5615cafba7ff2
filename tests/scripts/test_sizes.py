"""scripts/sizes.py runs the shipped recipes."""

from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def test_shipped_recipe_is_run_and_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import sizes

    small = {"heads": 4, "intermediate": 128, "vision_hidden": 32, "vision_layers": 2, "vision_heads": 2}
    monkeypatch.setattr(sizes, "SEVEN", replace(sizes.SEVEN, image_size=56, **small))
    sizes.main(["sft", "--hidden", "64", "--layers", "2", "--batches", "2"])
    row = capsys.readouterr().out.splitlines()[-1]
    what, _, seconds, rate = row.strip("| ").split(" | ")
    assert what == "SFT, 32 examples a step"
    assert float(rate) == pytest.approx(32 / float(seconds), rel=0.05)
