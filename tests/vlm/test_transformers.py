"""Any model family of transformers: batched results equal those of the library for a single question."""

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import more_families
import pytest
import shipped_families
import torch
import vision_families
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig

from safervlm.errors import RecordError
from safervlm.io.images import ImageSettings
from safervlm.limits import TextLimits
from safervlm.measure import FaultTolerantCollator
from safervlm.records import Example, Question
from safervlm.run import read_manifest
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import Unanswered
from safervlm.vlm.encoding import EncodedBatch
from safervlm.vlm.lora import Adapter, LoRA, active
from safervlm.vlm.sampling import Sampling

QUESTION = "Question: {question} Answer:"
FAMILIES = [
    (families.llava, None),
    (families.llava_next, None),
    (families.llava_onevision, None),
    (families.qwen2_vl, None),
    (families.qwen2_5_vl, None),
    (families.qwen3_vl, None),
    (families.internvl, None),
    (families.idefics3, None),
    (families.smolvlm, None),
    (families.gemma3, None),
    (families.mllama, None),
    (families.paligemma, "<image>{question}"),
    (families.blip2, QUESTION),
    (families.instructblip, "{question}"),
    *((build, None) for build in more_families.BUILDERS),
    *((build, None) for build in vision_families.BUILDERS),
]
# Families with causal attention and a cache that the library's ``generate`` can continue.
SHARING = {
    *("llava", "llava_next", "llava_onevision", "internvl", "idefics2", "idefics3", "smolvlm", "vipllava", "aria"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glm4v_moe", "ovis2"),
    *("deepseek_vl", "deepseek_vl_hybrid", "llava_next_video", "video_llava", "mistral3", "kimi_k25"),
}
# Linear layers of the language model that the default LoRA omits.
ROUTERS = ("router.proj", "shared_expert_gate")
# Families whose batches would change a question (tests/vlm/test_selfcheck.py).
ONE_BY_ONE = {"hunyuan_vl", "minicpmv4_6", "emu3"}
SLOW = {*more_families.BUILDERS, *vision_families.BUILDERS} - more_families.FAST
LORA = LoRA(r=4, alpha=8, dropout=0.0, min_coverage=0.0)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            family,
            id=family[0].__name__,
            marks=[
                *([pytest.mark.slow] if family[0] in SLOW else []),
                *([more_families.NEEDS_5_24] if family[0] in more_families.NEWEST else []),
                *(vision_families.MARKS if family[0] in vision_families.BUILDERS else []),
            ],
        )
        for family in FAMILIES
    ],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str | None]:
    """A folder with a tiny model of a family, and the template around a question."""
    build, template = request.param
    folder = tmp_path_factory.mktemp(build.__name__)
    build(folder)
    return folder, template


def written(build: Callable[[Path], None], folder: Path, template: str | None = None) -> tuple[Path, str | None]:
    """A separate model folder for one test."""
    build(folder)
    return folder, template


def loaded(family: tuple[Path, str | None], **settings: Any) -> Transformers:
    vlm = new(family, **settings)
    vlm.load()
    return vlm


def new(family: tuple[Path, str | None], **settings: Any) -> Transformers:
    folder, template = family
    return Transformers(str(folder), **{"dtype": "float32", "template": template, "lora": LORA, **settings})


@pytest.fixture(scope="module")
def base(family: tuple[Path, str | None]) -> Transformers:
    return loaded(family)


@pytest.fixture(scope="module")
def adapted(family: tuple[Path, str | None]) -> Transformers:
    """The same with an effective adapter."""
    return families.with_effect(new(family))


@pytest.fixture
def policy(adapted: Transformers) -> Iterator[Transformers]:
    """The same, whose adapter and gradients are restored after the test."""
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters() if weight.requires_grad}
    yield adapted
    adapted.zero_grad()
    for name, weight in before.items():
        adapted.get_parameter(name).data.copy_(weight)


@pytest.fixture
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    """Five questions of three lengths about three images of different sizes, each with two responses."""
    return families.ask(make_questions(5))


def plain_inputs(vlm: Transformers, question: Question, answer: str = "") -> dict[str, Tensor]:
    """The processor's encoding of a question followed by its response."""
    processor, template = vlm.collator.processor, vlm.template
    assert question.image_path is not None
    image = Image.open(question.image_path).convert("RGB")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
    text = template.format(question=question.prompt) if template else None
    text = text or processor.apply_chat_template(turn, add_generation_prompt=True)
    prompt = dict(processor(images=image, text=text, return_tensors="pt"))
    if not answer:
        inputs = prompt
    elif "labels" in prompt:  # attention within the prefix is bidirectional: the processor has to know where it ends
        inputs = dict(processor(images=image, text=text, suffix=answer, return_tensors="pt"))
    else:
        end = processor.tokenizer.eos_token
        gap = "" if text.endswith("\n") else " "
        inputs = dict(processor(images=image, text=f"{text}{gap}{answer}{end}", return_tensors="pt"))
        inputs |= {name: tensor for name, tensor in prompt.items() if name.startswith("qformer")}
    return {name: tensor for name, tensor in inputs.items() if name != "labels"}


@torch.no_grad()
def plain_logprobs(model: nn.Module, inputs: dict[str, Tensor], start: int) -> Tensor:
    """Log-probabilities of a response's tokens, from the place of the first, by one plain forward pass."""
    logprobs = model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, inputs["input_ids"][0, start:, None])[:, 0]


@pytest.fixture(scope="module")
def plain(family: tuple[Path, str | None]) -> Any:
    """The model as loaded by the library, without SaferVLM."""
    return AutoModelForImageTextToText.from_pretrained(family[0], dtype=torch.float32)


def test_another_image_changes_the_logits(base: Transformers, examples: list[Example], tmp_path: Path) -> None:
    other = families.inverted(examples[0], tmp_path)
    before, after = (base.score(base.collator([example])).logprobs for example in (examples[0], other))
    assert (before - after).abs().max() > 1e-2


def test_greedy_responses_equal_transformers_generate_one_by_one(
    base: Transformers, plain: Any, examples: list[Example]
) -> None:
    def alone(example: Example, steps: int) -> list[int]:
        inputs = plain_inputs(base, example.question)
        answer = plain.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            suppress_tokens=base.suppressed.tolist(),
            eos_token_id=base.eos_token_ids,
        )
        return answer[0, inputs["input_ids"].shape[1] :].tolist()

    families.check_answers(base, examples, alone)


def test_questions_about_an_image_share_image_and_prefix(
    base: Transformers, plain: Any, examples: list[Example], record_property: Callable[[str, object], None]
) -> None:
    """Five questions about three images: image and common prefix in one row per image, then one row per question."""
    assert base.one_by_one == (base.config.model_type in ONE_BY_ONE)
    record_property("type", base.config.model_type)
    if base.one_by_one:
        record_property("share", "nothing")
        return
    encodings = base.collator(examples).encodings
    tokenwise = {"input_ids", *base.written(encodings[0])}
    shared = base.sharing.inputs(encodings, tokenwise)
    record_property("share", "image" if shared is None else "image and prefix")
    assert (shared is not None) == (base.config.model_type in SHARING)
    if shared is None:
        return
    entered: list[tuple[int, int]] = []

    def enter(_: nn.Module, states: tuple[Tensor]) -> None:
        entered.append((states[0].shape[0], states[0].shape[1]))

    settings = GenerationConfig(
        max_new_tokens=6, suppress_tokens=base.eos_token_ids, output_logits=True, return_dict_in_generate=True
    )
    hook = base.base.get_decoder().layers[0].register_forward_pre_hook(enter)
    try:
        beginning = base.sharing.inputs(encodings, tokenwise)
        together = base.base.generate(**beginning, generation_config=settings)
    finally:
        hook.remove()
    prompts = [encoding["input_ids"][0].tolist() for encoding in encodings]
    asked = [prompts[0:2], prompts[2:4], prompts[4:]]
    common = [max(n for n in range(len(min(about, key=len))) if about[0][:n] == about[-1][:n]) for about in asked]
    rest = max(len(max(about, key=len)) - cut for about, cut in zip(asked, common, strict=True))
    assert entered == [(3, max(common)), (5, rest), *[(5, 1)] * 5]
    for row, example in enumerate(examples):
        alone = plain.generate(**plain_inputs(base, example.question), generation_config=settings)
        logits = torch.stack(alone.logits, 1)[0]
        torch.testing.assert_close(torch.stack(together.logits, 1)[row], logits, atol=1e-4, rtol=0)


def test_an_image_is_encoded_once(base: Transformers, examples: list[Example]) -> None:
    if not base.one_by_one:
        families.check_images_once(base, examples)


def test_a_question_that_is_asked_twice_is_answered_twice(base: Transformers, examples: list[Example]) -> None:
    """All but the last token of such prompts is common to them."""
    twice = [examples[0], replace(examples[0], question=replace(examples[0].question, id="again"))]
    greedy = Sampling(temperature=0, max_new_tokens=6)
    first, second = base.generate(base.collator(twice), greedy, seed=0)
    assert first == second == base.generate(base.collator(twice[:1]), greedy, seed=0)[0]


def test_sampled_responses_depend_only_on_their_record(base: Transformers, examples: list[Example]) -> None:
    families.check_draws(base, examples)


def test_scores_equal_one_plain_forward_pass_per_completion(
    policy: Transformers, plain: Any, examples: list[Example]
) -> None:
    """The policy by its own weights, the reference by the library's model."""

    @cache
    def encoded(question: Question, answer: str) -> tuple[dict[str, Tensor], int]:
        return plain_inputs(policy, question, answer), plain_inputs(policy, question)["input_ids"].shape[1]

    def alone(adapter: Adapter, example: Example, answer: str) -> Tensor:
        with active(policy.base, adapter):
            return plain_logprobs(policy.base if adapter == "policy" else plain, *encoded(example.question, answer))

    families.check_scores(policy, examples, alone, rtol=1e-5 if families.linear_attention(policy) else 0)


def test_completions_about_an_image_are_scored_in_one_row(policy: Transformers, examples: list[Example]) -> None:
    """Where generation shares image and prefix; otherwise each completion has a row of its own."""
    rows: list[int] = []
    parameters = [weight for name, weight in policy.named_parameters() if ".default." in name]
    weights = torch.linspace(-1, 1, 10)[:, None]

    def scored() -> tuple[Tensor, list[Tensor]]:
        batch = policy.collator(examples)
        policy.score(batch)  # the first time, both ways are compared
        rows.clear()
        logprobs = policy.score(batch).logprobs
        return logprobs.detach(), list(torch.autograd.grad((logprobs * weights).sum(), parameters))

    hook = policy.base.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    try:
        shared = policy.config.model_type in SHARING
        logprobs, gradients = scored()
        assert bool(policy.scoring.works) == shared
        assert rows == ([3] if shared else [1] * 10 if policy.one_by_one else [10])
        if shared:
            with patch.object(policy.scoring, "works", False):
                alone, expected = scored()
            assert rows == [10]
            torch.testing.assert_close(logprobs, alone, atol=1e-5, rtol=0)
            apart = torch.cat([(a - b).flatten() for a, b in zip(gradients, expected, strict=True)]).norm()
            assert apart < 1e-4 * torch.cat([part.flatten() for part in expected]).norm()
    finally:
        hook.remove()


def test_lora_is_on_every_linear_layer_of_the_language_model_and_on_no_other(
    policy: Transformers, record_property: Callable[[str, object], None]
) -> None:
    adapted = {name.removesuffix(".base_layer") for name, m in policy.base.named_modules() if hasattr(m, "lora_A")}
    blocks = {
        name.removesuffix(".base_layer")
        for name, module in policy.base.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name and ".lora_" not in name
    }
    elsewhere = ("vision", "visual", "qformer", "projector", "projection", "connector", "tower", "vqmodel")
    expected = {name for name in blocks if not any(part in name for part in (*elsewhere, *ROUTERS))}
    assert adapted == expected
    assert policy.adapted is not None
    record_property("LoRA", f"{policy.adapted.share:.0%}")
    assert len(adapted) >= 4


def test_training_lowers_the_loss_and_changes_only_the_adapter(policy: Transformers, examples: list[Example]) -> None:
    families.check_learning(policy, examples)


def test_checkpointed_gradients_are_the_same(
    policy: Transformers, family: tuple[Path, str | None], examples: list[Example]
) -> None:
    checkpointed = new(family, gradient_checkpointing=True)
    checkpointed.load(train=["policy"])
    checkpointed.load_state_dict(policy.state_dict())
    batch = policy.collator(examples[:2])
    policy.score(batch).logprobs.sum().backward()
    checkpointed.score(batch).logprobs.sum().backward()
    found, expected = (
        {name: weight.grad for name, weight in vlm.named_parameters() if weight.requires_grad}
        for vlm in (checkpointed, policy)
    )
    families.check_same(found, expected, families.linear_attention(policy))


def test_a_saved_adapter_scores_the_same(
    policy: Transformers, base: Transformers, family: tuple[Path, str | None], examples: list[Example], tmp_path: Path
) -> None:
    families.check_reload(policy, base, lambda folder: loaded(family, adapter=folder), examples, tmp_path)


@pytest.mark.gpu
def test_gpu_results_equal_cpu_results(family: tuple[Path, str | None], examples: list[Example]) -> None:
    families.check_gpu(lambda **settings: new(family, **settings), examples)


def test_the_collator_is_small_and_pickles(base: Transformers, examples: list[Example]) -> None:
    content = pickle.dumps(base.collator)
    assert len(content) < 300_000
    batch = pickle.loads(content)(examples)
    assert isinstance(batch, EncodedBatch)
    for name, tensor in base.collator(examples).encodings[0].items():
        assert torch.equal(batch.encodings[0][name], tensor)


GREEDY = Sampling(temperature=0, max_new_tokens=8)


def answers(vlm: Transformers, examples: list[Example]) -> list[list[int]]:
    return [answer.token_ids for answer in vlm.generate(vlm.collator(examples), GREEDY, seed=0)]


def test_generation_config_of_the_model_is_ignored(tmp_path: Path, examples: list[Example]) -> None:
    family = written(families.llava, tmp_path)
    expected = answers(loaded(family), examples)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 9.0}))
    assert answers(loaded(family), examples) == expected


@pytest.mark.parametrize(("named", "ends"), [(-1, [2]), ([2, 65, -1], [2, 65]), ("2", None), (2.0, None)])
def test_end_tokens_are_token_ids(named: Any, ends: list[int] | None, tmp_path: Path) -> None:
    """-1 stands for none in some files."""
    family = written(families.llava, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    if ends is None:
        with pytest.raises(ValueError, match=rf"^vlm\.model: eos_token_id .* has {named!r}, which is not a token id"):
            _ = new(family).eos_token_ids
    else:
        assert new(family).eos_token_ids == ends


def test_reference_scoring_has_no_dropout_in_training_mode(tmp_path: Path, examples: list[Example]) -> None:
    """The reference has to be deterministic, also while the policy trains: a Q-Former has dropout."""
    vlm = new(written(families.instructblip, tmp_path, "{question}"))
    vlm.load(train=["policy"])
    assert vlm.training
    batch = vlm.collator(examples)
    assert torch.equal(vlm.score(batch, adapter="reference").logprobs, vlm.score(batch, adapter="reference").logprobs)


def test_a_model_with_an_encoder_is_rejected(tmp_path: Path) -> None:
    family = written(families.blip2_t5, tmp_path, QUESTION)
    with pytest.raises(ValueError, match=r"^vlm.model: .* the question with an encoder .*; use a model with a decoder"):
        _ = new(family).collator


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    families.smolvlm(tmp_path)
    with (
        patch("transformers.models.smolvlm.processing_smolvlm.num2words", None),
        pytest.raises(ValueError, match=r"vlm\.model: .*pip install num2words.*; install it"),
    ):
        new((tmp_path, None)).processor  # noqa: B018


def test_a_model_without_a_chat_template_needs_a_template(tmp_path: Path) -> None:
    family = written(families.instructblip, tmp_path)
    with pytest.raises(ValueError, match=r"^vlm.model: .* has no chat template; give vlm.template"):
        _ = new(family).collator
    for template in ("Question: ", "{question} {x}"):
        with pytest.raises(
            ValueError, match=r"^vlm\.template: it must contain \{question\}, and nothing else in braces, got"
        ):
            new(family, template=template)
    with pytest.raises(ValueError, match=r"^vlm\.template: the model's processor rejects '\{question\}' with an image"):
        _ = new(written(families.qwen2_vl, tmp_path / "qwen"), template="{question}").collator


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (families.chat("USER: ", "ASSISTANT: ", "<image>", "").replace("ASSISTANT:{%", "ASSISTANT: {%"), "merges"),
        (families.chat("USER: ", "ANSWER: ", "<image>", "").replace("ANSWER:{%", "THINK:{%"), "another beginning"),
    ],
)
def test_a_chat_template_that_cannot_be_scored_is_rejected(
    template: str, message: str, tmp_path: Path, examples: list[Example]
) -> None:
    family = written(families.llava, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        new(family).collator(examples)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "computes for too long"),
        ("{{ 'x' * 7000000 }}", "writes 7000000 characters"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "fails"),
    ],
)
def test_a_chat_template_without_bounds_is_rejected(template: str, message: str, tmp_path: Path) -> None:
    family = written(families.llava, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"^vlm\.model: .*{message}") as raised:
        _ = new(family, limits=TextLimits(seconds=0.5)).collator
    assert "\n" not in str(raised.value)


def test_a_text_that_cannot_fit_is_not_tokenised(tmp_path: Path, examples: list[Example], monkeypatch) -> None:
    collator = new(written(families.llava, tmp_path)).collator
    monkeypatch.setattr(type(collator), "encode", None)
    question = replace(examples[0].question, prompt="x" * (64 * collator.max_length + 1))
    with pytest.raises(RecordError, match=rf"^{question.id}: a text of \d+ characters, the model takes"):
        collator([Example(question)])


def test_text_limits_are_configurable(tmp_path: Path, examples: list[Example]) -> None:
    family = written(families.llava, tmp_path)
    collator = new(family, limits=TextLimits(max_tokens=20)).collator
    for prompt, message in (("x" * 1281, "a text of 1281 characters, the model takes 20"), ("x " * 40, "tokens, the")):
        with pytest.raises(RecordError, match=message):
            collator([Example(replace(examples[0].question, prompt=prompt))])
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' * 1400 }}")
    with pytest.raises(ValueError, match="writes 1400 characters"):
        _ = new(family, limits=TextLimits(max_tokens=20)).collator.encode(examples[0].question)
    assert new(family).collator.max_length == new(family, limits=TextLimits(max_tokens=10**9)).collator.max_length


def test_a_question_with_a_special_token_is_rejected(tmp_path: Path, examples: list[Example]) -> None:
    collator = new(written(families.qwen2_vl, tmp_path)).collator
    question = replace(examples[0].question, prompt="Is <|vision_start|> safe?")
    with pytest.raises(RecordError, match=f"^{question.id}: .* special token '<|vision_start|>'".replace("|", r"\|")):
        collator([Example(question)])


def test_an_image_that_the_processor_cannot_take_fails_alone(tmp_path: Path, examples: list[Example]) -> None:
    """Qwen's processor rejects an image that is 200 times as wide as high; the other questions are asked."""
    # Our bound applies first.
    vlm = loaded(written(families.qwen2_vl, tmp_path), images=ImageSettings(max_aspect_ratio=1000))
    Image.new("RGB", (900, 3)).save(tmp_path / "thin.png")
    thin = replace(
        examples[0], question=replace(examples[0].question, image_path=str(tmp_path / "thin.png"), id="thin")
    )
    asked = FaultTolerantCollator(vlm.collator)([thin, *examples[1:]])
    assert [len(batch) for batch in asked.batches] == [4]
    assert [failure.question.id for failure in asked.failed] == ["thin"]
    assert "thin: the model's processor can't take it (absolute aspect ratio" in asked.failed[0].reason


def test_a_question_that_is_too_long_for_the_q_former_fails_alone(tmp_path: Path, examples: list[Example]) -> None:
    vlm = loaded(written(families.instructblip, tmp_path, "{question}"))
    long = Example(replace(examples[0].question, prompt="safe? " * 200, id="long"))
    vlm.collator.max_length = 10_000
    asked = FaultTolerantCollator(vlm.collator)([long, *(Example(example.question) for example in examples[1:])])
    assert [failure.question.id for failure in asked.failed] == ["long"]
    assert "tokens, the Q-Former takes 512; shorten the question" in asked.failed[0].reason


def test_question_without_room_for_a_response_is_unanswered(tmp_path: Path, examples: list[Example]) -> None:
    """OPT has learned position embeddings, none beyond the last position."""
    vlm = loaded(written(families.blip2, tmp_path, QUESTION))
    greedy = Sampling(temperature=0, max_new_tokens=8)
    expected = vlm.generate(vlm.collator(examples[1:]), greedy, seed=0)
    there = vlm.collator([examples[0]]).encodings[0]["input_ids"].shape[1]
    words = vlm.collator.max_length - there - 4  # at least one token each
    long = Example(replace(examples[0].question, prompt=examples[0].question.prompt + " " * (words // 2), id="long"))
    batch = vlm.collator([long, *examples[1:]])
    length = batch.encodings[0]["input_ids"].shape[1]
    first, *others = vlm.generate(batch, replace(greedy, max_new_tokens=vlm.collator.max_length - length + 1), seed=0)
    assert isinstance(first, Unanswered)
    assert f"long: {length} tokens and as many as" in first.reason
    assert [answer.token_ids[:8] for answer in others] == [answer.token_ids for answer in expected]


def test_no_special_token_is_ever_sampled(base: Transformers) -> None:
    """No special token of the tokenizer's file except the end tokens, and no token without text."""
    tokenizer, words = base.tokenizer, base.base.get_output_embeddings().out_features
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special and number < words}
    expected = (special | set(range(len(tokenizer), words))) - {tokenizer.eos_token_id, *base.eos_token_ids}
    assert set(base.suppressed.tolist()) == expected
    assert tokenizer.convert_tokens_to_ids("<pad>") in expected
    assert tokenizer.eos_token_id not in expected


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("instructblip-7b", families.instructblip),
        ("instructblip-13b", families.instructblip),
        ("qwen2-vl-7b", families.qwen2_vl),
    ],
)
def test_a_shipped_model_responds(
    name: str, build: Callable[[Path], None], tmp_path: Path, examples: list[Example]
) -> None:
    """A tiny model of its family replaces the real one."""
    build(tmp_path)
    shipped_families.check_shipped(shipped_families.shipped(name, f"--vlm.model={tmp_path}"), examples)


@pytest.mark.slow
def test_command_line_measures_and_trains_a_transformers_model(tmp_path: Path, tiny_sets: Path) -> None:
    """As in docs/models.md; the responses are not classified."""
    (tmp_path / "vlm").mkdir()
    families.qwen2_vl(tmp_path / "vlm")
    vlm = ["--model.vlm=safervlm.vlm.auto.Transformers", f"--model.vlm.model={tmp_path / 'vlm'}"]
    shipped_families.check_command_line(vlm, tmp_path, tiny_sets)
    for run, stage in (("sft", "sft"), ("measured", "measure")):
        checked = read_manifest(tmp_path / run)["stages"][stage]["self_check"]
        assert checked["processor"].startswith("Qwen2VLProcessor, ")
        assert checked["one_by_one"] is None
