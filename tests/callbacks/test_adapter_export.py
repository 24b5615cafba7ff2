"""The exported adapter folder can be loaded by PEFT alone."""

import json
from types import SimpleNamespace

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from callbacks.adapter_export import AdapterExport
from safervlm.objectives import SFT
from safervlm.records import Example
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA


def export(run, vlm, first=True):
    trainer = SimpleNamespace(is_global_zero=first, default_root_dir=str(run), global_step=1, callbacks=[])
    AdapterExport().on_fit_end(trainer, SFT(vlm))


def test_exported_adapter_loaded_by_peft_computes_the_same(tiny_llava, make_questions, tmp_path):
    vlm = Llava(str(tiny_llava), dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.05), system="")
    vlm.load(train=("policy", "value"))  # as PPO has it
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    export(tmp_path, vlm, first=False)
    assert not (tmp_path / "adapter").exists()
    export(tmp_path, vlm)

    examples = [Example(question, ("No, it's not safe: knives cut.",)) for question in make_questions(3)]
    batch = vlm.collator(examples)
    vlm.eval()
    with torch.no_grad():
        ours = vlm.score(batch).logprobs

        def plain(model):
            """Log-probabilities of the response tokens by the library's forward pass, one question at a time."""
            rows = []
            for row, image in enumerate(batch.image_rows):
                length = int((batch.packed.segments[row] >= 0).sum())
                logits = model(
                    input_ids=batch.packed.input_ids[row : row + 1, :length],
                    pixel_values=batch.pixel_values[image : image + 1],
                ).logits[0]
                mask = batch.packed.mask[row]
                chosen = logits.log_softmax(-1)[batch.packed.source[row][mask], batch.packed.target[row][mask]]
                rows.append(chosen)
            return rows

        base = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()
        without = plain(base)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        for row, values in enumerate(plain(loaded)):
            found = ours[row][batch.packed.mask[row]]
            assert (found - values).abs().max() < 1e-4
            assert (found - without[row]).abs().max() > 1e-2

    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert keys
    assert not [key for key in keys if "value" in key or "vision" in key]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert not (tmp_path / "adapter" / "value").exists()
