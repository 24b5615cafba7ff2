"""The InternLM-XComposer2-VL family: model code that is distributed with the weights, run with current transformers.

Every test runs on a small model whose code is written here. If SAFERVLM_XCOMPOSER_CODE names a folder with the
published code (modeling_internlm_xcomposer2.py and the files beside it), it also runs on a tiny model of that code. The
published code has fixed widths; for the tiny model only these are replaced.
"""

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import numpy as np
import pytest
import sentencepiece
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safervlm.errors import RecordError
from safervlm.records import Example, Question
from safervlm.vlm.lora import Adapter, LoRA
from safervlm.vlm.prefix import join
from safervlm.vlm.remote import xcomposer
from safervlm.vlm.remote.xcomposer import END, LANGUAGE_LAYERS, Tower, XComposer2, rotate_rows
from safervlm.vlm.sampling import Sampling

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


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The vision tower is small, too."""
    with families.remote_modules(tmp_path_factory.mktemp("modules")), patch.dict(xcomposer.CLIP, CLIP):
        yield


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


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(write_own, id="own"),
        pytest.param(write_published, id="published", marks=[NO_CODE, pytest.mark.slow]),
    ],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model: code, configuration, tokenizer, weights except for computed buffers."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    fill(folder)
    return folder


def new(folder: Path, **settings: Any) -> XComposer2:
    return XComposer2(str(folder), **{"trust_remote_code": True, "dtype": "float32", "lora": LORA, **settings})


def loaded(folder: Path, **settings: Any) -> XComposer2:
    vlm = new(folder, **settings)
    vlm.load()
    return vlm


@pytest.fixture(scope="module")
def base(folder: Path) -> XComposer2:
    return loaded(folder)


@pytest.fixture
def policy(folder: Path) -> XComposer2:
    """The same with an effective adapter."""
    return families.with_effect(new(folder), "value")


@pytest.fixture(scope="module")
def plain(folder: Path, base: XComposer2) -> Any:
    """The remote model, loaded after ours, so that changes by ours would be detected."""
    return plain_model(folder)


@pytest.fixture
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    """Five questions of three lengths about three images, each with two responses."""
    return families.ask(make_questions(5))


def pixels(question: Question, size: int = 28) -> Tensor:
    assert question.image_path is not None
    image = Image.open(question.image_path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    scaled = np.asarray(image, np.float64) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    channels = [torch.tensor((scaled[..., c] - mean[c]) / deviation[c], dtype=torch.float32) for c in range(3)]
    return torch.stack(channels)[None]


@torch.no_grad()
def plain_prompt(vlm: XComposer2, model: Any, question: Question) -> dict[str, Tensor]:
    """A question encoded by the model's own functions."""
    image = model.encode_img(pixels(question, vlm.collator.image_size))
    query = f"<ImageHere>{question.prompt}"
    inputs, im_mask = model.interleav_wrap_chat(vlm.tokenizer, query, image, [], vlm.collator.system)
    return {**inputs, "im_mask": im_mask}


def answered(model: Any, inputs: dict[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
    """The same followed by tokens of a response."""
    words = model.model.tok_embeddings(torch.tensor([tokens]))
    return {
        "inputs_embeds": torch.cat([inputs["inputs_embeds"], words], 1),
        "im_mask": torch.cat([inputs["im_mask"], torch.zeros(1, len(tokens), dtype=torch.bool)], 1),
    }


@torch.no_grad()
def plain_greedy(vlm: XComposer2, model: Any, question: Question, steps: int) -> list[int]:
    """One forward pass of the whole sequence per token: no cache, no padding, no mask, no generate."""
    inputs = plain_prompt(vlm, model, question)
    written: list[int] = []
    while len(written) < steps and (not written or written[-1] not in vlm.eos_token_ids):
        logits = model(**inputs, use_cache=False).logits[0, -1]
        logits[vlm.suppressed] = -torch.inf
        written.append(int(logits.argmax()))
        inputs = answered(model, inputs, written[-1:])
    return written


def answer_ids(vlm: XComposer2, question: Question, answer: str) -> list[int]:
    """As in the training of the model: question, response and end of turn are one text."""
    before = f"{question.prompt}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    start = vlm.tokenizer(before).input_ids
    whole = vlm.tokenizer(f"{before}{answer}[UNUSED_TOKEN_145]").input_ids
    assert whole[: len(start)] == start
    return whole[len(start) :]


def plain_logprobs(vlm: XComposer2, model: Any, example: Example, answer: str) -> Tensor:
    inputs, ids = plain_prompt(vlm, model, example.question), answer_ids(vlm, example.question, answer)
    start = inputs["im_mask"].shape[1]
    logits = model(**answered(model, inputs, ids), use_cache=False).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def test_nothing_runs_unless_asked_for_and_pinned() -> None:
    with pytest.raises(ValueError, match=r"^vlm.trust_remote_code: .* set it to true, or measure another model$"):
        XComposer2(revision="a" * 40)
    with pytest.raises(ValueError, match=r"^vlm.revision: .* pin it: give the full 40 digits of a commit.*$"):
        XComposer2(revision="main", trust_remote_code=True)
    XComposer2(revision="a" * 40, trust_remote_code=True)


def test_the_tokenizer_lies_beside_the_weights(tmp_path: Path) -> None:
    """Otherwise its code would come from another repository at an unpinned commit."""
    write_own(tmp_path)
    auto_map = {"AutoTokenizer": ["someone/else--tokenization_tiny.TinyTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    with pytest.raises(ValueError, match=r"^vlm.model: the code of .* must be in its own repository, but AutoTok"):
        _ = new(tmp_path).tokenizer


@pytest.mark.parametrize(
    ("old", "other"),
    [
        ("user\\n{query}", "user: {query}"),
        ("self, tokenizer, query, image, history, meta_instruction", "self, query, image, history, meta_instruction"),
    ],
)
def test_another_layout_is_rejected(old: str, other: str, tmp_path: Path) -> None:
    """Later models of the authors have another layout, in code with the same names."""
    write_own(tmp_path)
    assert old in MODELING
    (tmp_path / "modeling_tiny.py").write_text(MODELING.replace(old, other))
    with pytest.raises(ValueError, match=r"^vlm.model: .* lays its questions out otherwise than InternLM-XComposer2"):
        _ = new(tmp_path).collator


def test_a_model_of_many_image_sizes_is_rejected(tmp_path: Path) -> None:
    """As 4KHD, whose code has the same names and parameters."""
    write_own(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["img_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^vlm.model: .* lays its questions out otherwise than InternLM-XComposer2"):
        new(tmp_path).load()


def test_a_tokenizer_without_turns_is_rejected(tmp_path: Path) -> None:
    """An unknown token would end every answer."""
    write_own(tmp_path)
    with (
        patch.object(xcomposer, "END", "[UNUSED_TOKEN_7]"),
        pytest.raises(ValueError, match=r"^vlm.model: the tokenizer of .* has no \[UNUSED_TOKEN_7\]; name a"),
    ):
        _ = new(tmp_path).eos_token_ids


def test_what_is_computed_is_what_the_code_computes(base: XComposer2, plain: Any) -> None:
    """The library leaves the tables uninitialised, without a warning."""
    expected = dict(plain.named_buffers())
    found = dict(base.base.named_buffers())
    assert found.keys() == expected.keys()
    assert len(found) >= 2 * 3
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    slowest = next(tensor for name, tensor in found.items() if name.endswith("inv_freq"))[-1]
    torch.testing.assert_close(slowest, torch.tensor(50.0 ** -(6 / 8)))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(base.base.state_dict()[name], tensor), name


@pytest.mark.parametrize("scaling", [{"factor": 2.0, "type": "dynamic"}, None])
def test_the_configuration_is_the_files(scaling: Any, folder: Path, tmp_path: Path) -> None:
    """The library writes its own names into the scaling, which the code uses, and drops the length, which it needs."""
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_scaling": scaling}))
    vlm = loaded(tmp_path / "other")
    assert vlm.base.config.rope_scaling == scaling
    assert vlm.base.max_length == vlm.collator.max_length == CONFIG["max_length"]
    vlm.base.config.save_pretrained(tmp_path)


def test_weights_that_are_pickled_are_read_and_distinguished(folder: Path, tmp_path: Path) -> None:
    """As the published weights; otherwise a folder would be identified by its configuration only."""
    shutil.copytree(folder, tmp_path / "pickled")
    file = tmp_path / "pickled" / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    vlm = loaded(tmp_path / "pickled")
    for name, tensor in weights.items():
        assert torch.equal(vlm.base.state_dict()[name], tensor), name
    before = vlm.describe()
    torch.save(weights | {"output.weight": weights["output.weight"] + 1}, tmp_path / "pickled" / "pytorch_model.bin")
    after = vlm.describe()
    assert before["weights"] != after["weights"]
    assert before | {"weights": None} == after | {"weights": None}


def test_missing_weights_are_rejected(folder: Path, tmp_path: Path) -> None:
    """The library would initialise them randomly; the image's part of a layer is one of them."""
    shutil.copytree(folder, tmp_path / "less")
    file = tmp_path / "less" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.attention.wo.Plora_A.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^vlm.model: .* lacks 1 weights, for example .*wo.Plora_A.weight"):
        loaded(tmp_path / "less")


def test_rows_are_turned_as_the_code_turns_one(base: XComposer2, plain: Any) -> None:
    """The code counts columns: a padded row would be rotated further than alone, which low precision reveals."""
    module: Any = sys.modules[type(plain.model).__module__]
    assert module.apply_rotary_pos_emb is not rotate_rows
    rotary = plain.model.layers[0].attention.rotary_emb
    cos, sin = rotary.cos_cached[:7], rotary.sin_cached[:7]
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    alone = module.apply_rotary_pos_emb(query, key, cos[:5], sin[:5], torch.arange(5)[None])
    padded = torch.tensor([[1, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    rows = [
        torch.cat([torch.randn(1, n, 2, 8), states], 2).expand(2, -1, -1, -1) for n, states in ((4, query), (2, key))
    ]
    for together, expected in zip(rotate_rows(*rows, cos, sin, padded), alone, strict=True):
        assert torch.equal(together[:1, :, 2:], expected)
    last = module.apply_rotary_pos_emb(query[:, :, -1:], key[:, :, -1:], cos[:5], sin[:5], torch.tensor([[4]]))
    for one, expected in zip(
        rotate_rows(query[:, :, -1:], key[:, :, -1:], cos, sin, torch.tensor([[4]])), last, strict=True
    ):
        assert torch.equal(one, expected)


def test_a_row_counts_its_places_as_it_does_alone(base: XComposer2, examples: list[Example]) -> None:
    """By the rotation of the loaded model."""
    seen: list[Tensor] = []

    def keep(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        seen.append(cos)
        return turn(states, cos, sin)

    turn = xcomposer.rotate
    greedy = Sampling(temperature=0, max_new_tokens=2)
    with patch.object(xcomposer, "rotate", keep):
        base.generate(base.collator(examples[:2]), greedy, seed=0)
        together, seen = seen, []
        base.generate(base.collator(examples[:1]), greedy, seed=0)
    assert len(together) == len(seen) == 2 * 2 * 2
    assert together[0].shape[1] > seen[0].shape[1]
    for rows, row in zip(together, seen, strict=True):
        assert torch.equal(rows[:1, -row.shape[1] :], row)


def test_padding_changes_no_logits(base: XComposer2, examples: list[Example]) -> None:
    encodings = base.collator(examples).encodings
    joined = join(encodings, base.pad_token_id, base.dtype, {"input_ids", "im_mask", "attention_mask"})
    model: Any = base.base
    with torch.no_grad():
        together = model(**model.prepare_inputs_for_generation(**joined)).logits[:, -1]
        alone = torch.cat([model(**encoding).logits[:, -1] for encoding in encodings])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_collator_lays_out_what_the_model_wants(base: XComposer2, plain: Any, examples: list[Example]) -> None:
    collator = pickle.loads(pickle.dumps(base.collator))
    batch = collator(examples)
    for encoding, completions, example in zip(batch.encodings, batch.completions, examples, strict=True):
        expected = plain_prompt(base, plain, example.question)
        words = plain.model.tok_embeddings(encoding["input_ids"])
        places = encoding["im_mask"]
        assert torch.equal(places, expected["im_mask"])
        assert torch.equal(words[~places], expected["inputs_embeds"][~places])
        torch.testing.assert_close(encoding["images"], pixels(example.question), atol=1e-5, rtol=0)
        assert completions == [answer_ids(base, example.question, answer) for answer in example.completions]


@pytest.mark.parametrize("mark", ["</s>", "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_92]", "<ImageHere>"])
def test_a_question_with_a_mark_is_set_aside(mark: str, base: XComposer2, examples: list[Example]) -> None:
    """It would start a new turn or image."""
    question = replace(examples[0].question, prompt=f"Is {mark} safe?")
    with pytest.raises(RecordError, match=f"^{question.id}: .* special token") as raised:
        base.collator([Example(question)])
    assert mark in str(raised.value)
    with pytest.raises(RecordError, match="special token"):
        base.collator([Example(examples[0].question, (f"Yes {mark}",))])


def test_the_model_gets_its_own_words_unless_others_are_given(folder: Path, base: XComposer2) -> None:
    question = Question("", "", "", None, "alignment", 0, "Safe?", "", "", "")
    own, mine, none = (
        vlm.tokenizer.decode(vlm.collator.encode(question)["input_ids"][0]).split("user\n")[0]
        for vlm in (base, new(folder, system="Be kind."), new(folder, system=""))
    )
    assert "[UNUSED_TOKEN_146]system\nYou are " in own
    assert "[UNUSED_TOKEN_146]system\nBe kind.[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]" in mine
    assert "system" not in none
    told = [vlm.describe()["system"] for vlm in (base, new(folder, system="Be kind."), new(folder, system=""))]
    assert told == [None, "Be kind.", ""]


def test_a_response_ends_with_the_turn_and_has_no_mark_in_it(base: XComposer2) -> None:
    """The tokenizer lists the marks as words, so they would be shown and sampled."""
    words = base.tokenizer
    end = words.convert_tokens_to_ids(END)
    assert base.eos_token_ids == [end, words.eos_token_id]
    yes = words("Yes.", add_special_tokens=False).input_ids
    assert base.generation([*yes, end, *yes]).text == "Yes."
    assert base.generation([*yes, words.eos_token_id]).text == "Yes."
    marks = {words.convert_tokens_to_ids(f"[UNUSED_TOKEN_{number}]") for number in (0, 146)}
    beyond = set(range(len(words), base.base.get_output_embeddings().out_features))
    expected = {words.unk_token_id, words.bos_token_id, *marks, *beyond}
    assert len(beyond) == 3
    assert set(base.suppressed.tolist()) == expected


def test_another_image_changes_the_logits(base: XComposer2, examples: list[Example], tmp_path: Path) -> None:
    other = families.inverted(examples[0], tmp_path)
    before, after = (base.score(base.collator([example])).logprobs for example in (examples[0], other))
    assert (before - after).abs().max() > 1e-2


def test_greedy_responses_are_those_of_plain_forward_passes(
    base: XComposer2, plain: Any, examples: list[Example]
) -> None:
    families.check_answers(base, examples, lambda example, steps: plain_greedy(base, plain, example.question, steps))


def test_an_image_is_encoded_once(base: XComposer2, examples: list[Example]) -> None:
    families.check_images_once(base, examples)


def test_a_sampled_response_depends_on_its_record_alone(base: XComposer2, examples: list[Example]) -> None:
    families.check_draws(base, examples)


def test_score_equals_one_plain_forward_a_completion(
    policy: XComposer2, plain: Any, folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    """The policy equals the remote model with the saved adapter, loaded by PEFT."""
    policy.save_adapter(tmp_path)
    adapted = PeftModel.from_pretrained(plain_model(folder), str(tmp_path)).eval().get_base_model()

    def alone(adapter: Adapter, example: Example, answer: str) -> Tensor:
        return plain_logprobs(policy, adapted if adapter == "policy" else plain, example, answer)

    families.check_scores(policy, examples, alone, rtol=1e-6)


def test_lora_is_on_every_linear_layer_of_the_language_model_and_on_no_other(
    policy: XComposer2, tmp_path: Path
) -> None:
    """The image part of a layer also has lora in its names, but belongs to the base model."""
    adapted = {name for name, module in policy.base.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * 5
    linear = {
        name.removesuffix(".base_layer")
        for name, module in policy.base.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.") and "lora_" not in name
    }
    assert adapted == linear
    policy.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(adapted)
    assert not any("Plora" in name for name in saved)


def test_a_few_steps_lower_the_loss_and_move_the_adapter_alone(policy: XComposer2, examples: list[Example]) -> None:
    families.check_learning(policy, examples)


def test_the_reference_is_one_model(policy: XComposer2, examples: list[Example]) -> None:
    """The image part of a layer has dropout."""
    families.check_reference(policy, examples)


def test_gradients_are_those_of_the_adapter_that_answered(
    policy: XComposer2, folder: Path, examples: list[Example]
) -> None:
    """With and without checkpointing, and for an adapter that is no longer active in the backward pass."""
    checkpointed = families.with_effect(new(folder, gradient_checkpointing=True), "value")
    families.check_gradients(policy, checkpointed, examples, "attention")


def test_training_works_after_inference_mode(policy: XComposer2, examples: list[Example]) -> None:
    families.check_training_after_inference(policy, examples)


def test_a_saved_adapter_scores_the_same(
    policy: XComposer2, base: XComposer2, folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    families.check_reload(policy, base, lambda saved: loaded(folder, adapter=saved), examples, tmp_path)


@pytest.mark.gpu
def test_a_gpu_returns_the_same(folder: Path, examples: list[Example]) -> None:
    families.check_gpu(lambda **settings: new(folder, **settings), examples)


def test_a_model_in_half_precision_responds(folder: Path, examples: list[Example]) -> None:
    families.check_half_precision(loaded(folder, dtype="bfloat16"), examples)


def test_the_shipped_file_is_rejected_until_it_is_pinned() -> None:
    with pytest.raises(ValueError, match=r"vlm.revision: .* pin it"):
        families.shipped("internlm-xcomposer2-vl-7b")
    vlm = families.shipped("internlm-xcomposer2-vl-7b", f"--vlm.revision={'a' * 40}")
    assert vlm.name == "internlm/internlm-xcomposer2-vl-7b"


def test_the_shipped_model_responds(folder: Path, examples: list[Example]) -> None:
    """A tiny model replaces the real one."""
    vlm = families.shipped("internlm-xcomposer2-vl-7b", f"--vlm.model={folder}", "--vlm.lora.r=2")
    assert (vlm.lora.r, vlm.lora.target_modules) == (2, LANGUAGE_LAYERS)
    families.check_shipped(vlm, examples)


@pytest.mark.slow
def test_the_command_line_trains_and_measures_it(folder: Path, tmp_path: Path, tiny_sets: Path) -> None:
    """As in docs/models.md."""
    vlm = ["--model.vlm=configs/vlm/internlm-xcomposer2-vl-7b.yaml", f"--model.vlm.model={folder}"]
    families.check_command_line(vlm, tmp_path, tiny_sets)


@pytest.mark.slow
@NO_CODE
def test_the_published_code_unchanged(examples: list[Example], tmp_path: Path) -> None:
    """At the widths and the image size that are written into it, with one layer where the published model has 32."""
    wide = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    layer = {"hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8}
    folder = tmp_path / "wide"
    folder.mkdir()
    with patch.dict(xcomposer.CLIP, wide):
        write_unchanged(folder, **layer, img_size=490, max_length=4096, max_position_embeddings=4096)
        fill(folder)
        vlm = families.with_effect(new(folder))
        plain = plain_model(folder)
        assert vlm.collator.image_tokens == 1225
        batch = vlm.collator([replace(example, completions=example.completions[:1]) for example in examples[:2]])
        scores = vlm.score(batch, adapter="reference").logprobs
        for row, example in zip(scores, examples, strict=False):
            with torch.no_grad():
                expected = plain_logprobs(vlm, plain, example, example.completions[0])
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-5)
        greedy = Sampling(temperature=0, max_new_tokens=3)
        answers = vlm.generate(batch, greedy, seed=0, adapter="reference")
        assert [answer.token_ids for answer in answers] == [
            plain_greedy(vlm, plain, example.question, 3) for example in examples[:2]
        ]
