"""The weights of a language model by kind, and what LoRA adapts by default, on models of many structures."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import more_families
import pytest
import torch
import transformers as hf
from families import TEXT, VISION
from safetensors import safe_open

from safervlm.errors import ArgumentError
from safervlm.records import Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.layers import language_blocks, language_weights
from safervlm.vlm.lora import LoRA, adapted_layers, require_coverage

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
SIZES: dict[str, Any] = {**TEXT, "vocab_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
HYBRID = ["linear_attention", "full_attention"]
ALTERNATING = ["sliding_attention", "full_attention"]


def internvl(text: Any) -> Any:
    """An InternVL on a language model."""
    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    return hf.InternVLConfig(vision_config=vision, text_config=text)


def chameleon() -> Any:
    vocabulary = {f"IMGIMG{letter}Z": number for number, letter in enumerate("ABCDEFGHIJKLMNOP")} | {"<image>": 20}
    vq = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 32, "base_channels": 32}
    vq |= {"channel_multiplier": [1, 1], "num_res_blocks": 1}
    return hf.ChameleonConfig(**SIZES, vocabulary_map=vocabulary, vq_config=vq)


def fuyu() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return hf.FuyuConfig(text_config={"model_type": "persimmon", **sizes}, image_size=30, patch_size=15)


def deepseek_v3() -> Any:
    return hf.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


def gemma4() -> Any:
    text = {
        **SIZES,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 16,
        "layer_types": ALTERNATING,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
        "position_embedding_size": 64,
    }
    return hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)


def qwen3_5_moe() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
    # As many linear-attention heads as there are experts.
    mixture = {**more_families.LINEAR, **more_families.EXPERTS, "shared_expert_intermediate_size": 16}
    text = {**SIZES, **mixture, "head_dim": 8}
    return hf.Qwen3_5MoeConfig(text_config=text, vision_config={"depth": 2, "num_heads": 2, **sizes})


def omni() -> Any:
    """A Qwen3-Omni: its audio tower has layers of the same names."""
    text = {**SIZES, **more_families.EXPERTS, "head_dim": 8, "rope_parameters": more_families.MROPE}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 32}
    return hf.Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=vision, audio_config=audio)


# Name -> configuration, names of the adapted layers, kinds of the missed weights, and stacks of experts in a block.
STRUCTURES: dict[str, tuple[Callable[[], Any], set[str], set[str], set[str]]] = {
    "blocks in model.layers": (chameleon, ATTENTION | MLP, set(), set()),
    "one matrix for queries, keys and values": (
        fuyu,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        set(),
        set(),
    ),
    "w1, w2, w3 and convolutions": (
        lambda: internvl(hf.Lfm2Config(**SIZES, block_multiple_of=8, layer_types=["conv", "full_attention"])),
        {"w1", "w2", "w3", "in_proj", "out_proj", "q_proj", "k_proj", "v_proj"},
        set(),
        set(),
    ),
    "latent attention and experts": (
        lambda: internvl(deepseek_v3()),
        LATENT | MLP,
        {"experts", "router"},
        {"gate_up_proj", "down_proj"},
    ),
    "experts with biases": (
        lambda: internvl(
            hf.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, layer_types=ALTERNATING, rope_parameters=ROPE)
        ),
        ATTENTION,
        {"experts", "router"},
        {"gate_up_proj", "down_proj"},
    ),
    "linear attention, experts and a gate": (
        qwen3_5_moe,
        ATTENTION | MLP | {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"},
        {"experts", "router", "gates"},
        {"gate_up_proj", "down_proj"},
    ),
    "gates and experts in the block itself": (
        gemma4,
        ATTENTION | MLP | {"per_layer_input_gate", "per_layer_projection"},
        {"experts", "router"},
        {"gate_up_proj", "down_proj"},
    ),
    "an audio tower": (omni, ATTENTION, {"experts", "router"}, {"gate_up_proj", "down_proj"}),
}


def built(make: Callable[[], Any]) -> Any:
    config = make()
    with torch.device("meta"):
        if config.model_type == "qwen3_omni_moe_thinker":
            return hf.Qwen3OmniMoeThinkerForConditionalGeneration(config)
        return hf.AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_default_is_every_linear_layer_but_routers_single_gates_and_experts(structure: str) -> None:
    make, leaves, missed, stacks = STRUCTURES[structure]
    model = built(make)
    blocks = language_blocks(model)
    assert len(blocks) == 2
    layers = adapted_layers(model, LoRA())
    assert {name.rpartition(".")[2] for name in layers.modules} == leaves
    assert all(any(name.startswith(f"{block}.") for block in blocks) for name in layers.modules)
    described = layers.describe()
    assert {kind for kind, each in described["kinds"].items() if each["missed"]} == missed
    assert layers.share == pytest.approx(1 - described["missed"])
    if not stacks:
        assert layers.share == 1
        return
    every = adapted_layers(model, LoRA(dropout=0.0, experts=True))
    assert every.modules == layers.modules
    assert {name.rpartition(".")[2] for name in every.parameters} == stacks
    assert {kind for kind, each in every.describe()["kinds"].items() if each["missed"]} == missed - {"experts"}


def test_each_weight_matrix_is_counted_once() -> None:
    model = built(STRUCTURES["experts with biases"][0])
    blocks = language_blocks(model).values()
    matrices = [value for block in blocks for name, value in block.named_parameters() if not name.endswith("bias")]
    assert sum(weight.size for weight in language_weights(model)) == sum(v.numel() for v in matrices if v.ndim > 1)


def test_coverage_line_states_adapted_and_missed_shares_by_kind() -> None:
    layers = adapted_layers(built(STRUCTURES["latent attention and experts"][0]), LoRA())
    number = r"\d+\.\d"
    assert re.fullmatch(
        rf"LoRA adapts {number} % of the language model's weights \(attention {number}, MLP {number}\) and misses "
        rf"{number} % \(experts {number}, router {number}\)",
        str(layers),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_coverage": 0.99},
            r"lora\.min_coverage: LoRA adapts .* less than 99 %; adapt the experts \(--config confi",
        ),
        ({"target_modules": r".*q_proj"}, r"lora\.min_coverage: .*less than 50 %; adapt the experts"),
        (
            {"target_modules": r".*q_proj", "experts": True, "dropout": 0.0, "min_coverage": 0.99},
            r"let lora\.target_modules match more layers, or lower lora\.min_coverage",
        ),
    ],
)
def test_a_small_share_is_rejected_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    model, lora = built(STRUCTURES["an audio tower"][0]), LoRA(**settings)
    with pytest.raises(ArgumentError, match=message):
        require_coverage(adapted_layers(model, lora), lora, "a model")
    require_coverage(adapted_layers(model, lora), replace(lora, min_coverage=0.0), "a model")


def test_lora_settings_that_match_no_layer_are_rejected() -> None:
    model = built(chameleon)
    with pytest.raises(ArgumentError, match=r"^lora\.experts: .* has no experts; leave it out"):
        adapted_layers(model, LoRA(experts=True, dropout=0.0))
    with pytest.raises(
        ArgumentError, match=r"^lora\.target_modules: 'nothing' matches no module of .*; give a regular"
    ):
        adapted_layers(model, LoRA(target_modules="nothing"))
    with pytest.raises(ArgumentError, match=r"^lora\.dropout: experts are adapted without dropout, got 0.05; give 0"):
        LoRA(experts=True)


EXPERTS = LoRA(r=4, alpha=8, dropout=0.0, experts=True)


@pytest.fixture(scope="module", params=[more_families.qwen3_vl_moe, more_families.glm4v_moe, more_families.qwen3_5_moe])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return folder


def test_adapters_on_experts_learn_and_reload(
    mixture: Path, make_questions: Callable[[int], list[Question]], tmp_path: Path
) -> None:
    """Also where PEFT would rewrite the names: each layer has the rank that was configured."""
    examples = families.ask(make_questions(5))
    base = Transformers(str(mixture), dtype="float32")
    base.load()

    def load(folder: str) -> Transformers:
        vlm = Transformers(str(mixture), dtype="float32", adapter=folder)
        vlm.load()
        return vlm

    for lora in (EXPERTS, replace(EXPERTS, experts=False, min_coverage=0.0)):
        policy = families.with_effect(Transformers(str(mixture), dtype="float32", lora=lora))
        families.check_learning(policy, examples)
        folder = tmp_path / str(lora.experts)
        families.check_reload(policy, base, load, examples, folder)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
        of_linear = {shape[0] for name, shape in shapes.items() if "lora_A" in name and "experts" not in name}
        of_stacks = {shape[0] for name, shape in shapes.items() if "lora_A" in name and ".experts." in name}
        assert of_linear == {4}
        assert of_stacks == ({4 * 4} if lora.experts else set())


def test_two_adapters_on_experts_have_gradients_of_their_own(
    mixture: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    """As PPO uses them: one joint backward pass, with and without recomputation."""
    examples = families.ask(make_questions(2))

    def gradients(**settings: Any) -> dict[str, torch.Tensor]:
        vlm = families.with_effect(Transformers(str(mixture), dtype="float32", lora=EXPERTS, **settings), "value")
        batch = vlm.collator(examples)
        policy, value = (vlm.score(batch, adapter=adapter).logprobs.sum() for adapter in ("policy", "value"))
        vlm.score(batch, adapter="reference")
        (policy + 2 * value).backward()
        found = {name: weight.grad for name, weight in vlm.named_parameters() if weight.requires_grad}
        vlm.zero_grad()
        vlm.score(batch, adapter="value").logprobs.sum().backward()
        families.check_same(
            found, {name: 2 * weight.grad for name, weight in vlm.named_parameters() if ".value." in name}
        )
        return found

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    families.check_same(checkpointed, plain)
