"""Models that cap or scale the logits behind their head: scored as the library computes them, and trained."""

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers as hf

from safervlm.errors import ArgumentError
from safervlm.records import Example, Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.heads import LogitTransform, candidates, transform_between
from safervlm.vlm.lora import LoRA, active
from safervlm.vlm.sampling import Sampling

LORA = LoRA(r=4, alpha=8, dropout=0.0)


def cohere(config: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits * config.logit_scale


def granite(config: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits / config.logits_scaling


def gemma(config: Any, logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 2.0}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}
# Name -> language model, its settings, what the model computes behind the head, and what is found.
MODELS: dict[str, tuple[Any, dict[str, Any], Any, LogitTransform]] = {
    "multiplied": (hf.CohereConfig, {"logit_scale": 0.75}, cohere, LogitTransform(factor=0.75)),
    "divided": (hf.GraniteConfig, {"logits_scaling": 1.5}, granite, LogitTransform(divisor=1.5)),
    "capped": (hf.Gemma2Config, GEMMA, gemma, LogitTransform(cap=2.0)),
    "named but not applied": (hf.GraniteConfig, {"logits_scaling": 4.0}, lambda _, logits: logits, LogitTransform()),
}


@pytest.fixture
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    return families.ask(make_questions(3))


def changed(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    forward = hf.InternVLForConditionalGeneration.forward

    @wraps(forward)  # the library reads its arguments
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = change(self.config.text_config, output.logits)
        return output

    monkeypatch.setattr(hf.InternVLForConditionalGeneration, "forward", changing)


def check(folder: Path, template: str | None, examples: list[Example], expected: LogitTransform) -> None:
    """Scores under each adapter and of what is sampled equal those of the library's logits, and training learns."""
    new = partial(Transformers, str(folder), dtype="float32", template=template)
    policy = families.with_effect(new(lora=LORA))
    batch = policy.collator(examples)
    drawn = Sampling(temperature=0.7, top_p=1.0)
    scores = {  # as SFT and DPO score, as DPO and PPO score the reference, and as PPO scores what it has sampled
        "policy": policy.score(batch),
        "reference": policy.score(batch, adapter="reference"),
        "sampled": policy.score(batch, sampling=drawn, entropy=True),
    }
    assert policy.logit_transform == expected
    row = 0
    for encoding, answers in zip(batch.encodings, batch.completions, strict=True):
        for answer in answers:
            start = encoding["input_ids"].shape[1]
            grown = policy.written(encoding)
            rest = {name: value.expand(-1, len(answer)) for name, value in grown.items()}
            rest["input_ids"] = torch.tensor([answer])
            inputs = {**encoding, **{name: torch.cat([encoding[name], more], 1) for name, more in rest.items()}}
            for kind, found in scores.items():
                with active(policy.base, "reference" if kind == "reference" else "policy"):
                    logits = policy.base(**inputs).logits[0, start - 1 : -1]
                if kind == "sampled":
                    logits = logits.index_fill(1, policy.suppressed, -torch.inf) / drawn.temperature
                logprobs = logits.log_softmax(-1)
                plain = logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0]
                torch.testing.assert_close(found.logprobs[row, : len(answer)], plain, atol=1e-5, rtol=0)
            entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
            torch.testing.assert_close(scores["sampled"].entropy[row, : len(answer)], entropy, atol=1e-4, rtol=0)
            row += 1
    families.check_learning(policy, examples)


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_models_own_transformed_logits(
    name: str, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, values, change, expected = MODELS[name]
    families.internvl(tmp_path, text, **values)
    changed(monkeypatch, change)
    check(tmp_path, None, examples, expected)


@pytest.mark.parametrize("build", [families.llava, families.qwen2_vl])
def test_lora_on_the_output_head_is_disabled_for_the_reference(
    build: Callable[[Path], None], examples: list[Example], tmp_path: Path
) -> None:
    """Otherwise the reference would be scored with the policy's head."""
    build(tmp_path)
    lora = LoRA(r=4, alpha=8, dropout=0.5, target_modules=r".*(language_model.*q_proj|lm_head)", min_coverage=0)
    base, policy = (Transformers(str(tmp_path), dtype="float32", lora=lora) for _ in range(2))
    base.load()
    families.with_effect(policy)
    batch = policy.collator(examples)
    expected = base.score(base.collator(examples)).logprobs
    policy.train()  # dropout makes two passes through the head different
    torch.testing.assert_close(policy.score(batch, "reference").logprobs, expected, atol=1e-5, rtol=0)
    policy.logit_transform = None
    assert (policy.score(batch).logprobs - expected).abs().max() > 1e-2
    assert policy.logit_transform == LogitTransform()


def test_paligemma_2_is_scored_and_trained(examples: list[Example], tmp_path: Path) -> None:
    families.paligemma2(tmp_path)
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    words = torch.tensor([[5, 6, 7]])
    bare = model.lm_head(model.model.language_model(input_ids=words).last_hidden_state)
    omitted = torch.allclose(model(input_ids=words).logits, bare, atol=1e-4)  # by transformers 5.20
    expected = LogitTransform(cap=None if omitted else 30.0)
    check(tmp_path, "<image>{question}", examples, expected)


SMALL: dict[str, Any] = {**families.TEXT, "vocab_size": 64, "head_dim": 8, "sliding_window": 16}
SMALL |= {"layer_types": GEMMA["layer_types"], "vocab_size_per_layer_input": 64, "final_logit_softcapping": 2.0}


def gemma3n() -> Any:
    """Its language model alone: its encoder of images needs timm."""
    sparse = {"activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8, "num_kv_shared_layers": 0}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**SMALL, **sparse, hidden_size_per_layer_input=8))


def gemma4() -> Any:
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
        "position_embedding_size": 64,
    }
    text = {**SMALL, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
    return hf.Gemma4ForConditionalGeneration(hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None))


@pytest.mark.parametrize("build", [gemma3n, gemma4])
def test_the_cap_of_gemmas_own_classes_is_found_in_their_text_configuration(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
        words = torch.tensor([[5, 6, 7]])
        bare = model.lm_head(model.model(input_ids=words).last_hidden_state)
        logits = model(input_ids=words).logits
    assert bare.abs().max() > 2 >= logits.abs().max()
    assert transform_between(model.config, bare, logits) == LogitTransform(cap=2.0)


def test_logit_transformation_missing_in_the_configuration_is_rejected(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.internvl(tmp_path, hf.Qwen2Config)
    changed(monkeypatch, lambda _, logits: logits * 3)
    vlm = Transformers(str(tmp_path), dtype="float32")
    vlm.load()
    with pytest.raises(ArgumentError, match=r"^vlm\.model: .* does not name, .* it can be measured, not trained"):
        vlm.score(vlm.collator(examples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [LogitTransform(0.0625, cap=30.0), LogitTransform(divisor=16.0), LogitTransform()])
def test_logit_transformation_is_detected_in_float32_and_bfloat16(wanted: LogitTransform, dtype: torch.dtype) -> None:
    config = hf.CohereConfig(vocab_size=8, hidden_size=8)
    config.logit_scale, config.logits_scaling = 0.0625, 16.0
    config.final_logit_softcapping = wanted.cap or 30.0
    bare = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).mul(300).to(dtype)
    found = transform_between(config, bare, wanted(bare))
    assert found is not None
    torch.testing.assert_close(found(bare), wanted(bare), atol=0, rtol=0)
    assert transform_between(config, bare, bare + 50) is None
    assert list(candidates(hf.Qwen2Config())) == [LogitTransform()]


@pytest.mark.parametrize(
    ("dtype", "unnamed"),
    [(torch.bfloat16, 1.01), (torch.bfloat16, 0.99), (torch.float16, 1.003), (torch.float32, 1.0005)],
)
@pytest.mark.parametrize("size", [300, 0.005])  # the smallest logits differ by less than any absolute tolerance
def test_logit_scale_smaller_than_rounding_is_detected(dtype: torch.dtype, unnamed: float, size: float) -> None:
    config = hf.CohereConfig(vocab_size=8, hidden_size=8)
    bare = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).mul(size).to(dtype)
    for named in (1.0, 0.75):
        config.logit_scale = named
        assert transform_between(config, bare, bare * named) == LogitTransform(factor=named)
        assert transform_between(config, bare, (bare * named).float().mul(unnamed).to(dtype)) is None
