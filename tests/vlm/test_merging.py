"""The merged model scores as base plus adapter; in bfloat16 each weight is rounded once."""

import json
from collections.abc import Callable
from pathlib import Path

import families
import more_families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from safervlm.errors import ArgumentError
from safervlm.records import Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.lora import LoRA
from safervlm.vlm.merging import copy_others, merge_adapter, write_merged

LORA = LoRA(r=4, alpha=8, dropout=0.0)
# The square matrices of Aria's experts are transposed, those of the other family are not.
EXPERTS = (more_families.qwen3_vl_moe, more_families.aria)


def tied(folder: Path) -> None:
    """A Qwen2-VL whose head is its embedding."""
    families.qwen2_vl(folder)
    model = families.hf.AutoModelForImageTextToText.from_pretrained(folder)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight)
    model.tie_weights()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def adapter(folder: Path, out: Path, lora: LoRA = LORA) -> str:
    families.with_effect(Transformers(str(folder), dtype="float32", lora=lora)).save_adapter(out)
    return str(out)


@pytest.mark.parametrize(
    "build",
    [families.llava, families.qwen2_vl, families.gemma3, families.internvl, tied, *EXPERTS],
)
def test_a_merged_model_scores_as_base_plus_adapter(
    build: Callable[[Path], None], make_questions: Callable[[int], list[Question]], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    out.mkdir()
    build(base)
    lora = LoRA(r=4, alpha=8, dropout=0.0, experts=build in EXPERTS)
    vlm = Transformers(str(base), dtype="float32", adapter=adapter(base, tmp_path / "adapter", lora))
    vlm.load()
    batch = vlm.collator(families.ask(make_questions(3)))
    expected = vlm.score(batch).logprobs
    plain = vlm.score(batch, adapter="reference").logprobs
    merge_adapter(vlm)
    write_merged(vlm, out, shard_size="40KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    merged = Transformers(str(out), dtype="float32")
    merged.load()
    again = merged.score(merged.collator(families.ask(make_questions(3)))).logprobs
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
    if build is tied:
        assert merged.base.get_output_embeddings().weight is merged.base.get_input_embeddings().weight
    assert (expected - plain).abs().max() > 1e-2
    there = {file.name for file in base.iterdir()}
    assert there - {"model.safetensors"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize("target", ["lm_head", ".*embed_tokens"])
def test_one_of_two_layers_with_the_same_weights_is_not_merged(target: str, tmp_path: Path) -> None:
    """Their weights would change in both, as where the head is the embedding."""
    base = tmp_path / "base"
    base.mkdir()
    tied(base)
    model = get_peft_model(
        families.hf.AutoModelForImageTextToText.from_pretrained(base), LoraConfig(target_modules=target)
    )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    vlm = Transformers(str(base), dtype="float32", adapter=str(tmp_path / "adapter"))
    vlm.load()
    before = vlm.base.get_input_embeddings().weight.clone()
    with pytest.raises(ArgumentError, match=r"^run: its adapter changes one of .*embed_tokens and lm_head, which have"):
        merge_adapter(vlm)
    assert torch.equal(vlm.base.get_input_embeddings().weight, before)


def test_in_bfloat16_each_weight_is_rounded_once(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    out.mkdir()
    families.llava(base)
    folder = adapter(base, tmp_path / "adapter")
    vlm = Transformers(str(base), dtype="bfloat16", adapter=folder)
    vlm.load()
    merge_adapter(vlm)
    write_merged(vlm, out, shard_size="5GB")
    before, after = (load_file(each / "model.safetensors") for each in (base, out))
    update = load_file(Path(folder) / "adapter_model.safetensors")
    merged = 0
    for name, stored in after.items():
        expected = before[name].bfloat16()
        inner = name.removeprefix("language_model.").removeprefix("model.").removeprefix("language_model.")
        stem = f"base_model.model.model.language_model.{inner.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in update:
            product = update[f"{stem}.lora_B.weight"].double() @ update[f"{stem}.lora_A.weight"].double()
            expected = (expected.double() + 8 / 4 * product).bfloat16()
            merged += 1
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, expected), name
    assert merged == 2 * 7 == len(update) // 2
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_copied_beside_merged_weights_are_writable(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "sub" / ".hidden").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "modeling.py", "sub/vocab.txt", "sub/x.bin", "sub/.hidden/y.json"):
        (base / name).write_text(name)
    (base / "merges.txt").symlink_to(base / "sub" / "vocab.txt")  # as in the cache of the Hub
    for path in (*base.rglob("*"), base):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "out").mkdir()
    copy_others(base, tmp_path / "out")
    copied = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == {"config.json", "merges.txt", "sub/vocab.txt"}
    assert not (tmp_path / "out" / "merges.txt").is_symlink()
    # The permissions themselves: a test may run as a user who may write everything.
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out").stat().st_mode & 0o200
    for path in (base, *(folder for folder in base.rglob("*") if folder.is_dir())):
        path.chmod(0o755)
