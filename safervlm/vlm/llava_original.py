"""LLaVA-1.5 in its authors' format, for example ``liuhaotian/llava-v1.5-7b``.

A model is converted once, then used as :class:`Llava`. The original format stores a Llama and a projector under other
names, has no image token, and usually has no vision tower, which is then CLIP's from the Hub. The conversion doesn't
change the logits.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModel, GenerationConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.errors import ArgumentError
from safervlm.hashing import fingerprint
from safervlm.io.caches import build_folder
from safervlm.io.images import ImageSettings
from safervlm.io.reading import json_text
from safervlm.limits import TextLimits
from safervlm.protocol import VICUNA_SYSTEM
from safervlm.vlm.adapters import CONFIG, adapter_config, adapter_weights
from safervlm.vlm.decoding import Decoding
from safervlm.vlm.llava import Llava, LlavaCollator
from safervlm.vlm.lora import LoRA
from safervlm.vlm.processors import read_tokenizer
from safervlm.vlm.stored import weight_files
from safervlm.vlm.weights import (
    load_model,
    model_config,
    read_tensors,
    reading,
    require_finite_floats,
    weights_fingerprint,
)

# Weight names of the original -> names of a llava-hf checkpoint, which transformers maps to its own on loading.
NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model|lm_head)\.", r"language_model.\1."),
)
# Version of the converted format. Increase it with every change, so that older conversions are not reused.
FORMAT = "2"
DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # computed buffers that older versions stored


class LlavaOriginal(Llava):
    """LLaVA-1.5 in its authors' format, with its adapters; both are converted once, into a cache folder.

    Args:
        model: Name on the Hugging Face Hub, or folder, of the model in the original format.
        revision: Branch, tag or commit of a model on the Hub. A commit makes a run reproducible.
        adapter: PEFT folder of an adapter, exported by SaferVLM or trained on the original. None for the base model.
        lora: Settings of the LoRA adapters that training creates.
        dtype: Data type of the base weights. Adapter weights stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass. Takes less memory and about a third more
            time.
        image_fit: How an image is made square. ``pad`` pads with the mean colour (the published training, and the
            published evaluation of trained models); ``crop`` crops the centre (the published measurement).
        system: System prompt of the conversation; empty for none.
        vision: Name on the Hub, or folder, of the vision tower and its image processor.
        cache_dir: Folder for converted models. A conversion is as large as the model.
        images: How images are decoded, and the size limits above which they are rejected.
        limits: Limits of texts and of the time to render or match them.
        decoding: How the steps of generation are computed.
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
        limits: TextLimits = TextLimits(),  # noqa: B008 (frozen)
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(
            model, revision, adapter, lora, dtype, gradient_checkpointing, image_fit, system, images, limits, decoding
        )
        self.original, self.vision, self.cache = model, vision, Path(cache_dir).expanduser() / "converted"
        if adapter is not None:
            self.adapter = str(convert_adapter(Path(adapter), self.cache))

    @classmethod
    def loads(cls, config: Mapping[str, Any]) -> bool:
        """Returns whether a model is in the original format.

        Args:
            config: Content of the model's ``config.json``.
        """
        return "LlavaLlamaForCausalLM" in (config.get("architectures") or ())

    @cached_property
    def collator(self) -> LlavaCollator:
        """The collator; the model is converted on first access."""
        self.name = str(convert(self.original, self.revision, self.vision, self.cache))
        self.revision = None
        return super().collator

    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response; the fingerprint is of the converted weights."""
        return super().describe() | {"model": self.original, "vision": self.vision}


def convert(name: str, revision: str | None, vision: str, cache: Path) -> Path:
    """Converts a model from the original format to the Hugging Face format, unless the conversion is in the cache.

    The name of the converted folder is a hash of everything that determines its content: the original's weights,
    configuration and tokenizer, the vision tower (its files, or its commit on the Hub), :data:`FORMAT`, and the version
    of transformers, which converts the tokenizer.

    Args:
        name: Name on the Hub, or folder, of the original model.
        revision: Branch, tag or commit on the Hub.
        vision: Name on the Hub, or folder, of the vision tower.
        cache: Folder of converted models.

    Returns:
        The folder of the converted model.

    Raises:
        ArgumentError: The model or the vision tower can't be read, is not in the original format, or lacks weights.
    """
    with reading(name):
        wanted = ["*.json", "*.safetensors", "*.bin", "tokenizer.model"]
        found = name if Path(name).is_dir() else snapshot_download(name, revision=revision, allow_patterns=wanted)
        source = Path(found)
        raw = model_config(source)
    if "mm_vision_tower" not in raw:
        raise ArgumentError(f"vlm.model: {name!r} is not a LLaVA in the original format; use safervlm.vlm.llava.Llava")
    if not weight_files(source):
        raise ArgumentError(f"vlm.model: no weights (*.safetensors, pytorch_model*.bin) in {source}")
    # Hashes the files, not the commit: an interrupted download lacks some of them.
    original = weights_fingerprint(str(source), None)
    tower = weights_fingerprint(vision, None, "vlm.vision")
    if tower is None:  # the name of the converted folder would not show which one it contains
        raise ArgumentError(f"vlm.vision: the commit of {vision!r} is unknown; give its folder")
    folder = cache / fingerprint(FORMAT, version("transformers"), str(original), tower)
    build_folder(folder, lambda aside: write_converted(aside, name, source, raw, vision), "vlm.cache_dir")
    return folder


def write_converted(out: Path, name: str, source: Path, raw: dict[str, Any], vision: str) -> None:
    """Writes the converted model.

    Args:
        out: An empty folder.
        name: Name of the original model, for error messages.
        source: Folder of the original model.
        raw: Content of the original's ``config.json``.
        vision: Name on the Hub, or folder, of the vision tower.

    Raises:
        ArgumentError: A weight is missing, unknown or not finite, or the tokenizer and the embeddings differ in size.
    """
    tokenizer = read_tokenizer(str(source))
    state: dict[str, Tensor] = {}
    for file in weight_files(source):
        more = read_tensors(file, "vlm.model")
        if twice := state.keys() & more.keys():
            raise ArgumentError(f"vlm.model: {name!r} stores {min(twice)} twice; get its weight files again")
        state |= more
    state = {renamed(key): value for key, value in state.items() if not key.endswith(DERIVED)}
    tower = load_model(CLIPVisionModel, vision, "vlm.vision", whole=False)
    with reading(vision, "vlm.vision"):
        image_processor = LlavaImageProcessorPil.from_pretrained(vision, trust_remote_code=False)
    if not any(key.startswith("vision_tower.") for key in state):
        state |= {f"vision_tower.{key}": value for key, value in tower.state_dict().items()}
    needed = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    if lacking := [key for key in needed if key not in state]:
        raise ArgumentError(f"vlm.model: {name!r} lacks the weight {lacking[0]}; give the whole model")
    require_finite_floats(state, f"vlm.model: {name!r}")
    words = state["language_model.lm_head.weight"].shape[0]
    image_token, pad_token = words, words + 1
    for key in needed:
        state[key] = torch.cat([state[key], state[key].new_zeros(64 - words % 64, state[key].shape[1])])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if [image_token, pad_token] != tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]):
        raise ArgumentError(
            f"vlm.model: the tokenizer of {name!r} does not have the {words} tokens of its weights; give its own"
        )

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
    """Returns the name of a weight in a llava-hf checkpoint.

    Args:
        key: Name of the weight in the original format.

    Raises:
        ArgumentError: The name is not that of a weight of LLaVA-1.5 in the original format.
    """
    for pattern, name in NAMES:
        key, count = re.subn(pattern, name, key)
        if count:
            return key
    raise ArgumentError(f"vlm.model: the weight {key!r} is none of LLaVA-1.5 in the original format")


def convert_adapter(folder: Path, cache: Path) -> Path:
    """Converts an adapter of the original model to the weight names of the converted model.

    Without the conversion, PEFT would load the adapter without effect.

    Args:
        folder: PEFT folder of the adapter.
        cache: Folder of converted models and adapters.

    Returns:
        The folder of the converted adapter, or ``folder`` itself if it needs no conversion.

    Raises:
        ArgumentError: The adapter can't be read, or its training also changed the projector.
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
    config["target_modules"] = rf".*\blanguage_model\.layers\.\d+\.(self_attn|mlp)\.({kinds})"

    def build(aside: Path) -> None:
        save_file(moved, aside / "adapter_model.safetensors")
        (aside / CONFIG).write_text(json_text(config, indent=2, name=CONFIG), encoding="utf-8", newline="\n")

    there = cache / fingerprint(FORMAT, folder / CONFIG, weights)
    build_folder(there, build, "vlm.cache_dir")
    return there
