"""A small model of the InternLM-XComposer2-VL family, with code of its own beside the weights."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from safervlm.vlm.lora import LoRA
from safervlm.vlm.remote.xcomposer import LANGUAGE_LAYERS, Tower, XComposer2

PUBLISHED = os.environ.get("SAFERVLM_XCOMPOSER_CODE")
NO_CODE = pytest.mark.skipif(PUBLISHED is None, reason="SAFERVLM_XCOMPOSER_CODE names no folder with XComposer2's code")
LORA = LoRA(r=4, alpha=8, dropout=0.0, target_modules=LANGUAGE_LAYERS)
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG: dict[str, Any] = {
    "architectures": ["InternLMXComposer2ForCausalLM"],
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "img_size": 28,
    "initializer_range": 0.02,
    "max_length": 2048,
    "max_position_embeddings": 2048,
    "model_type": "internlm",
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 1.0, "type": "dynamic"},
    "rope_theta": 50.0,
    "tie_word_embeddings": False,
    "use_cache": False,
}
CONFIGURATION = """
from transformers import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    model_type = "internlm"

    def __init__(self, rope_theta=1.0, rope_scaling=None, **kwargs):
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        assert rope_scaling is None or len(self.rope_scaling) == 2
        super().__init__(**kwargs)
"""
TOKENIZATION = """
import sentencepiece
from transformers.tokenization_utils import PreTrainedTokenizer


class TinyTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "./tokenizer.model"}

    def __init__(self, vocab_file, **kwargs):
        self.sp_model = sentencepiece.SentencePieceProcessor(vocab_file)
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return self.sp_model.get_piece_size()

    def get_vocab(self):
        return {self.sp_model.id_to_piece(n): n for n in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.sp_model.decode(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0]
"""
# Has the requirements and the errors of the published code: on purpose it does not run, or is wrong in a batch or in
# training, without the adaptations of safervlm.vlm.remote.xcomposer.
MODELING = """
import torch
import torch.utils.checkpoint
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode
from transformers import CLIPVisionModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tiny import TinyConfig


def build_vision_tower():
    return CLIPVisionTower("openai/clip-vit-large-patch14-336")


class CLIPVisionTower(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.is_loaded = name, False
        self.load_model()

    def load_model(self):
        self.vision_tower = CLIPVisionModel.from_pretrained(self.name)
        self.is_loaded = True

    def forward(self, images):
        tower = self.vision_tower
        seen = tower(images.to(device=tower.device, dtype=tower.dtype), output_hidden_states=True)
        return seen.hidden_states[-1][:, 1:].to(images.dtype)


class PLoRA(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)
        self.lora_dropout = nn.Dropout(0.5)
        self.Plora_A, self.Plora_B = nn.Linear(inside, 8, bias=False), nn.Linear(8, outside, bias=False)

    def forward(self, states, im_mask=None):
        out = super().forward(states)
        if im_mask is not None and im_mask.any():
            out[im_mask] += self.Plora_B(self.Plora_A(self.lora_dropout(states[im_mask])))
        return out


class Rotary(nn.Module):
    def __init__(self, width, length, base):
        super().__init__()
        self.register_buffer("inv_freq", base ** -(torch.arange(0, width, 2).float() / width), persistent=False)
        angles = (torch.arange(length)[:, None] * self.inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin_cached", angles.sin().to(torch.get_default_dtype()), persistent=False)


def rotate_half(states):
    first, second = states.chunk(2, -1)
    return torch.cat([-second, first], -1)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids):
    cos, sin = cos[-q.shape[2]:], sin[-q.shape[2]:]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.wqkv, self.wo = PLoRA(width, 3 * width), PLoRA(width, width)
        self._init_rope()

    def _init_rope(self):
        config = self.config
        assert config.rope_scaling is None or config.rope_scaling["type"] == "dynamic"
        width = config.hidden_size // config.num_attention_heads
        self.rotary_emb = Rotary(width, config.max_position_embeddings, config.rope_theta)

    def forward(self, states, mask, positions, past, im_mask):
        packed = self.wqkv(states, im_mask).unflatten(-1, (3, self.config.num_attention_heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        length = key.shape[2] + (0 if past is None else past[0].shape[2])
        tables = (self.rotary_emb.cos_cached[:length], self.rotary_emb.sin_cached[:length])
        query, key = apply_rotary_pos_emb(query, key, *tables, positions)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.wo(out.transpose(1, 2).flatten(2), im_mask), (key, value)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w2, self.w3 = PLoRA(width, inner), PLoRA(inner, width), PLoRA(width, inner)

    def forward(self, states, im_mask):
        return self.w2(self.w1(states, im_mask).sigmoid() * self.w3(states, im_mask), im_mask)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(2))

    def forward(self, states, mask, positions, past=None, im_mask=None):
        change, cache = self.attention(self.norms[0](states), mask, positions, past, im_mask)
        states = states + change
        return states + self.feed_forward(self.norms[1](states), im_mask), cache


class InternLM2Model(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, im_mask):
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
            im_mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        states = inputs_embeds
        length, past = states.shape[1], 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=states.device)[None]
        mask = torch.ones(length, past + length, dtype=torch.bool, device=states.device).tril(past)[None, None]
        if attention_mask is not None:
            # A padded place looks at itself: a row without any place would be nan.
            own = torch.eye(past + length, dtype=torch.bool, device=states.device)[past:]
            mask = mask & (attention_mask[:, None, None, :].bool() | own)
        caches = []
        for number, layer in enumerate(self.layers):
            before = None if past_key_values is None else past_key_values[number]
            if self.gradient_checkpointing and self.training:
                run = torch.utils.checkpoint.checkpoint
                states, cache = run(layer, states, mask, position_ids, None, im_mask)
            else:
                states, cache = layer(states, mask, position_ids, past=before, im_mask=im_mask)
            caches.append(cache)
        return self.norm(states), tuple(caches)


class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig
    supports_gradient_checkpointing = True
    _tied_weights_keys = ["output.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.max_length = config.max_length
        self.post_init()
        self.vit = build_vision_tower()
        self.vision_proj = nn.Linear(32, config.hidden_size)
        self.vis_processor = transforms.Compose([
            transforms.Resize((config.img_size, config.img_size), interpolation=InterpolationMode.BICUBIC),
            transforms.ToTensor(),
        ])

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, InternLM2Model):
            module.gradient_checkpointing = value

    def get_decoder(self):
        return self.model

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        return self.output

    def encode_img(self, image):
        return self.img2emb(image)[0]

    def img2emb(self, image):
        seen = self.vision_proj(self.vit(image.to(self.device)))
        return seen, torch.ones(seen.shape[:2]), None

    def interleav_wrap_chat(self, tokenizer, query, image, history, meta_instruction):
        first = f"[UNUSED_TOKEN_146]system\\n{meta_instruction}[UNUSED_TOKEN_145]\\n" if meta_instruction else ""
        turn = f"[UNUSED_TOKEN_146]user\\n{query}[UNUSED_TOKEN_145]\\n[UNUSED_TOKEN_146]assistant\\n"
        embeds, masks = [], []
        for number, part in enumerate((first + turn).split("<ImageHere>")):
            words = self.model.tok_embeddings(tokenizer(part, return_tensors="pt").to(self.device).input_ids)
            embeds.append(words)
            masks.append(torch.zeros(words.shape[:2]))
            if number < len(image):
                embeds.append(image[number][None])
                masks.append(torch.ones(1, image[number].shape[0]))
        return {"inputs_embeds": torch.cat(embeds, 1)}, torch.cat(masks, 1).bool()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, use_cache=None, return_dict=None, **kwargs):
        states, caches = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
                                    kwargs.get("im_mask"))
        return CausalLMOutputWithPast(logits=self.output(states), past_key_values=caches if use_cache else None)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None,
                                      inputs_embeds=None, im_mask=None, **kwargs):
        position_ids = kwargs.get("position_ids")
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values[0][0].shape[2]:]
        if position_ids is None and attention_mask is not None:
            position_ids = attention_mask.long().cumsum(-1) - 1
            position_ids.masked_fill_(attention_mask == 0, 1)
            position_ids = position_ids[:, -input_ids.shape[1]:]
        return dict(input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values,
                    attention_mask=attention_mask, im_mask=im_mask, use_cache=kwargs.get("use_cache"))

    @torch.no_grad()
    def chat(self, tokenizer, query, image=None, history=[], meta_instruction="You are tiny.\\nIt is safe.", **kwargs):
        raise NotImplementedError
"""


def write(folder: Path, names: dict[str, str], **config: Any) -> None:
    """Configuration and tokenizer."""
    text = "Is this image safe? Yes, it is. No, it is unsafe. user assistant system"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text]),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    words = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size() + 3
    auto_map = {"AutoTokenizer": [names.pop("AutoTokenizer"), None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": names, "vocab_size": words, **config}))


def write_own(folder: Path) -> None:
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "tokenization_tiny.py").write_text(TOKENIZATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    names = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        "AutoTokenizer": "tokenization_tiny.TinyTokenizer",
    }
    write(folder, names)


def write_unchanged(folder: Path, **config: Any) -> None:
    assert PUBLISHED is not None
    for file in Path(PUBLISHED).glob("*.py"):
        shutil.copy(file, folder)
    names = {
        "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
        "AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
        "AutoTokenizer": "tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer",
    }
    write(folder, names, **config)


def write_published(folder: Path) -> None:
    write_unchanged(folder)
    file = folder / "build_mlp.py"
    code = file.read_text()
    for wide, narrow in (
        ("mm_hidden_size = 1024", "mm_hidden_size = 32"),
        ("hidden_size = 4096", "hidden_size = 32"),
        ("new_size = 35", "new_size = 2"),
    ):
        assert wide in code
        code = code.replace(wide, narrow)
    file.write_text(code)


def fill(folder: Path) -> None:
    """Random weights that depend on image and words, except for computed buffers."""
    model = plain_model(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
            if "patch_embedding" in name or not parameter.any():
                parameter.normal_(0, 0.5)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def plain_model(folder: Path) -> Any:
    """The unchanged remote class from a fresh copy, without the download of CLIP."""
    copy = folder.with_name(f"{folder.name}_plain")
    if not copy.exists():
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    vlm = new(copy)
    remote = vlm.remote_class("AutoModelForCausalLM")
    module: Any = sys.modules[remote.__module__]
    tower = sys.modules[module.build_vision_tower.__module__].CLIPVisionTower

    def load_model(self: Any) -> None:
        self.vision_tower, self.is_loaded = Tower(vlm.config.img_size), True

    with patch.object(tower, "load_model", load_model):
        model = remote(vlm.config).eval()
    if (folder / "model.safetensors").is_file():
        model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def new(folder: Path, **settings: Any) -> XComposer2:
    return XComposer2(str(folder), **{"trust_remote_code": True, "dtype": "float32", "lora": LORA, **settings})
