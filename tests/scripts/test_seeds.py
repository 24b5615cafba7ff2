"""scripts/seeds.py: its tables, and bounds that are met narrowly."""

from pathlib import Path

import pandas as pd
import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The script, with a temporary page and without running demos."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import seeds

    monkeypatch.setattr(seeds, "PAGE", tmp_path / "seeds.md")
    seeds.PAGE.write_text(
        "before\n<!-- seeds -->\nold\n<!-- end of seeds -->\n<!-- roundings -->\n<!-- end of roundings -->\n"
    )
    return seeds


def table(safe: float) -> pd.DataFrame:
    aligned = [0.97, 0.95, 0.95, safe, 0.0, 0.01]
    rows = {"original": [0.98, 0.99, 0.3, 0.95, 0.69, 0.01], "sft": aligned, "dpo": aligned, "ppo": aligned}
    columns = ["perception", "text_only_unsafe", "image_unsafe", "image_safe", "modality_gap", "na_rate"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


@pytest.mark.parametrize(("safe", "code"), [(0.919, 0), (0.899, 1)])
def test_table_is_written_between_its_markers_and_a_missed_bound_fails(
    seeds, monkeypatch: pytest.MonkeyPatch, capsys, safe: float, code: int
) -> None:
    played: list[tuple[str, object]] = []
    scores = {("--seed", "0"): 0.95, ("--seed", "1"): safe, ("--seed", "2"): 0.96}

    def play(place: Path, variant: tuple[tuple[str, ...], dict[str, str]]) -> pd.DataFrame:
        played.append((place.name, variant[0]))
        return table(scores[variant[0]])

    monkeypatch.setattr(seeds, "play", play)
    monkeypatch.setattr("sys.argv", ["seeds.py", "--out", "runs"])
    assert seeds.main() == code
    assert [name for name, _ in sorted(played)] == ["seed-0", "seed-1", "seed-2"]
    page = seeds.PAGE.read_text()
    assert page.startswith("before\n<!-- seeds -->\n\n| seed | run |")
    assert "old" not in page
    assert "<!-- roundings -->\n<!-- end of roundings -->" in page
    assert f"| 1 | sft | 97.0 | 95.0 | 95.0 | {100 * safe:.1f} | 0.0 | 1.0 |" in page
    assert f"| range | ppo | 97.0 to 97.0 | 95.0 to 95.0 | 95.0 to 95.0 | {100 * safe:.1f} to 96.0 |" in page
    assert f"| sft, image safe at least 90 | {100 * safe - 90:.1f} | 1 |" in page
    line = "1: sft, image_safe at least 90: met by -0.1 points, 0.0 are needed"
    assert (line in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(("safe", "code"), [(0.921, 0), (0.919, 1)])
def test_bound_met_narrowly_with_another_rounding_fails(
    seeds, monkeypatch: pytest.MonkeyPatch, capsys, safe: float, code: int
) -> None:
    monkeypatch.setattr(seeds, "play", lambda place, variant: table(safe if "avx2" in place.name else 0.95))
    monkeypatch.setattr("sys.argv", ["seeds.py", "--roundings", "--out", "runs"])
    assert seeds.main() == code
    line = "ATEN_CPU_CAPABILITY=avx2: sft, image_safe at least 90: met by 1.9 points, 2.0 are needed"
    assert (line in capsys.readouterr().err) == bool(code)


def test_at_least_six_different_roundings_are_configured(seeds) -> None:
    assert len({repr(variant) for variant in seeds.ROUNDINGS.values()}) == len(seeds.ROUNDINGS) >= 6


def test_the_page_has_the_markers() -> None:
    page = (SCRIPTS.parent / "docs" / "seeds.md").read_text(encoding="utf-8")
    for name in ("seeds", "roundings"):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1
