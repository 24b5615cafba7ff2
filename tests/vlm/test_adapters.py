"""An exported adapter is one of PEFT's: PEFT and transformers alone load it and compute the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import more_families
import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText

from safervlm.records import Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.lora import LoRA, active

PLAIN = (families.llava, families.qwen2_vl, families.gemma3, families.internvl)
MIXTURES = (more_families.qwen3_vl_moe, more_families.qwen3_5_moe, more_families.glm4v_moe)
# What servers take from the names, the last part of each; they can't match a regular expression.
PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("build", "experts"), [(build, False) for build in (*PLAIN, *MIXTURES)] + [(build, True) for build in MIXTURES]
)
def test_peft_alone_loads_an_exported_adapter(
    build: Callable[[Path], None],
    experts: bool,
    make_questions: Callable[[int], list[Question]],
    tmp_path: Path,
    capsys: Any,
) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    build(base)
    lora = LoRA(r=4, alpha=8, dropout=0.0, experts=experts, min_coverage=0.0)
    trained = families.with_effect(Transformers(str(base), dtype="float32", lora=lora))
    trained.save_adapter(folder)
    reported = "PEFT alone mistakes names in this adapter for those of experts" in capsys.readouterr().out
    encoding = trained.collator(families.ask(make_questions(1))).encodings[0]
    with torch.no_grad():
        with active(trained.base, "policy"):
            expected = trained.base(**encoding).logits
        with active(trained.base, "reference"):
            plain = trained.base(**encoding).logits
    assert (expected - plain).abs().max() > 1e-2

    stored = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(stored["target_modules"], list)
    if build in PLAIN:
        assert {name.rpartition(".")[2] for name in stored["target_modules"]} == PARTS
    config = PeftConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == str(base)
    model = AutoModelForImageTextToText.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
    try:
        alone = PeftModel.from_pretrained(model, folder).eval()
    except RuntimeError:  # its weights have other shapes
        agrees = False
    else:
        with torch.no_grad():
            agrees = torch.allclose(alone(**encoding).logits, expected, atol=1e-5, rtol=0)
    assert agrees != reported
    assert reported == (
        build is more_families.glm4v_moe
    )  # its dense layers are named like the experts of earlier versions
