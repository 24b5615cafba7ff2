"""Tiny random models of the families whose processor needs torchvision.

Building them needs no torchvision, loading their processors does.
"""

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from families import TEXT, VISION, chat, chatml, save, settings, tokenizer
from more_families import image_settings, pixtral, turns
from transformers.utils import is_torchvision_available

MARKS = [
    pytest.mark.torchvision,
    pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: pip install 'safervlm[vision]'"),
]


def mistral3(folder: Path) -> None:
    """The processor of Pixtral; four patches are one token. The library's code fails for an image of one token."""
    names = {"image_token": "[IMG]", "image_break": "[IMG_BREAK]", "image_end": "[IMG_END]"}
    words = tokenizer("</s>", **names, start="[INST]", stop="[/INST]")
    config = hf.Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION, "image_size": 56, "patch_size": 7, "head_dim": 16},
        text_config={
            "model_type": "mistral",
            **TEXT,
            "vocab_size": len(words),
            "sliding_window": None,
            "head_dim": 8,
            "eos_token_id": words.eos_token_id,
        },
        image_token_index=words.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    save(folder, hf.Mistral3ForConditionalGeneration(config), words)
    image_settings(folder, "PixtralImageProcessor", size={"longest_edge": 56}, patch_size=14)
    tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    template = turns("[INST]", "", "[IMG]", "[/INST]\n", "</s>").replace("%} {%", "%}{%")
    settings(folder, "PixtralProcessor", template, patch_size=7, spatial_merge_size=2, **tokens)


def lfm2_vl(folder: Path) -> None:
    """Its language model has convolutions, and its image processor has no version for Pillow."""
    names = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    names |= {"image_thumbnail_token": "<|img_thumbnail|>"}
    words = tokenizer("<|im_end|>", start="<|im_start|>", **names)
    vision: dict[str, Any] = {key: value for key, value in VISION.items() if key != "image_size"}
    config = hf.Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", **vision, "num_patches": 16, "vision_use_head": False},
        text_config={
            "model_type": "lfm2",
            **TEXT,
            "vocab_size": len(words),
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 8,
            "eos_token_id": words.eos_token_id,
            "tie_word_embeddings": False,
        },
        image_token_id=words.image_token_id,
        projector_hidden_size=32,
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    save(folder, hf.Lfm2VlForConditionalGeneration(config), words)
    sizes = {"tile_size": 28, "encoder_patch_size": 14, "max_num_patches": 16, "downsample_factor": 2}
    sizes |= {"min_image_tokens": 1, "max_image_tokens": 4, "min_tiles": 2, "max_tiles": 2}
    image_settings(folder, "Lfm2VlImageProcessor", **sizes, do_image_splitting=False, use_thumbnail=False)
    settings(folder, "Lfm2VlProcessor", chatml("<image>"))


def kimi_k25(folder: Path) -> None:
    """Latent attention and experts; its image processor has no version for Pillow."""
    names = {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"}
    marks = {"begin": "<|media_begin|>", "content": "<|media_content|>", "close": "<|media_end|>"}
    words = tokenizer("<|im_end|>", start="<|im_start|>", **names, **marks)
    vision: dict[str, Any] = {key: value for key, value in VISION.items() if key != "image_size"}
    config = hf.Kimi_K25Config(
        vision_config={**vision, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config={
            "model_type": "deepseek_v3",
            **TEXT,
            "num_key_value_heads": 4,
            "vocab_size": len(words),
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            "eos_token_id": words.eos_token_id,
            "tie_word_embeddings": False,
        },
        projection_hidden_size=32,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        tie_word_embeddings=False,
    )
    save(folder, hf.Kimi_K25ForConditionalGeneration(config), words)
    image_settings(folder, "Kimi_K25ImageProcessor", patch_size=14)
    image = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
    template = chat("<|im_start|>user\n", "<|im_start|>assistant\n", image, "<|im_end|>\n")
    settings(folder, "Kimi_K25Processor", template)


BUILDERS = (pixtral, mistral3, lfm2_vl, kimi_k25)
