"""scripts/seeds_grpo.py: its commands, its tables, and bounds that are missed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with a temporary page."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import seeds_grpo

    monkeypatch.setattr(seeds_grpo, "PAGE", tmp_path / "seeds.md")
    seeds_grpo.PAGE.write_text("<!-- grpo -->\n<!-- end of grpo -->\n<!-- budget -->\nold\n<!-- end of budget -->\n")
    return seeds_grpo


@pytest.fixture
def measured(script: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``measured(name=(unsafe, safe, flagged, share), ...)``: replaces the results of the runs; those of all seeds."""

    def measured(**values: tuple[float, float, float, float | None]) -> None:
        def result(place: Path, seed: str, name: str, recipe: str, further: tuple[str, ...]) -> Any:
            unsafe, safe, flagged, share = values[name]
            columns = dict.fromkeys(script.COLUMNS, 1.0)
            columns |= {"image_unsafe": unsafe, "image_safe": safe, "over_flagging": flagged}
            return script.Result(pd.Series(columns), 50.0, share, 20.0, 0.7)

        monkeypatch.setattr(script, "result", result)
        monkeypatch.setattr(script, "play", lambda place, *words: 0.0)

    return measured


@pytest.mark.parametrize(("safe", "code"), [(92.1, 0), (91.9, 1)])
def test_ppo_and_grpo_are_compared_per_seed(
    script: Any, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, safe: float, code: int
) -> None:
    measured(ppo=(95.0, 80.0, 20.0, None), grpo=(96.0, safe, 4.0, None))
    monkeypatch.setattr("sys.argv", ["seeds_grpo.py", "--out", str(tmp_path)])
    assert script.main() == code
    page = script.PAGE.read_text()
    assert f"| 2 | grpo | 1.0 | 1.0 | 96.0 | {safe:.1f} | 1.0 | 1.0 | 4.0 | 50.0 |" in page
    assert "over all seeds: 1.00." in page
    assert "old" in page


@pytest.mark.parametrize(("flagged", "share", "code"), [(11.9, 11.9, 0), (12.1, 10.0, 1), (10.0, 12.1, 1)])
def test_a_budget_that_is_exceeded_by_two_points_fails(
    script: Any,
    measured: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flagged: float,
    share: float,
    code: int,
) -> None:
    without, strict = (90.0, 85.0, 14.0, 14.0), (80.0, 93.0, 6.0, 5.0)
    measured(**{"without": without, "with": (84.5, 89.0, flagged, share), "strict": strict})
    monkeypatch.setattr("sys.argv", ["seeds_grpo.py", "--budget", "--out", str(tmp_path)])
    assert script.main() == code
    page = script.PAGE.read_text()
    assert f"| 0 | 10 % | 20.0 | {share:.1f} | {flagged:.1f} | 84.5 | 89.0 | 0.7 | 50.0 |" in page
    assert "| 1 | none | 20.0 | 14.0 | 14.0 | 90.0 | 85.0 | 0.7 | 50.0 |" in page
    assert "| 1 | 5 % | 20.0 | 5.0 | 6.0 |" in page
    assert "old" not in page


def test_a_timed_run_is_not_trained_again(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "on-policy" / "with"
    played: list[str] = []

    def play(place: Path, *words: str) -> float:
        assert place == tmp_path
        played.append(words[0])
        if words[0] == "fit":
            assert not run.exists()  # what is left of an interrupted training is not resumed
            run.mkdir(parents=True)
            metrics = {"train/over_flagging": [0.2, 0.07], "train/budget_multiplier": [3.0, 0.5]}
            rows = [(batch, name, value) for name, each in metrics.items() for batch, value in enumerate(each)]
            pd.DataFrame(rows, columns=["batch", "metric", "value"]).to_csv(run / "metrics.csv", index=False)
        return 12.5

    monkeypatch.setattr(script, "play", play)
    monkeypatch.setattr(script, "load_run", lambda path: path)
    monkeypatch.setattr(script, "scores", lambda table: table)
    monkeypatch.setattr(script, "compare", lambda tables: pd.DataFrame({"image_safe": [0.9]}, index=list(tables)))
    (run / "adapter").mkdir(parents=True)
    first = script.result(tmp_path, "1", "with", "grpo", ())
    assert (first.seconds, first.multiplier) == (12.5, 0.5)
    assert (first.share, first.highest) == (pytest.approx(7), pytest.approx(20))
    assert first.scores["image_safe"] == pytest.approx(90)
    assert script.result(tmp_path, "1", "with", "grpo", ()).seconds == 12.5
    assert played == ["fit", "predict", "predict"]


def test_the_page_has_the_markers_of_grpo_and_of_the_budget() -> None:
    page = (SCRIPTS.parent / "docs" / "seeds.md").read_text(encoding="utf-8")
    for name in ("grpo", "budget"):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1
