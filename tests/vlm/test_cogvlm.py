"""The CogVLM family: model code that is distributed with the weights, run with current transformers.

Every test runs on a small model whose code is written here. If SAFERVLM_COGVLM_CODE names a folder with the published
code (configuration_cogvlm.py and the files beside it), it also runs on a tiny model of that code.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import families
import numpy as np
import pytest
import shipped_families
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from safervlm.errors import RecordError
from safervlm.records import Example, Question
from safervlm.vlm.lora import Adapter, LoRA, active
from safervlm.vlm.remote.base import rotate
from safervlm.vlm.remote.cogvlm import LANGUAGE_EXPERTS, CogVLM, Kernels
from safervlm.vlm.sampling import Sampling

PUBLISHED = os.environ.get("SAFERVLM_COGVLM_CODE")
LORA = LoRA(r=4, alpha=8, dropout=0.0, target_modules=LANGUAGE_EXPERTS)
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"image_size": 28, "patch_size": 7, "hidden_size": 32}

CONFIGURATION = """
from transformers import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    pass
"""

# Needs the same packages, uses the same cache tuples, and has a buffer to compute: on purpose this code does not run
# without the adaptations of safervlm.vlm.remote.cogvlm.
MODELING = '''
import torch
import triton
import xformers.ops as xops
from torch import nn
from torchvision import transforms
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tiny import TinyConfig


@triton.jit
def kernel(states):
    raise RuntimeError("needs a GPU")


def apply_rotary_emb_func(states, cos, sin):
    return kernel[1](states)


def positions_of(types, mask):
    """An image's inner places stand where its second one does; padding doesn't count."""
    before = nn.functional.pad(types, (1, 0))[:, :-1]
    behind = nn.functional.pad(types, (0, 1))[:, 1:]
    counts = (types == 0) | (before == 0) | (behind == 0)
    if mask is not None:
        counts = counts & (mask > 0)
    counts[:, 0] = False
    return counts.long().cumsum(-1)


class FastRotaryEmbedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width
        self.register_buffer("inv_freq", self._compute_inv_freq())

    def _compute_inv_freq(self, device=None):
        return 50.0 ** -(torch.arange(0, self.width, 2, device=device) / self.width)

    def forward(self, states, positions):
        angles = positions[..., None] * self.inv_freq
        return apply_rotary_emb_func(states, angles.cos(), angles.sin())


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.rotary = FastRotaryEmbedding(width // self.heads)
        self.language_expert_query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.vision_expert_query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)
        self.vision_expert_dense = nn.Linear(width, width, bias=False)

    def forward(self, states, seen, positions, mask, past):
        packed = torch.where(
            seen, self.vision_expert_query_key_value(states), self.language_expert_query_key_value(states)
        )
        query, key, value = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.rotary(query, positions), self.rotary(key, positions)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = out.transpose(1, 2).flatten(2)
        return torch.where(seen, self.vision_expert_dense(out), self.language_expert_dense(out)), (key, value)


class Gated(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, states):
        return self.down_proj(self.gate_proj(states).sigmoid() * self.up_proj(states))


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.language_mlp, self.vision_mlp = Gated(config), Gated(config)

    def forward(self, states, seen):
        return torch.where(seen, self.vision_mlp(states), self.language_mlp(states))


class TinyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Experts(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(2))

    def forward(self, states, seen, positions, mask, past=None):
        change, cache = self.self_attn(self.norms[0](states), seen, positions, mask, past)
        states = states + change
        return states + self.mlp(self.norms[1](states), seen), cache


class Eye(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision = config.vision_config
        self.patches = nn.Conv2d(3, vision["hidden_size"], vision["patch_size"], vision["patch_size"])
        self.out = nn.Linear(vision["hidden_size"], config.hidden_size)
        self.ends = nn.Parameter(torch.zeros(2, config.hidden_size))

    def forward(self, images):
        seen = self.patches(images).flatten(2).transpose(1, 2)
        heads = seen.unflatten(-1, (2, -1))
        seen = seen + xops.memory_efficient_attention(heads, heads, heads, scale=0.25).view(*seen.shape)
        first, last = (end.expand(len(seen), 1, -1) for end in self.ends)
        return torch.cat([first, self.out(seen), last], 1)


class Body(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TinyLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.vision = Eye(config)
        self.post_init()


class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Body(config)
        words, width = config.vocab_size, config.hidden_size
        self.lm_head = nn.Linear(width, words, bias=False)
        self.post_init()

    def get_decoder(self):
        return self.model

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, images=None, token_type_ids=None, attention_mask=None, position_ids=None,
                past_key_values=None, use_cache=None, return_dict=None):
        states = self.model.embed_tokens(input_ids)
        if past_key_values is None:
            if position_ids is None:
                position_ids = positions_of(token_type_ids, attention_mask)
            seen = self.model.vision(torch.stack([image for some in images for image in some]))
            states = states.index_put([token_type_ids == 1], seen.flatten(0, 1).to(states.dtype))
        length, past = states.shape[1], 0 if past_key_values is None else past_key_values[0][0].shape[2]
        mask = torch.ones(length, past + length, dtype=torch.bool, device=states.device).tril(past)[None, None]
        if attention_mask is not None:
            # A padded place looks at itself: a row without any place would be nan.
            own = torch.eye(past + length, dtype=torch.bool, device=states.device)[past:]
            mask = mask & (attention_mask[:, None, None, :].bool() | own)
        caches = []
        for number, layer in enumerate(self.model.layers):
            before = None if past_key_values is None else past_key_values[number]
            states, cache = layer(states, token_type_ids[..., None] == 1, position_ids, mask, past=before)
            caches.append(cache)
        logits = self.lm_head(self.model.norm(states))
        return CausalLMOutputWithPast(logits=logits, past_key_values=tuple(caches) if use_cache else None)

    def prepare_inputs_for_generation(self, input_ids, token_type_ids, images=None, past_key_values=None,
                                      attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        if position_ids is None:
            position_ids = positions_of(token_type_ids, attention_mask)
        if past_key_values:
            input_ids, token_type_ids, position_ids = (x[:, -1:] for x in (input_ids, token_type_ids, position_ids))
        return dict(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, images=images,
                    past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False):
        model_kwargs["past_key_values"] = self._extract_past_from_model_output(outputs)
        return model_kwargs

    def build_conversation_input_ids(self, tokenizer, *, query, history=None, images=None, template_version=None):
        size = self.config.vision_config
        count = (size["image_size"] // size["patch_size"]) ** 2 + 2
        ask = transforms.Compose([])(images[0]) and {"chat": "Answer:", "vqa": "Short answer:"}[template_version]
        text = tokenizer.encode(f"Question: {query} {ask}", add_special_tokens=False)
        ids = [tokenizer.bos_token_id] + [tokenizer.pad_token_id] * count + text
        types = [0] + [1] * count + [0] * len(text)
        return {"input_ids": torch.tensor(ids), "token_type_ids": torch.tensor(types)}
'''


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with families.remote_modules(tmp_path_factory.mktemp("modules")):
        yield


def write_own(folder: Path) -> None:
    words = families.tokenizer()
    words.save_pretrained(folder)
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    names = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    config = {**SIZES, "auto_map": names, "vocab_size": len(words) + 3, "vision_config": VISION}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))


def write_published(folder: Path) -> None:
    assert PUBLISHED is not None
    for file in Path(PUBLISHED).glob("*.py"):
        shutil.copy(file, folder)
    words = families.tokenizer()
    words.add_tokens([f"<{number}>" for number in range(len(words), 128010)])  # CogVLM2 expects the token 128002
    words.save_pretrained(folder)
    names = {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    }
    vision = {
        **VISION,
        "in_channels": 3,
        "num_positions": 17,
        "num_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "dropout_prob": 0.1,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    config = {**SIZES, "auto_map": names, "vocab_size": 128256, "num_multi_query_heads": 2, "vision_config": vision}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    (folder / "config.json").write_text(json.dumps({**config, **ends, "max_position_embeddings": 512}))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(write_own, id="own"),
        pytest.param(
            write_published,
            id="published",
            marks=[
                pytest.mark.skipif(PUBLISHED is None, reason="SAFERVLM_COGVLM_CODE names no folder with CogVLM's code"),
                pytest.mark.slow,
            ],
        ),
    ],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model: code, configuration, tokenizer, weights except for computed buffers."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    vlm = new(folder)
    torch.manual_seed(0)
    model = vlm.remote_class("AutoModelForCausalLM")(vlm.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
            if "vision" in name or not parameter.any():
                parameter.normal_(0, 0.5)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith("inv_freq")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def new(folder: Path, **settings: Any) -> CogVLM:
    return CogVLM(
        str(folder),
        **{"trust_remote_code": True, "tokenizer": str(folder), "dtype": "float32", "lora": LORA, **settings},
    )


def loaded(folder: Path, **settings: Any) -> CogVLM:
    vlm = new(folder, **settings)
    vlm.load()
    return vlm


@pytest.fixture(scope="module")
def base(folder: Path) -> CogVLM:
    return loaded(folder)


@pytest.fixture
def policy(folder: Path) -> CogVLM:
    """The same with an effective adapter."""
    return families.with_effect(new(folder), "value")


@pytest.fixture
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    """Five questions of three lengths about three images, each with two responses."""
    return families.ask(make_questions(5))


def plain_inputs(vlm: CogVLM, question: Question, answer: str | None = None) -> dict[str, Any]:
    """The inputs according to the model's paper and code: beginning, image, question, response, end."""
    assert question.image_path is not None
    image = Image.open(question.image_path).convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)
    scaled = np.asarray(image, np.float64) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    channels = [torch.tensor((scaled[..., c] - mean[c]) / deviation[c], dtype=torch.float32) for c in range(3)]
    words = vlm.tokenizer
    places = vlm.collator.image_tokens
    text = words.encode(f"Question: {question.prompt} Answer:", add_special_tokens=False)
    if answer is not None:
        text += [*words.encode(answer, add_special_tokens=False), words.eos_token_id]
    return {
        "input_ids": torch.tensor([[words.bos_token_id, *[words.pad_token_id] * places, *text]]),
        "token_type_ids": torch.tensor([[0, *[1] * places, *[0] * len(text)]]),
        "images": [[torch.stack(channels)]],
    }


def plain_greedy(vlm: CogVLM, question: Question, steps: int) -> list[int]:
    """One forward pass of the whole sequence per token: no cache, no padding, no mask, no generate."""
    inputs = plain_inputs(vlm, question)
    written: list[int] = []
    while len(written) < steps and (not written or written[-1] not in vlm.eos_token_ids):
        with torch.no_grad():
            logits = vlm.base(**inputs, use_cache=False).logits[0, -1]
        logits[vlm.suppressed] = -torch.inf
        written.append(int(logits.argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([written[-1:]])], 1)
        inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.tensor([[0]])], 1)
    return written


@pytest.mark.parametrize("name", ["THUDM/cogvlm-chat-hf", "."])
def test_remote_code_must_be_enabled(name: str) -> None:
    with pytest.raises(ValueError, match=r"^vlm.trust_remote_code: .* set it to true, or measure another model$"):
        CogVLM(name, revision="a" * 40)


@pytest.mark.parametrize("revision", [None, "main", "a" * 39, "a" * 41, "g" * 40])
def test_code_from_the_hub_is_pinned(revision: str | None) -> None:
    with pytest.raises(ValueError, match=r"^vlm.revision: .* pin it: give the full 40 digits of a commit.*$"):
        CogVLM(revision=revision, trust_remote_code=True)
    CogVLM(revision="0123456789abcdef" * 2 + "01234567", trust_remote_code=True)


def test_stub_packages_exist_only_while_the_remote_code_is_imported(tmp_path: Path) -> None:
    """Other parts of the program check whether these packages are installed."""
    write_own(tmp_path)
    names = ("xformers", "xformers.ops", "triton", "triton.language", "torchvision")
    real = ModuleType("triton")
    with patch.dict(sys.modules, {"triton": real}):
        before = {name: sys.modules.get(name) for name in names}
        new(tmp_path).remote_class("AutoModelForCausalLM")
        assert {name: sys.modules.get(name) for name in names} == before
        assert sys.modules["triton"] is real


@pytest.mark.parametrize("reference", ["someone/else--modeling_tiny.TinyForCausalLM", None])
def test_code_in_another_repository_is_rejected(tmp_path: Path, reference: str | None) -> None:
    """Code of another repository would be run at an unpinned commit."""
    write_own(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": reference} if reference else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^vlm.model: the code of .* must be in its own repository"):
        _ = new(tmp_path).config


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    write_own(tmp_path)
    file = tmp_path / "modeling_tiny.py"
    file.write_text("import no_such_package\n" + file.read_text())
    with pytest.raises(ValueError, match=r"^vlm.model: the code of .* can't be imported .*no_such_package"):
        new(tmp_path).remote_class("AutoModelForCausalLM")


def test_another_prompt_layout_is_rejected(tmp_path: Path) -> None:
    write_own(tmp_path)
    file = tmp_path / "modeling_tiny.py"
    file.write_text(file.read_text().replace("Question: {query}", "Q: {query}"))
    with pytest.raises(ValueError, match=r"^vlm.model: .* formats questions differently from CogVLM"):
        _ = new(tmp_path).collator


def test_missing_weights_are_rejected(tmp_path: Path) -> None:
    """The library would initialise them randomly."""
    write_own(tmp_path)
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^vlm.model: .* lacks \d+ weights, for example lm_head.weight"):
        new(tmp_path).load()


def test_replacement_kernels_equal_reference_formulas() -> None:
    torch.manual_seed(0)
    states, angles = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 4)
    turned = torch.complex(*states.chunk(2, -1)) * torch.polar(torch.ones(2, 1, 5, 4), angles[:, None])
    torch.testing.assert_close(rotate(states, angles.cos(), angles.sin()), torch.cat([turned.real, turned.imag], -1))
    query, key, value = torch.randn(3, 2, 5, 3, 8)
    weights = torch.einsum("blhd,bmhd->bhlm", query, key).mul(0.3).softmax(-1)
    expected = torch.einsum("bhlm,bmhd->blhd", weights, value)
    torch.testing.assert_close(Kernels.memory_efficient_attention(query, key, value, scale=0.3), expected)


def test_only_computed_buffers_differ_from_the_file(base: CogVLM, folder: Path) -> None:
    """The library leaves the frequencies uninitialised, without a warning."""
    buffers = {name: tensor for name, tensor in base.base.named_buffers() if name.endswith("inv_freq")}
    assert len(buffers) == 2
    for name, tensor in buffers.items():
        rotary: Any = base.base.get_submodule(name.removesuffix(".inv_freq"))
        slowest = getattr(rotary, "base", 50.0) ** -(6 / 8)
        torch.testing.assert_close(tensor[[0, -1]], torch.tensor([1.0, slowest]))
    fresh = base.remote_class("AutoModelForCausalLM")(base.config).state_dict()
    assert not torch.equal(fresh["lm_head.weight"], base.base.state_dict()["lm_head.weight"])


def test_collated_prompt_equals_the_models_own_prompt(base: CogVLM, examples: list[Example]) -> None:
    collator = pickle.loads(pickle.dumps(base.collator))
    batch = collator(examples)
    for encoding, completions, example in zip(batch.encodings, batch.completions, examples, strict=True):
        expected = plain_inputs(base, example.question)
        assert torch.equal(encoding["input_ids"], expected["input_ids"])
        assert torch.equal(encoding["token_type_ids"], expected["token_type_ids"])
        torch.testing.assert_close(encoding["images"][0, 0], expected["images"][0][0], atol=1e-5, rtol=0)
        whole = plain_inputs(base, example.question, families.COMPLETIONS[0])["input_ids"][0].tolist()
        assert whole == [*encoding["input_ids"][0].tolist(), *completions[0]]
    question = replace(examples[0].question, prompt="Is </s> safe?")
    with pytest.raises(RecordError, match=f"^{question.id}: .* special token '</s>'"):
        collator([Example(question)])


def test_vqa_template_is_the_published_one(folder: Path, examples: list[Example]) -> None:
    vlm = new(folder, template="vqa")
    ids = vlm.collator(examples[:1]).encodings[0]["input_ids"][0].tolist()
    behind = ids[1 + vlm.collator.image_tokens :]
    assert vlm.tokenizer.decode(behind) == f"Question: {examples[0].question.prompt} Short answer:"


def test_another_image_changes_the_response(base: CogVLM, examples: list[Example], tmp_path: Path) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=8)
    pair = (examples[0], families.inverted(examples[0], tmp_path))
    before, after = (base.generate(base.collator([example]), greedy, seed=0)[0] for example in pair)
    assert before.token_ids != after.token_ids


def test_greedy_responses_equal_plain_forward_passes(base: CogVLM, examples: list[Example]) -> None:
    families.check_answers(base, examples, lambda example, steps: plain_greedy(base, example.question, steps))


def test_padded_row_has_the_positions_of_the_row_alone(base: CogVLM, examples: list[Example]) -> None:
    """Low precision rounds positions: counting from 1 after padding would change the input."""
    seen: list[Tensor] = []
    forward = type(base.base).forward

    @wraps(forward)
    def keep(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["position_ids"])
        return forward(model, *args, **kwargs)

    greedy = Sampling(temperature=0, max_new_tokens=2)
    with patch.object(type(base.base), "forward", keep):
        base.generate(base.collator(examples[:2]), greedy, seed=0)
        together, seen = seen, []
        base.generate(base.collator(examples[:1]), greedy, seed=0)
    length = seen[0].shape[1]
    assert together[0].shape[1] > length
    assert torch.equal(together[0][0, -length:], seen[0][0])
    assert [int(together[1][0, 0]), int(seen[0][0, 0])] == [int(seen[1][0, 0]), 0]


def test_an_image_is_encoded_once(base: CogVLM, examples: list[Example]) -> None:
    families.check_images_once(base, examples)


def test_sampled_responses_depend_only_on_their_record(base: CogVLM, examples: list[Example]) -> None:
    families.check_draws(base, examples)


def test_scores_equal_one_plain_forward_pass_per_completion(
    policy: CogVLM, base: CogVLM, examples: list[Example]
) -> None:
    def alone(adapter: Adapter, example: Example, answer: str) -> Tensor:
        start = plain_inputs(policy, example.question)["input_ids"].shape[1]
        inputs = plain_inputs(policy, example.question, answer)
        with active(policy.base, adapter):
            model = policy.base if adapter == "policy" else base.base
            logprobs = model(**inputs, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        return logprobs.gather(-1, inputs["input_ids"][0, start:, None])[:, 0]

    families.check_scores(policy, examples, alone, rtol=1e-6)


def test_lora_is_on_every_linear_layer_of_the_language_expert(policy: CogVLM) -> None:
    adapted = {name for name, module in policy.base.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * 5
    linear = {
        name.removesuffix(".base_layer")
        for name, module in policy.base.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name and "vision" not in name and ".lora_" not in name
    }
    assert adapted == linear


def test_training_lowers_the_loss_and_changes_only_the_adapter(policy: CogVLM, examples: list[Example]) -> None:
    families.check_learning(policy, examples)


def test_reference_scores_are_deterministic_during_training(policy: CogVLM, examples: list[Example]) -> None:
    """The vision tower has dropout."""
    families.check_reference(policy, examples)


def test_gradients_belong_to_the_adapter_that_was_scored(policy: CogVLM, folder: Path, examples: list[Example]) -> None:
    """With and without checkpointing, and for an adapter that is no longer active in the backward pass."""
    checkpointed = families.with_effect(new(folder, gradient_checkpointing=True), "value")
    families.check_gradients(policy, checkpointed, examples, "self_attn")


def test_training_works_after_inference_mode(policy: CogVLM, examples: list[Example]) -> None:
    families.check_training_after_inference(policy, examples)


def test_a_saved_adapter_scores_the_same(
    policy: CogVLM, base: CogVLM, folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    families.check_reload(policy, base, lambda saved: loaded(folder, adapter=saved), examples, tmp_path)


@pytest.mark.gpu
def test_gpu_results_equal_cpu_results(folder: Path, examples: list[Example]) -> None:
    families.check_gpu(lambda **settings: new(folder, **settings), examples)


def test_a_model_in_half_precision_responds(folder: Path, examples: list[Example]) -> None:
    families.check_half_precision(loaded(folder, dtype="bfloat16"), examples)


def test_description_includes_the_fingerprint_of_the_remote_code(base: CogVLM, folder: Path, tmp_path: Path) -> None:
    before = base.describe()
    assert before["template"] == "Question: {question} Answer:"
    shutil.copytree(folder, tmp_path / "other")
    file = next((tmp_path / "other").glob("modeling_*.py"))
    file.write_text(file.read_text() + "\n")
    after = new(tmp_path / "other").describe()
    assert after["weights"] == before["weights"]
    assert after["code"] != before["code"]


def test_shipped_configuration_is_rejected_without_a_pinned_commit() -> None:
    with pytest.raises(ValueError, match=r"vlm.revision: .* pin it"):
        shipped_families.shipped("cogvlm-chat")
    assert shipped_families.shipped("cogvlm-chat", f"--vlm.revision={'a' * 40}").name == "THUDM/cogvlm-chat-hf"


def test_the_shipped_model_responds(folder: Path, examples: list[Example]) -> None:
    """A tiny model replaces the real one."""
    vlm = shipped_families.shipped(
        "cogvlm-chat", f"--vlm.model={folder}", f"--vlm.tokenizer={folder}", "--vlm.lora.r=2"
    )
    assert (vlm.lora.r, vlm.lora.target_modules) == (2, LANGUAGE_EXPERTS)
    shipped_families.check_shipped(vlm, examples)


@pytest.mark.slow
def test_the_command_line_trains_and_measures_it(folder: Path, tmp_path: Path, tiny_sets: Path) -> None:
    """As in docs/models.md; the responses are not classified."""
    vlm = [
        "--model.vlm=configs/vlm/cogvlm-chat.yaml",
        f"--model.vlm.model={folder}",
        f"--model.vlm.tokenizer={folder}",
    ]
    shipped_families.check_command_line(vlm, tmp_path, tiny_sets)
