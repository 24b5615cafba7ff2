"""Tiny random models with experts, linear attention or transformed logits, in folders as on the Hub."""

from pathlib import Path
from typing import Any

import transformers as hf
from families import (
    SQUARE,
    TEXT,
    VISION,
    chat,
    chatml,
    save,
    settings,
    tokenizer,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MIXTURE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
}


def qwen(folder: Path, model: Any, config: Any, **text: Any) -> None:
    """A Qwen3 family with its own language model."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    words = tokenizer("<|im_end|>", start="<|im_start|>", first="<|vision_start|>", last="<|vision_end|>", **names)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
    layout = {"vocab_size": len(words), "head_dim": 8, "rope_parameters": ROPE, "eos_token_id": words.eos_token_id}
    built = config(
        text_config={**TEXT, **layout, **text},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 16, **sizes},
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        vision_start_token_id=words.first_id,
        vision_end_token_id=words.last_id,
    )
    image = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 28 * 28, "longest_edge": 64 * 64})
    save(folder, model(built), image, words)
    settings(folder, "Qwen3VLProcessor", chatml("<|vision_start|><|image_pad|><|vision_end|>"))


def qwen3_vl_moe(folder: Path) -> None:
    qwen(folder, hf.Qwen3VLMoeForConditionalGeneration, hf.Qwen3VLMoeConfig, **MIXTURE)


def qwen3_5(folder: Path) -> None:
    qwen(folder, hf.Qwen3_5ForConditionalGeneration, hf.Qwen3_5Config, **LINEAR)


def qwen3_5_moe(folder: Path) -> None:
    shared = {"shared_expert_intermediate_size": 16}
    qwen(folder, hf.Qwen3_5MoeForConditionalGeneration, hf.Qwen3_5MoeConfig, **LINEAR, **MIXTURE, **shared)


def glm4v_moe(folder: Path) -> None:
    """Its first block is dense; PEFT takes the names of its layers for those of experts."""
    marks = {"b": "<|begin_of_image|>", "e": "<|end_of_image|>", "vb": "<|begin_of_video|>", "ve": "<|end_of_video|>"}
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    words = tokenizer("<|user|>", start="<|assistant|>", **names, **marks)
    config = hf.Glm4vMoeConfig(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
            "eos_token_id": words.eos_token_id,
            "pad_token_id": 0,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 32,
            "image_size": 56,
        },
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        image_start_token_id=words.b_id,
        image_end_token_id=words.e_id,
        video_start_token_id=words.vb_id,
        video_end_token_id=words.ve_id,
    )
    image = Glm4vImageProcessorPil(patch_size=14, size={"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 64 * 64})
    save(folder, hf.Glm4vMoeForConditionalGeneration(config), image, words)
    placeholder = f"{words.b}{words.image_token}{words.e}"
    settings(folder, "Glm4vProcessor", chat("<|user|>\n", "<|assistant|>\n", placeholder, ""))


def internvl(folder: Path, text: type[hf.PreTrainedConfig], **values: Any) -> None:
    """An InternVL on any language model."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer("<|im_end|>", start="<|im_start|>", video_token="<video>", **names)
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=text(**{**TEXT, "vocab_size": len(words), "eos_token_id": words.eos_token_id, **values}),
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
    )
    image = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=3)
    save(folder, hf.InternVLForConditionalGeneration(config), image, words)
    settings(folder, "InternVLProcessor", chatml("<IMG_CONTEXT>\n"), image_seq_length=4)
