"""The manifest's callback: one process hashes the weights for all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from callbacks.checkpoint import LastCheckpoint
from safervlm.errors import ArgumentError
from safervlm.manifest import RunManifest, share_hashes
from safervlm.run import read_manifest
from safervlm.vlm import weights
from safervlm.vlm.weights import HASHES, weights_fingerprint


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return str(tmp_path)


def trainer(rank: int, sent: Any = None, processes: int = 2) -> Any:
    strategy = SimpleNamespace(broadcast=lambda value: value if rank == 0 else sent)
    return SimpleNamespace(world_size=processes, is_global_zero=rank == 0, strategy=strategy)


def test_one_process_hashes_the_weights_for_all(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    module: Any = SimpleNamespace(describe=lambda: asked.append(weights_fingerprint(model, None) or ""))
    share_hashes(trainer(0, processes=1), module)
    assert not asked
    share_hashes(trainer(0), module)
    (found,) = asked
    sent = dict(HASHES)
    HASHES.clear()
    share_hashes(trainer(1, sent), module)
    assert len(asked) == 1
    monkeypatch.setattr(weights, "fingerprint_of_files", None)  # nothing is hashed again
    assert weights_fingerprint(model, None) == found


def test_changed_weights_are_hashed_again(model: str) -> None:
    before = weights_fingerprint(model, None)
    Path(model, "model.safetensors").write_bytes(b"other weights")
    assert weights_fingerprint(model, None) != before


def test_an_error_of_the_first_process_leaves_no_other_waiting() -> None:
    def describe() -> None:
        raise ArgumentError("vlm.model: nothing")

    module: Any = SimpleNamespace(describe=describe)
    share_hashes(trainer(0), module)  # each process raises it afterwards


@pytest.mark.parametrize("stores", [(), (LastCheckpoint(),), (ModelCheckpoint(),)])
def test_a_training_without_a_callback_that_stores_it_is_reported(stores: Any, tmp_path: Path, capsys) -> None:
    adapted = SimpleNamespace(describe=lambda: {})
    module: Any = SimpleNamespace(vlm=SimpleNamespace(adapted=adapted))
    callbacks = [RunManifest(), ProgressBar(), *stores]
    run = {"default_root_dir": str(tmp_path), "callbacks": callbacks, "ckpt_path": None}
    of_it: Any = SimpleNamespace(is_global_zero=True, **run)
    RunManifest().on_fit_start(of_it, module)
    assert ("callbacks.checkpoint.LastCheckpoint" in capsys.readouterr().out) is not bool(stores)


def test_decoding_method_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Measure:
        vlm = SimpleNamespace(decoded={})

    module, callback = Measure(), RunManifest()
    process: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    for decoded in ({}, {"steps": "fixed"}, {"steps": "fixed"}, {"steps": "growing", "reason": "its cache"}):
        module.vlm.decoded = decoded
        callback.on_predict_batch_end(process, module, [], None, 0)  # type: ignore[arg-type]
        callback.on_train_batch_end(process, module, None, None, 0)  # type: ignore[arg-type]
        if decoded:
            assert read_manifest(tmp_path)["stages"]["measure"]["decoding"] == decoded
    assert capsys.readouterr().out.splitlines() == ["decoding: fixed steps", "decoding: growing steps (its cache)"]
    process.is_global_zero = False
    RunManifest().on_predict_batch_end(process, module, [], None, 0)  # type: ignore[arg-type]
    assert not capsys.readouterr().out
