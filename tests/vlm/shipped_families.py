"""Checks of the VLMs in configs/vlm: their settings, and the command line that trains and measures them."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from safervlm import protocol
from safervlm.cli.main import main
from safervlm.recipes import CONFIGS
from safervlm.records import Example, read_jsonl
from safervlm.run import read_manifest
from safervlm.vlm.base import VLM
from safervlm.vlm.sampling import Sampling


def shipped(file: str, *line: str) -> Any:
    """A VLM of configs/vlm, with some of its settings."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(VLM, "vlm")
    return parser.instantiate(parser.parse_args([f"--vlm={CONFIGS / 'vlm' / file}.yaml", *line])).vlm


def check_shipped(vlm: Any, examples: list[Example]) -> None:
    """Checks that five questions get five responses."""
    vlm.load()
    assert len({answer.text for answer in vlm.generate(vlm.collator(examples), Sampling(max_new_tokens=8), 0)}) == 5


def check_command_line(vlm: list[str], folder: Path, sets: Path) -> None:
    """Runs two steps of SFT, then the measurement with the trained adapter; the responses are not classified.

    Args:
        vlm: the arguments that name the model.
        folder: for the runs.
        sets: with unsafe/ and safe/.
    """
    overlay = {"trainer": {"callbacks": [{"class_path": "callbacks.record_writer.RecordWriter"}]}}
    (folder / "overlay.yaml").write_text(json.dumps(overlay))
    same = [
        *vlm,
        f"--data.folder={sets / 'unsafe'}",
        f"--data.safe_folder={sets / 'safe'}",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
    ]
    measure = ["--config=configs/measure.yaml", f"--config={folder / 'overlay.yaml'}", "--data.split=test"]
    sft = ["--config=configs/sft.yaml", "--model.vlm.lora.r=2", "--trainer.max_steps=2", "--data.batch_size=4"]
    main(["fit", *sft, *same, f"--run={folder / 'sft'}"])
    lora = read_manifest(folder / "sft")["stages"]["sft"]["lora"]
    assert 0.5 <= lora["adapted"] <= 1
    assert sum(each["adapted"] for each in lora["kinds"].values()) == pytest.approx(lora["adapted"])
    adapter = f"--model.vlm.adapter={folder / 'sft' / 'adapter'}"
    main(["predict", *measure, *same, adapter, "--model.sampling.max_new_tokens=4", f"--run={folder / 'measured'}"])
    responses = read_jsonl(folder / "measured" / "responses.jsonl")
    assert {response["capability"] for response in responses} == {*protocol.CAPABILITIES}
