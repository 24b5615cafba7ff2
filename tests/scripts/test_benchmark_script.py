"""scripts/benchmark.py: both sides compute the same, on shapes too small to measure time."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import benchmark

        yield benchmark


@pytest.fixture
def tiny(benchmark: ModuleType):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield benchmark.Shape(
        hidden=32,
        layers=2,
        heads=2,
        intermediate=64,
        vocabulary=64,
        vision_hidden=16,
        vision_layers=2,
        image_size=28,
        rank=4,
        pairs=2,
        targets=3,
        rollouts=3,
        response_length=40,
    )
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "rows"), [("dpo", 4), ("sft", 2), ("ppo", 3), ("shared", 9), ("group", 3)])
def test_both_implementations_compute_the_same_gradients(
    name: str, rows: int, benchmark: ModuleType, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.write_model(tiny, tmp_path)
    table = benchmark.WITH_A_MODEL[name](tiny, tmp_path, 1)
    assert len(table) == rows
    assert all(len(row.ratios()) == 1 and min(row.ratios()) > 0 for row in table)
    said = capsys.readouterr().err
    assert said.count("gradient differs by") == {"dpo": 4, "sft": 3, "ppo": 3, "shared": 10, "group": 1}[name]
    if name == "dpo":  # with an adapter without effect all losses would be equal
        assert abs(float(said.split("loss ")[1].split()[0]) - math.log(2)) > 1e-3


def test_comparison_of_different_computations_is_rejected(
    benchmark: ModuleType, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comparisons import against_trl

    benchmark.write_model(tiny, tmp_path)
    trl_side = against_trl.trl_side

    def other(*args, **kwargs):
        monkeypatch.setattr(against_trl, "BETA", 0.11)
        return trl_side(*args, **kwargs)

    monkeypatch.setattr(against_trl, "trl_side", other)
    ours = against_trl.DPO
    monkeypatch.setattr(against_trl, "DPO", lambda vlm, beta: ours(vlm, beta=0.1))
    with pytest.raises(SystemExit, match="don't compute the same"):
        benchmark.benchmark_dpo(tiny, tmp_path, repeats=1)


def test_self_bleu_against_nltk(benchmark: ModuleType) -> None:
    (row,) = benchmark.benchmark_bleu(repeats=1, count=80, sample=10)
    assert row.ratios()[0] > 1


def test_sampling_with_and_without_a_sort(benchmark: ModuleType) -> None:
    rows = benchmark.benchmark_sampling(repeats=1, rows=3, vocabulary=500)
    assert [row.target for row in rows] == [4.0, None, 1.8]
    assert all(min(row.ratios()) > 0 for row in rows)


def test_table_marks_missed_targets(benchmark: ModuleType) -> None:
    row = benchmark.Row("a : b", [4.0, 6.0, 5.0], [2.0, 2.0, 2.0], target=3.0)
    assert str(row) == "| a : b | 2.50 | 2.00 | 3.00 | 3 (missed) | 5 | 2 |"
    assert "(missed)" not in str(benchmark.Row("a : b", [4.0], [1.0], target=3.0))
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["fpo"])
    assert stopped.value.code == 2


def test_batched_measurement_benchmark_runs_and_compares_responses(benchmark: ModuleType, tiny, tmp_path: Path) -> None:
    benchmark.write_model(tiny, tmp_path)
    rows = benchmark.benchmark_measure(tiny, tmp_path, repeats=1, images=2, tokens=4)
    assert len(rows) == 2
    assert all(min(row.ratios()) > 0 for row in rows)
