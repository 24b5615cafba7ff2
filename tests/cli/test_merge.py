"""safervlm merge: a run's merged model with its card; nothing of a user's is replaced."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from safervlm.cli.main import main
from safervlm.vlm.llava import Llava


@pytest.fixture(scope="module")
def run(tiny_llava: Path, tiny_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of SFT in bfloat16."""
    folder = tmp_path_factory.mktemp("merge") / "sft"
    line = ["fit", "--config=configs/sft.yaml", f"--model.vlm.model={tiny_llava}", "--model.vlm.lora.r=2"]
    line += ["--model.lr=0.01", "--model.warmup_steps=0", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    line += [f"--data.folder={tiny_sets / 'unsafe'}", f"--data.safe_folder={tiny_sets / 'safe'}"]
    main([*line, "--data.batch_size=4", "--data.num_workers=0", f"--run={folder}"])
    return folder


def test_a_run_is_merged_with_its_card(run: Path, tiny_llava: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "merged"
    main(["merge", str(run), "--out", str(out)])
    assert "log-probabilities differ from base plus adapter by at most" in capsys.readouterr().out
    _, head, text = (out / "README.md").read_text().split("---", 2)
    assert yaml.safe_load(head)["base_model"] == f"…/{tiny_llava.name}"
    assert re.search(r"None: .*; evaluate the run: safervlm evaluate", text)
    for part in ("Base model's licence", "nats per token", "## Objective: sft", "## Data", "bfloat16"):
        assert part in text
    merged = Llava(str(out))
    merged.load()
    assert next(merged.base.parameters()).dtype == torch.bfloat16
    before = sorted((file.name, file.read_bytes()) for file in out.iterdir())
    with pytest.raises(SystemExit) as end:
        main(["merge", str(run), "--out", str(out)])
    assert end.value.code == 2
    assert "already exists and is not empty; name another folder" in capsys.readouterr().err
    assert sorted((file.name, file.read_bytes()) for file in out.iterdir()) == before


def test_folder_without_a_training_run_is_rejected(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["merge", str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "name the folder of a finished training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merging_that_changes_what_the_model_computes_is_rejected(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(layer: Any) -> Any:
        yield layer.get_base_layer().weight, torch.ones(())

    monkeypatch.setattr("safervlm.vlm.merging._updates", wrong)
    with pytest.raises(SystemExit) as end:
        main(["merge", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"])
    assert end.value.code == 2
    assert (
        "nats, more than rounding in float32 explains; serve the base model with its adapter" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
