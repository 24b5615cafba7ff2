"""scripts/gpu_check.py and gpu_tables.py: control flow with a tiny model on a CPU, and the tables."""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
SMALL = {"heads": 4, "intermediate": 64, "vision_hidden": 16, "vision_layers": 2, "vision_heads": 2, "image_size": 28}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script for a tiny model; data, judge and training steps are replaced (tests/scripts/test_sizes.py)."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    sizes = gpu_check.sizes
    monkeypatch.setattr(sizes, "SEVEN", replace(sizes.SEVEN, vocabulary=64, hidden=32, layers=2, **SMALL))
    monkeypatch.setattr(sizes, "write_data", lambda *_, **__: None)
    monkeypatch.setattr(sizes, "write_judge", lambda *_: None)
    monkeypatch.setattr(
        sizes, "play", lambda recipe, count, *_, **__: sizes.Played(recipe, count, 3.21, None if recipe == "ppo" else 2)
    )
    monkeypatch.setattr(gpu_check, "LENGTHS", (32, 33))
    cases = (gpu_check.Case(2), gpu_check.Case(4, 2, sampled=True), gpu_check.Case(1, adapter=True))
    monkeypatch.setattr(gpu_check, "CASES", cases)
    return gpu_check


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_tables

    return gpu_tables


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))


def test_every_benchmark_result_is_measured_or_has_a_reason(
    check: ModuleType, tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A clock on which a token takes 3 ms, as the times of so small a model are noise.
    generate, now = check.Llava.generate, [0.0]

    def timed(vlm: Any, batch: Any, sampling: Any, *rest: Any) -> Any:
        now[0] += 0.003 * sampling.max_new_tokens
        return generate(vlm, batch, sampling, *rest)

    monkeypatch.setattr(check.Llava, "generate", timed)
    monkeypatch.setattr(check, "time", SimpleNamespace(**vars(time) | {"perf_counter": lambda: now[0]}))
    # The profiler takes seconds for the operations of a CPU.
    lengths: list[float] = []

    def counted(run: Any) -> dict[str, float]:
        lengths.append(run())
        return {"launches": 100 * len(lengths), "kernels": 200 * len(lengths), "gpu_ms": 0.5 * len(lengths)}

    monkeypatch.setattr(check, "profiled", counted)
    test = tmp_path / "test_it.py"
    marks = "".join(f"@pytest.mark.gpu\ndef test_{name}():\n    assert {name}\n" for name in ("True", "False"))
    test.write_text(f"import pytest\n{marks}def test_other():\n    pass\n")
    with pytest.raises(SystemExit, match="1"):
        check.main(["--out", str(tmp_path), "--hidden", "32", "--layers", "2", "--tokens", "6", "--tests", str(test)])
    found = figures(tmp_path)
    assert found["tests"] == {"failed": 1, "passed": 1}
    assert found["attention"]["differences"].keys() == {"32", "33"}
    assert max(found["attention"]["differences"].values()) < 0.05
    for entry in found["generation"]:
        per_step = {"step_ms", "launches", "kernels", "gpu_ms"}
        assert entry.keys() - vars(check.CASES[0]).keys() == {"memory", "batch_s"} | per_step
        assert [entry[name] for name in ("launches", "kernels", "gpu_ms")] == [12.5, 25.0, round(0.5 / 8, 1)]
        assert entry["step_ms"] == 3.0
    assert found["training"][0] == {"recipe": "sft", "examples": 32, "memory": 3.2, "batch_s": 2}
    assert found["training"][2] == {"recipe": "ppo", "examples": 32, "missing": "RuntimeError: the recipe failed"}
    assert found["seconds"] >= 0
    assert found["shape"]["hidden"] == 32
    text = tables.tables(found)
    assert "| SFT, 32 examples a step | 3.2 | 2 | 16 |" in text
    assert "| PPO, 32 examples a step | not measured | not measured | not measured |" in text
    assert "4 questions, 2 per image, sampled |" in text
    assert "Of the tests marked `gpu`, 1 failed, 1 passed." in text
    assert ": rounding only; largest difference" in text


def test_kernels_are_counted_on_a_gpu_only(check: ModuleType) -> None:
    ran: list[int] = []
    assert set(check.profiled(lambda: ran.append(1)).values()) == {0}
    assert ran


def test_a_graph_is_one_launch_of_many_kernels(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, device: str = "CPU", micros: float = 0.0) -> SimpleNamespace:
        span = SimpleNamespace(elapsed_us=lambda: micros)
        return SimpleNamespace(name=name, device_type=getattr(check.DeviceType, device), time_range=span)

    driver = ["cudaLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize", "aten::mm"]
    kernels = [event(f"gemm {number}", "CUDA", 40.0) for number in range(5)]
    found = SimpleNamespace(events=lambda: [*map(event, driver), *kernels])
    monkeypatch.setattr(check, "profile", lambda **_: nullcontext(found))
    assert check.profiled(lambda: None) == {"launches": 3, "kernels": 5, "gpu_ms": 0.2}


def test_benchmarks_are_skipped_when_no_time_is_left(check: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1"):
        check.main(["--out", str(tmp_path), "--hidden", "32", "--layers", "2", "--minutes", "0.4"])
    found = figures(tmp_path)
    assert "differences" in found["attention"]
    assert [entry["missing"] for entry in [found["tests"], *found["generation"], *found["training"]]] == [
        "no time left"
    ] * 7
    assert "were not run (no time left)" in tables.tables(found)


def test_failing_benchmark_does_not_end_the_others(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no\nluck")

    for name in ("run_tests", "attention", "generation"):
        monkeypatch.setattr(check, name, fail)
    with pytest.raises(SystemExit, match="1"):
        check.main(["--out", str(tmp_path), "--hidden", "32", "--layers", "2"])
    found = figures(tmp_path)
    failed = [found["tests"], found["attention"], *found["generation"]]
    assert {entry["missing"] for entry in failed} == {"ValueError: no"}
    assert found["training"][1]["batch_s"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of Unix")
def test_process_sets_an_alarm_for_the_time_limit(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(check.signal, "alarm", asked.append)
    with pytest.raises(SystemExit, match="1"):
        check.main(["--out", str(tmp_path), "--hidden", "32", "--layers", "2", "--minutes", "0.4"])
    assert asked == [24, 0]


def test_estimates_are_marked(tables: ModuleType) -> None:
    case = {"questions": 16, "per_image": 1, "sampled": False, "adapter": False}
    row = tables.generation_row(case | {"step_ms": 9.04, "batch_s": 1.6})
    assert row == "| 16 questions, greedy | not measured | 9.04 | not measured | 1,414 (estimate) | not measured | 10 |"
    assert "24 (estimate)" in tables.generation_row(case | {"missing": "no time left"})
    assert "estimate" not in tables.generation_row(case | {"sampled": True})


def test_incorrect_attention_lengths_are_listed(tables: ModuleType) -> None:
    assert "wrong at the lengths 33;" in tables.compared({"differences": {"32": 0.01, "33": 0.4}})
    assert "wrong at the lengths 32;" in tables.compared({"differences": {"32": float("nan"), "33": 0.01}})


def test_page_shows_the_stored_benchmark_results(tables: ModuleType, monkeypatch, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(tables.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    tables.main([])
    assert page.read_text(encoding="utf-8") == before, "run scripts/gpu_tables.py"
    other = tmp_path / "other.json"
    other.write_text(tables.FIGURES.read_text(encoding="utf-8").replace("H100", "B200"), encoding="utf-8")
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "kept.json")
    tables.main([str(other)])
    assert "B200" in page.read_text(encoding="utf-8")
    assert "B200" in (tmp_path / "kept.json").read_text(encoding="utf-8")
