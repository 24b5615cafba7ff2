"""LLaVA-1.5 in its authors' format, for example ``liuhaotian/llava-v1.5-7b``: converted once, then a :class:`Llava`.

The original holds a Llama and a projector under other names, no image token, and mostly no vision tower: that is CLIP's
from the Hub. Logits are the same before and after.
"""

import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionModel, GenerationConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.errors import ArgumentError
from safervlm.hashing import fingerprint
from safervlm.io.caches import build_folder
from safervlm.io.images import ImageSettings
from safervlm.io.reading import json_text
from safervlm.protocol import VICUNA_SYSTEM
from safervlm.vlm.adapters import CONFIG, adapter_config, adapter_weights
from safervlm.vlm.llava import Llava, LlavaCollator
from safervlm.vlm.lora import LANGUAGE_LAYERS, LoRA
from safervlm.vlm.weights import (
    load_model,
    model_config,
    must_be_finite,
    read_tensors,
    reading,
    weight_files,
    weights_fingerprint,
)

# Names of the original -> names of a llava-hf checkpoint, in which transformers has its own way of reading them.
NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model|lm_head)\.", r"language_model.\1."),
)
# Of what is written; a change of it needs another number, so that older conversions are not used.
FORMAT = "2"
DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # computed by the model, stored by older versions of it


class LlavaOriginal(Llava):
    """LLaVA-1.5 in its authors' format, and its adapters; both are converted once, into the cache.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model in the original format.
        revision: branch, tag or commit of a model on the Hub; a commit makes a run repeatable.
        adapter: PEFT folder of an adapter, ours or one that was trained on the original; none for the base model.
        lora: the adapter that training makes.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        image_fit: how an image becomes a square: ``pad`` with the mean colour (the published training and evaluation of
            trained models), or ``crop`` its centre (the published measurement).
        system: the conversation's system prompt; empty for none.
        vision: name on the Hub, or folder, of the vision tower, and of its image processor.
        cache_dir: where what is converted is kept; as large as the model.
        images: how images are decoded, and which are too large.
    """

    def __init__(
        self,
        model: str = "liuhaotian/llava-v1.5-7b",
        revision: str | None = None,
        adapter: str | None = None,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
        image_fit: Literal["pad", "crop"] = "pad",
        system: str = VICUNA_SYSTEM,
        vision: str = "openai/clip-vit-large-patch14-336",
        cache_dir: str = "~/.cache/safervlm",
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing, image_fit, system, images)
        self.original, self.vision, self.cache = model, vision, Path(cache_dir).expanduser() / "converted"
        if adapter is not None:
            self.adapter = str(convert_adapter(Path(adapter), self.cache))

    @cached_property
    def collator(self) -> LlavaCollator:
        """Converts the model when it is first asked for."""
        self.name = str(convert(self.original, self.revision, self.vision, self.cache))
        self.revision = None
        return super().collator

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer; the weights' fingerprint is that of the converted ones."""
        return super().describe() | {"model": self.original, "vision": self.vision}


def convert(name: str, revision: str | None, vision: str, cache: Path) -> Path:
    """Writes a model in the original format as ``save_pretrained`` writes a LLaVA, unless it is in the cache.

    The name of its folder is a hash of all that decides what it contains: the original's weights, configuration and
    tokenizer, the vision tower (its files, or its commit on the Hub), :data:`FORMAT`, and the version of transformers,
    which converts the tokenizer.

    Args:
        name: of the original, on the Hub or a folder.
        revision: on the Hub.
        vision: the vision tower, on the Hub or a folder.
        cache: the folder to write into.

    Returns:
        The folder of the converted model, made before or now.
    """
    with reading(name):
        wanted = ["*.json", "*.safetensors", "*.bin", "tokenizer.model"]
        found = name if Path(name).is_dir() else snapshot_download(name, revision=revision, allow_patterns=wanted)
        source = Path(found)
        raw = model_config(source)
    if "mm_vision_tower" not in raw:
        raise ArgumentError(f"vlm.model: {name!r} is no LLaVA in the original format; use safervlm.vlm.llava.Llava")
    if not weight_files(source):
        raise ArgumentError(f"vlm.model: no weights (*.safetensors, pytorch_model*.bin) in {source}")
    # Of the files, not of the commit: an interrupted download lacks some of them.
    original = weights_fingerprint(str(source), None)
    tower = weights_fingerprint(vision, None, "vlm.vision")
    folder = cache / fingerprint(FORMAT, version("transformers"), str(original), str(tower))
    build_folder(folder, lambda aside: write_converted(aside, name, source, raw, vision), "vlm.cache_dir")
    return folder


def write_converted(out: Path, name: str, source: Path, raw: dict[str, Any], vision: str) -> None:
    """Writes the converted model.

    Args:
        out: an empty folder.
        name: the original's, for errors.
        source: its folder.
        raw: its configuration.
        vision: the vision tower, on the Hub or a folder.
    """
    with reading(name):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    state: dict[str, Tensor] = {}
    for file in weight_files(source):
        state |= read_tensors(file, "vlm.model")
    state = {renamed(key): value for key, value in state.items() if not key.endswith(DERIVED)}
    tower = load_model(CLIPVisionModel, vision, "vlm.vision", whole=False)
    with reading(vision, "vlm.vision"):
        image_processor = LlavaImageProcessorPil.from_pretrained(vision, trust_remote_code=False)
    if not any(key.startswith("vision_tower.") for key in state):
        state |= {f"vision_tower.{key}": value for key, value in tower.state_dict().items()}
    needed = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    if lacking := [key for key in needed if key not in state]:
        raise ArgumentError(f"vlm.model: {name!r} lacks the weight {lacking[0]}; give the whole model")
    must_be_finite(state.items(), f"vlm.model: {name!r}")
    words = state["language_model.lm_head.weight"].shape[0]
    image_token, pad_token = words, words + 1
    for key in needed:
        state[key] = torch.cat([state[key], state[key].new_zeros(64 - words % 64, state[key].shape[1])])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if [image_token, pad_token] != tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]):
        raise ArgumentError(f"vlm.model: {name!r} has {words} words in its weights and others in its tokenizer")

    with reading(name):
        text = {key: raw[key] for key in LlamaConfig().to_dict() if key in raw}
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=LlamaConfig(**text | {"vocab_size": words + 64 - words % 64, "pad_token_id": pad_token}),
            image_token_id=image_token,
            image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
            vision_feature_layer=raw["mm_vision_select_layer"],
            vision_feature_select_strategy="default",
            architectures=["LlavaForConditionalGeneration"],
        )
    tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for part in (config, tokenizer, image_processor, GenerationConfig(eos_token_id=tokenizer.eos_token_id)):
        part.save_pretrained(out)


def renamed(key: str) -> str:
    """A weight's name in a llava-hf checkpoint."""
    for pattern, name in NAMES:
        key, count = re.subn(pattern, name, key)
        if count:
            return key
    raise ArgumentError(f"vlm.model: the weight {key!r} is none of LLaVA-1.5 in the original format")


def convert_adapter(folder: Path, cache: Path) -> Path:
    """An adapter of the original, with the names of the converted model; PEFT would load it without effect.

    Args:
        folder: the adapter's PEFT folder; one that needs no conversion is given back as it is.
        cache: the folder to write into.
    """
    weights = adapter_weights(folder)
    state = read_tensors(weights, "vlm.adapter")
    if not any(key.startswith("base_model.model.model.layers.") for key in state):
        return folder
    if (folder / "non_lora_trainables.bin").exists():
        raise ArgumentError(
            f"vlm.adapter: {str(folder)!r} has also trained the projector (non_lora_trainables.bin); merge it into the "
            "model with its authors' script, and name the merged model"
        )
    config = adapter_config(folder)
    inside = re.compile(r"^base_model\.model\.model\.layers\.")
    moved = {inside.sub("base_model.model.model.language_model.layers.", key): w for key, w in state.items()}
    kinds = "|".join(sorted({key.split(".")[-3] for key in state}))
    config["target_modules"] = LANGUAGE_LAYERS.rsplit(r"\d+\.", 1)[0] + rf"\d+\.(self_attn|mlp)\.({kinds})"

    def build(aside: Path) -> None:
        save_file(moved, aside / "adapter_model.safetensors")
        (aside / CONFIG).write_text(json_text(config, indent=2, name=CONFIG), encoding="utf-8")

    there = cache / fingerprint(FORMAT, folder / CONFIG, weights)
    build_folder(there, build, "vlm.cache_dir")
    return there
