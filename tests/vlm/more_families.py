"""Tiny random models of further families: current ones, mixtures of experts, linear attention, capped logits."""

import importlib
import json
from pathlib import Path
from typing import Any

import families
import pytest
import transformers as hf
from families import SQUARE, TEXT, VISION, chat, chatml, save, settings, tokenizer, vicuna
from packaging.version import Version

# Rotary positions in time, height and width.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
}
QWEN3 = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
SMALL = {"shortest_edge": 28 * 28, "longest_edge": 64 * 64}


def pillow(module: str, name: str, **values: Any) -> Any:
    """The Pillow image processor of a family."""
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{name}ImageProcessorPil")(**values)


def image_settings(folder: Path, name: str, **values: Any) -> None:
    """Writes the configuration of an image processor that has no Pillow class of its own."""
    content = {"image_processor_type": name, **values}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def turns(user: str, assistant: str, image: str, asked: str, answered: str) -> str:
    """A chat template in which questions and responses end differently."""
    return (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{assistant} {{% else %}}{user}{{% endif %}}"
        f"{{% for c in m.content %}}{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if m.role == 'assistant' %}}{answered}{{% else %}}{asked}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


def qwen3_vl_moe(folder: Path) -> None:
    parts = hf.Qwen3VLMoeForConditionalGeneration, hf.Qwen3VLMoeConfig, "Qwen3VLProcessor"
    families.qwen(folder, *parts, patch=16, text=EXPERTS, **QWEN3, deepstack_visual_indexes=[0])


def qwen3_5(folder: Path) -> None:
    parts = hf.Qwen3_5ForConditionalGeneration, hf.Qwen3_5Config, "Qwen3VLProcessor"
    families.qwen(folder, *parts, patch=16, text=LINEAR, **QWEN3)


def qwen3_5_moe(folder: Path) -> None:
    parts = hf.Qwen3_5MoeForConditionalGeneration, hf.Qwen3_5MoeConfig, "Qwen3VLProcessor"
    text = {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16}
    families.qwen(folder, *parts, patch=16, text=text, **QWEN3)


def glm(folder: Path, name: str, kind: str, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """The common part of the GLM families; ``kind`` names the image processor and the processor."""
    names = {"image_token": "<|image|>", "image_start_token": "<|begin_of_image|>"}
    names |= {"image_end_token": "<|end_of_image|>", "video_token": "<|video|>"}
    names |= {"video_start_token": "<|begin_of_video|>", "video_end_token": "<|end_of_video|>"}
    words = tokenizer("<|user|>", start="<|assistant|>", **names)
    config = getattr(hf, f"{name}Config")(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "rope_parameters": MROPE,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": 0,
            **text,
        },
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "image_size": 56,
            "patch_size": 14,
            **vision,
        },
        **{f"{key}_id": words.convert_tokens_to_ids(token) for key, token in names.items()},
    )
    size = {edge: 2 * pixels for edge, pixels in SMALL.items()}
    image = pillow(kind.lower(), kind, patch_size=14, size=size)
    save(folder, getattr(hf, f"{name}ForConditionalGeneration")(config), image, words)
    placeholder = "<|begin_of_image|><|image|><|end_of_image|>"
    settings(folder, f"{kind}Processor", chat("<|user|>\n", "<|assistant|>\n", placeholder, ""))


def glm4v(folder: Path) -> None:
    glm(folder, "Glm4v", "Glm4v", {}, {})


def glm46v(folder: Path) -> None:
    glm(folder, "Glm46V", "Glm46V", {"model_type": "glm4v_text"}, {"model_type": "glm4v_vision"})


def glm4v_moe(folder: Path) -> None:
    """Its first block is dense; PEFT takes the names of its layers for those of experts."""
    text = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "rope_parameters": {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
    }
    glm(folder, "Glm4vMoe", "Glm4v", text, {})


def internvl_qwen3(folder: Path) -> None:
    """InternVL3.5: the vision part of InternVL with another language model."""
    families.internvl(folder, hf.Qwen3Config, head_dim=8)


def internvl_qwen3_moe(folder: Path) -> None:
    families.internvl(folder, hf.Qwen3MoeConfig, head_dim=8, **EXPERTS)


def gemma4(folder: Path, **text: Any) -> None:
    end = "<turn|>"
    names = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "video": "<|video|>"}
    names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    words = tokenizer(end, start="<|turn>", **names)
    config = hf.Gemma4Config(
        text_config={
            **TEXT,
            **MIXED,
            "vocab_size": len(words),
            "head_dim": 8,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": len(words),
            "hidden_size_per_layer_input": 0,
            "eos_token_id": words.eos_token_id,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            **text,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        audio_config=None,
        image_token_id=words.image_token_id,
        boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
        video_token_id=words.video_id,
        tie_word_embeddings=False,
    )
    image = pillow("gemma4", "Gemma4", patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    save(folder, hf.Gemma4ForConditionalGeneration(config), image, words)
    template = chat("<|turn>user\n", "<|turn>model\n", "<|image|>", f"{end}\n")
    settings(folder, "Gemma4Processor", template, image_seq_length=70)


def gemma4_capped(folder: Path) -> None:
    """Its language model caps the logits after the head."""
    gemma4(folder, final_logit_softcapping=30.0)


def gemma4_moe(folder: Path) -> None:
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    gemma4(folder, enable_moe_block=True, **experts)


def aya_vision(folder: Path) -> None:
    """Its logits are multiplied after the head, here by 1."""
    names = {
        "start_of_img": "<|START_OF_IMG|>",
        "end_of_img": "<|END_OF_IMG|>",
        "tile": "TILE",
        "whole": "TILE_GLOBAL",
        "row": "<|IMG_LINE_BREAK|>",
    }
    end, start = "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"
    words = tokenizer(end, start=start, image_token="<image>", patch="<|IMG_PATCH|>", **names)
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Cohere2Config(
            **TEXT,
            **MIXED,
            vocab_size=len(words),
            eos_token_id=words.eos_token_id,
            bos_token_id=1,
            pad_token_id=0,
            logit_scale=1.0,
            tie_word_embeddings=False,
        ),
        image_token_index=words.patch_id,
        tie_word_embeddings=False,
        downsample_factor=1,
    )
    image = pillow("got_ocr2", "GotOcr2", size=SQUARE, crop_to_patches=True, max_patches=3)
    template = chat(f"{start}U:", f"{start}A:\n", "<image>", end)
    sizes = {"patch_size": 14, "img_size": 28, "downsample_factor": 1}
    processor = hf.AyaVisionProcessor(image, words, **sizes, chat_template=template)
    save(folder, hf.AyaVisionForConditionalGeneration(config), processor)


def idefics2(folder: Path) -> None:
    end, around = "<end_of_utterance>", "<fake_token_around_image>"
    words = tokenizer(end, image_token="<image>", image_boundary_token=around)
    config = hf.Idefics2Config(
        vision_config={**VISION, "image_size": 56},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=hf.MistralConfig(
            **TEXT,
            vocab_size=len(words),
            sliding_window=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=0,
        ),
        image_token_id=words.image_token_id,
    )
    size = {"shortest_edge": 28, "longest_edge": 56}
    image = pillow("idefics2", "Idefics2", size=size, do_image_splitting=False)
    template = chat("User:", "Assistant: ", "<image>", f"{end}\n")
    processor = hf.Idefics2Processor(image, words, image_seq_len=4, chat_template=template)
    save(folder, hf.Idefics2ForConditionalGeneration(config), processor)


def ovis2(folder: Path) -> None:
    """An image is a distribution over visual tokens, between tokens that mark rows and columns of tiles."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    named = {f"mark_{number}": mark for number, mark in enumerate(marks)}
    words = tokenizer("<|im_end|>", start="<|im_start|>", image_token="<IMG_ATOM>", **named)
    config = hf.Ovis2Config(
        vision_config={**VISION, "vocab_size": 24, "num_visual_indicator_tokens": 5, "hidden_stride": 1},
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id),
        image_token_id=words.image_token_id,
        visual_indicator_token_ids=words.convert_tokens_to_ids(marks),
        vocab_size=len(words),
        hidden_size=32,
        tie_word_embeddings=False,
    )
    image = pillow("ovis2", "Ovis2", size=SQUARE, crop_to_patches=True, max_patches=3, min_patches=1)
    processor = hf.Ovis2Processor(image, words, chat_template=chatml("<image>\n"), image_seq_length=4)
    save(folder, hf.Ovis2ForConditionalGeneration(config), processor)


DEEPSEEK_END = "<|end▁of▁sentence|>"
DEEPSEEK_TEMPLATE = turns("User: ", "Assistant:", "<image_placeholder>", "\n\n", DEEPSEEK_END)


def deepseek(words: hf.PreTrainedTokenizerFast) -> dict[str, Any]:
    """The settings that both DeepSeek-VL have."""
    return {
        "text_config": hf.LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id),
        "vision_config": hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        "image_token_id": words.image_token_id,
        "tie_word_embeddings": False,
    }


def deepseek_vl(folder: Path) -> None:
    words = tokenizer(DEEPSEEK_END, image_token="<image_placeholder>")
    image = pillow("deepseek_vl", "DeepseekVL", size=SQUARE, min_size=4)
    processor = hf.DeepseekVLProcessor(image, words, DEEPSEEK_TEMPLATE, num_image_tokens=4)
    save(folder, hf.DeepseekVLForConditionalGeneration(hf.DeepseekVLConfig(**deepseek(words))), processor)


def deepseek_vl_hybrid(folder: Path) -> None:
    """It has a second vision tower, for a second version of the image in high resolution."""
    words = tokenizer(DEEPSEEK_END, image_token="<image_placeholder>")
    tower = hf.SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        window_size=2,
        global_attn_indexes=[1],
        output_channels=16,
        mlp_dim=64,
    )
    config = hf.DeepseekVLHybridConfig(**deepseek(words), high_res_vision_config=tower)
    high = {"height": 64, "width": 64}
    image = pillow("deepseek_vl_hybrid", "DeepseekVLHybrid", size=SQUARE, high_res_size=high, min_size=4)
    processor = hf.DeepseekVLHybridProcessor(image, words, DEEPSEEK_TEMPLATE, num_image_tokens=4)
    save(folder, hf.DeepseekVLHybridForConditionalGeneration(config), processor)


def exaone4_5(folder: Path) -> None:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "first": "<vision>", "last": "</vision>"}
    words = tokenizer("<|endofturn|>", start="[|user|]", **names)
    text = {**TEXT, **MIXED, "vocab_size": len(words), "head_dim": 8, "eos_token_id": words.eos_token_id}
    config = hf.Exaone4_5_Config(
        text_config={"model_type": "exaone4", **text},
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    image = pillow("qwen2_vl", "Qwen2VL", patch_size=14, size=SMALL)
    save(folder, hf.Exaone4_5_ForConditionalGeneration(config), image, words)
    template = chat("[|user|]\n", "[|assistant|]\n", "<vision><|image_pad|></vision>\n", "<|endofturn|>\n")
    settings(folder, "Exaone4_5_Processor", template)


def minicpmv4_6(folder: Path) -> None:
    """Images of all sizes are patches in one row."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"image_start_token": "<image>", "image_end_token": "</image>", "slice_start_token": "<slice>"}
    names |= {"slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
    words = tokenizer("<|im_end|>", start="<|im_start|>", **names)
    text = {**TEXT, **LINEAR, "head_dim": 8, "vocab_size": len(words), "eos_token_id": words.eos_token_id}
    config = hf.MiniCPMV4_6Config(
        text_config={"model_type": "qwen3_5_text", **text},
        vision_config={**VISION, "image_size": 56, "insert_layer_id": 0},
        insert_layer_id=0,
        image_size=56,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    image = pillow("minicpmv4_6", "MiniCPMV4_6", patch_size=14, scale_resolution=56, max_slice_nums=1)
    save(folder, hf.MiniCPMV4_6ForConditionalGeneration(config), image, words)
    settings(folder, "MiniCPMV4_6Processor", chatml("<|image_pad|>\n"))


def vipllava(folder: Path) -> None:
    """It joins the features of several layers of its vision tower."""
    words = tokenizer(image_token="<image>")
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)),
        image_token_index=words.image_token_id,
        vision_feature_layers=[-1, -2],
    )
    image = families.LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE)
    processor = hf.LlavaProcessor(image, words, 14, "default", vicuna(), num_additional_image_tokens=1)
    save(folder, hf.VipLlavaForConditionalGeneration(config), processor)


LLAVA_SETTINGS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def llava_next_video(folder: Path) -> None:
    words = tokenizer(image_token="<image>", video_token="<video>")
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)),
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        image_grid_pinpoints=families.PINPOINTS,
    )
    crop = {"size": {"shortest_edge": 28}, "crop_size": SQUARE}
    image = families.LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=families.PINPOINTS)
    save(folder, hf.LlavaNextVideoForConditionalGeneration(config), image, words)
    settings(folder, "LlavaNextVideoProcessor", vicuna(), **LLAVA_SETTINGS)


def video_llava(folder: Path) -> None:
    words = tokenizer(image_token="<image>", video_token="<video>")
    config = hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_seq_length=4,
    )
    save(folder, hf.VideoLlavaForConditionalGeneration(config), words)
    image_settings(folder, "VideoLlavaImageProcessor", size={"shortest_edge": 28}, crop_size=SQUARE)
    settings(folder, "VideoLlavaProcessor", vicuna(), **LLAVA_SETTINGS)


def aria(folder: Path) -> None:
    """Its processor makes every image 980 pixels wide or high."""
    words = tokenizer("<|im_end|>", start="<|im_start|>", image_token="<|img|>")
    config = hf.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **VISION, "image_size": 980, "patch_size": 98},
        text_config={
            **TEXT,
            "intermediate_size": 16,
            "vocab_size": len(words),
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": 0,
        },
        projector_patch_to_query_dict={100: 8},
        image_token_index=words.image_token_id,
    )
    image = pillow("aria", "Aria", max_image_size=980, min_image_size=336)
    template = chatml("<fim_prefix><|img|><fim_suffix>")
    processor = hf.AriaProcessor(image, words, chat_template=template, size_conversion={490: 8, 980: 8})
    save(folder, hf.AriaForConditionalGeneration(config), processor)


def ernie4_5_vl(folder: Path) -> None:
    """Image tokens have experts of their own."""
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>"}
    names |= {"image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
    names |= {"video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"}
    words = tokenizer("</s>", **names)
    config = hf.Ernie4_5_VLMoeConfig(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "moe_intermediate_size": [16, 8],
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["sparse", "sparse"],
            "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
            "eos_token_id": words.eos_token_id,
        },
        vision_config={"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "patch_size": 14},
        tie_word_embeddings=False,
        **{f"{key}_id": words.convert_tokens_to_ids(token) for key, token in names.items()},
    )
    image = pillow("ernie4_5_vl_moe", "Ernie4_5_VLMoe", patch_size=14, size=SMALL)
    save(folder, hf.Ernie4_5_VLMoeForConditionalGeneration(config), image, words)
    placeholder = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    settings(folder, "Ernie4_5_VLMoeProcessor", chat("User: ", "Assistant: ", placeholder, "</s>"))


def hunyuan_vl(folder: Path) -> None:
    """The library numbers its images over the batch, so that positions depend on the other questions."""
    end = "<|hy_Assistant|>"
    names = {"image_token": "<|hy_img|>", "image_start_token": "<|hy_vs|>", "image_end_token": "<|hy_ve|>"}
    words = tokenizer(end, start="<|hy_User|>", **names)
    rope = {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [1, 1, 1, 1]}
    text = {**TEXT, "vocab_size": len(words), "head_dim": 8, "eos_token_id": words.eos_token_id}
    config = hf.HunYuanVLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={
            **{key: value for key, value in VISION.items() if key != "image_size"},
            "out_hidden_size": 32,
            "max_image_size": 64,
            "min_image_size": 28,
            "text_hidden_size": 32,
        },
        image_token_id=words.image_token_id,
        im_start_id=words.image_start_token_id,
        im_end_id=words.image_end_token_id,
        tie_word_embeddings=False,
    )
    image = pillow("hunyuan_vl", "HunYuanVL", patch_size=14, size=SMALL)
    save(folder, hf.HunYuanVLForConditionalGeneration(config), image, words)
    settings(folder, "HunYuanVLProcessor", chat("<|hy_User|>", "Answer: ", "<|hy_vs|><|hy_img|><|hy_ve|>", end))


def janus(folder: Path) -> None:
    """Its ``generate`` ignores logits processors."""
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(DEEPSEEK_END, **names)
    config = hf.JanusConfig(
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id),
        vision_config={**VISION, "projection_dim": 32, "num_image_tokens": 4, "mlp_ratio": 2.0, "depth": 1},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 32,
            "num_hidden_layers": 1,
            "image_token_embed_dim": 32,
        },
        image_token_id=words.image_token_id,
        tie_word_embeddings=False,
    )
    template = turns("<|User|>: ", "<|Assistant|>:", "<image_placeholder>\n", "\n\n", DEEPSEEK_END)
    image = pillow("janus", "Janus", size=SQUARE, min_size=4)
    processor = hf.JanusProcessor(image, words, chat_template=template, num_image_tokens=4)
    save(folder, hf.JanusForConditionalGeneration(config), processor)


def emu3(folder: Path) -> None:
    """Images become codes of a VQ-VAE, which has BatchNorm, and which zero padding of an image changes."""
    names = {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"}
    names |= {"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"}
    codes = {f"code_{number}": f"<|visual token {number:06d}|>" for number in range(16)}
    words = tokenizer("<|extra_204|>", **names, **codes)
    numbers = {code: words.convert_tokens_to_ids(code) for code in codes.values()}
    config = hf.Emu3Config(
        vq_config={
            "codebook_size": 16,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "temporal_downsample_factor": 1,
            "attn_resolutions": [],
        },
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "eos_token_id": words.eos_token_id,
            "pad_token_id": 0,
            "bos_token_id": 1,
        },
        vocabulary_map={**numbers, "<image>": words.image_token_id, "<|extra_200|>": words.eof_token_id},
    )
    save(folder, hf.Emu3ForConditionalGeneration(config), words)
    image_settings(folder, "Emu3ImageProcessor", min_pixels=32 * 32, max_pixels=64 * 64, spatial_factor=8)
    settings(folder, "Emu3Processor", chat("USER: ", "ASSISTANT: ", "<image>", " "))


def pixtral(folder: Path) -> None:
    """A LLaVA whose processor is another one: rows of an image end in tokens of their own."""
    names = {"image_token": "[IMG]", "image_break": "[IMG_BREAK]", "image_end": "[IMG_END]"}
    words = tokenizer("</s>", **names, start="[INST]", stop="[/INST]")
    text = {**TEXT, "vocab_size": len(words), "sliding_window": None, "head_dim": 8}
    config = hf.LlavaConfig(
        vision_config={"model_type": "pixtral", **VISION, "image_size": 56, "head_dim": 16},
        text_config={"model_type": "mistral", **text, "eos_token_id": words.eos_token_id},
        image_token_index=words.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    image = pillow("pixtral", "Pixtral", size={"longest_edge": 56}, patch_size=14)
    save(folder, hf.LlavaForConditionalGeneration(config), image, words)
    tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    template = turns("[INST]", "", "[IMG]", "[/INST]\n", "</s>").replace("%} {%", "%}{%")
    settings(folder, "PixtralProcessor", template, patch_size=14, spatial_merge_size=1, **tokens)


def got_ocr2(folder: Path) -> None:
    """Its processor nests each image in a list."""
    words = tokenizer("<|im_end|>", start="<|im_start|>", image_token="<imgpad>", first="<img>", last="</img>")
    config = hf.GotOcr2Config(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
        },
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id),
        image_token_index=words.image_token_id,
    )
    image = pillow("got_ocr2", "GotOcr2", size={"height": 64, "width": 64})
    save(folder, hf.GotOcr2ForConditionalGeneration(config), image, words)
    settings(folder, "GotOcr2Processor", chatml("<img><imgpad></img>"))


def llama4(folder: Path) -> None:
    """Its image processor has no version for Pillow."""
    names = {"image_token": "<|patch|>", "first": "<|image_start|>", "last": "<|image_end|>", "image": "<|image|>"}
    words = tokenizer("<|eot|>", start="<|header_start|>", **names)
    config = hf.Llama4Config(
        vision_config={
            **{**VISION, "intermediate_size": 128},
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        text_config={
            **TEXT,
            "intermediate_size_mlp": 64,
            "vocab_size": len(words),
            "head_dim": 8,
            "num_local_experts": 4,
            "attention_chunk_size": 16,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": 0,
        },
        image_token_index=words.image_token_id,
        boi_token_index=words.first_id,
        eoi_token_index=words.last_id,
    )
    save(folder, hf.Llama4ForConditionalGeneration(config), words)
    image_settings(folder, "Llama4ImageProcessor", size=SQUARE, max_patches=3)
    template = chat("<|header_start|>user\n\n", "<|header_start|>assistant\n\n", "<|image|>", "<|eot|>")
    settings(folder, "Llama4Processor", template, patch_size=14, pixel_shuffle_ratio=0.5)


def fuyu(folder: Path) -> None:
    """Its image processor for Pillow fails."""
    words = tokenizer("|ENDOFTEXT|", image_token="|SPEAKER|", row="|NEWLINE|")
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = hf.FuyuConfig(
        text_config={
            "model_type": "persimmon",
            **text,
            "vocab_size": len(words),
            "eos_token_id": words.eos_token_id,
        },
        image_size=30,
        patch_size=15,
        image_token_id=words.image_token_id,
    )
    image = pillow("fuyu", "Fuyu", size={"height": 60, "width": 60}, patch_size={"height": 15, "width": 15})
    save(folder, hf.FuyuForCausalLM(config), hf.FuyuProcessor(image, words))


# Those that pass every check of tests/vlm/test_transformers.py; the others are rejected, or need another package.
BUILDERS = (
    *(qwen3_vl_moe, qwen3_5, qwen3_5_moe, glm4v, glm46v, glm4v_moe, internvl_qwen3, internvl_qwen3_moe),
    *(gemma4, gemma4_capped, gemma4_moe, aya_vision, idefics2, ovis2, deepseek_vl, deepseek_vl_hybrid),
    *(exaone4_5, minicpmv4_6, vipllava, llava_next_video, video_llava, aria, ernie4_5_vl, hunyuan_vl, emu3),
)
# Linear attention, capped logits, questions that are computed one by one, and token types that choose experts.
FAST = {qwen3_5, gemma4_capped, minicpmv4_6, ernie4_5_vl}
# Before transformers 5.24 these processors need torchvision.
NEWEST = {gemma4, gemma4_capped, gemma4_moe, hunyuan_vl}
NEEDS_5_24 = pytest.mark.skipif(Version(hf.__version__) < Version("5.24"), reason="needs transformers 5.24")
