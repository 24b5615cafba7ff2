"""The InternLM-XComposer2-VL family: model code that is distributed with the weights, run with current transformers.

Every test runs on a small model whose code is written here. If SAFERVLM_XCOMPOSER_CODE names a folder with the
published code (modeling_internlm_xcomposer2.py and the files beside it), it also runs on a tiny model of that code. The
published code has fixed widths; for the tiny model only these are replaced.
"""

import json
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
import shipped_families
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_xcomposer import (
    CLIP,
    CONFIG,
    MODELING,
    NO_CODE,
    fill,
    new,
    plain_model,
    write_own,
    write_published,
    write_unchanged,
)
from torch import Tensor, nn

from safervlm.errors import RecordError
from safervlm.records import Example, Question
from safervlm.vlm.lora import Adapter
from safervlm.vlm.prefix import join
from safervlm.vlm.remote import xcomposer
from safervlm.vlm.remote.xcomposer import END, LANGUAGE_LAYERS, XComposer2, rotate_rows
from safervlm.vlm.sampling import Sampling


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The vision tower is small, too."""
    with families.remote_modules(tmp_path_factory.mktemp("modules")), patch.dict(xcomposer.CLIP, CLIP):
        yield


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


def test_remote_code_must_be_enabled_and_pinned_to_a_commit() -> None:
    with pytest.raises(ValueError, match=r"^vlm.trust_remote_code: .* set it to true, or measure another model$"):
        XComposer2(revision="a" * 40)
    with pytest.raises(ValueError, match=r"^vlm.revision: .* pin it: give the full 40 digits of a commit.*$"):
        XComposer2(revision="main", trust_remote_code=True)
    XComposer2(revision="a" * 40, trust_remote_code=True)


def test_tokenizer_code_in_another_repository_is_rejected(tmp_path: Path) -> None:
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
def test_another_prompt_layout_is_rejected(old: str, other: str, tmp_path: Path) -> None:
    """Later models of the authors have another layout, in code with the same names."""
    write_own(tmp_path)
    assert old in MODELING
    (tmp_path / "modeling_tiny.py").write_text(MODELING.replace(old, other))
    with pytest.raises(ValueError, match=r"^vlm.model: .* formats questions differently from InternLM-XComposer2"):
        _ = new(tmp_path).collator


def test_model_with_variable_image_size_is_rejected(tmp_path: Path) -> None:
    """As 4KHD, whose code has the same names and parameters."""
    write_own(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["img_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^vlm.model: .* formats questions differently from InternLM-XComposer2"):
        new(tmp_path).load()


def test_tokenizer_without_the_end_of_turn_token_is_rejected(tmp_path: Path) -> None:
    """An unknown token would end every answer."""
    write_own(tmp_path)
    with (
        patch.object(xcomposer, "END", "[UNUSED_TOKEN_7]"),
        pytest.raises(ValueError, match=r"^vlm.model: the tokenizer of .* has no \[UNUSED_TOKEN_7\]; name a"),
    ):
        _ = new(tmp_path).eos_token_ids


def test_computed_buffers_equal_those_of_the_published_code(base: XComposer2, plain: Any) -> None:
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
def test_rope_scaling_and_maximum_length_are_those_of_the_file(scaling: Any, folder: Path, tmp_path: Path) -> None:
    """The library writes its own names into the scaling, which the code uses, and drops the length, which it needs."""
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_scaling": scaling}))
    vlm = loaded(tmp_path / "other")
    assert vlm.base.config.rope_scaling == scaling
    assert vlm.base.max_length == vlm.collator.max_length == CONFIG["max_length"]
    vlm.base.config.save_pretrained(tmp_path)


def test_pickled_weights_are_loaded_and_fingerprinted(folder: Path, tmp_path: Path) -> None:
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


def test_rotary_embedding_of_rows_equals_the_published_code(base: XComposer2, plain: Any) -> None:
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


def test_padded_row_has_the_positions_of_the_row_alone(base: XComposer2, examples: list[Example]) -> None:
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


def test_collated_prompt_equals_the_models_own_prompt(base: XComposer2, plain: Any, examples: list[Example]) -> None:
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
def test_question_or_response_with_a_special_token_is_rejected(
    mark: str, base: XComposer2, examples: list[Example]
) -> None:
    """It would start a new turn or image."""
    question = replace(examples[0].question, prompt=f"Is {mark} safe?")
    with pytest.raises(RecordError, match=f"^{question.id}: .* special token") as raised:
        base.collator([Example(question)])
    assert mark in str(raised.value)
    with pytest.raises(RecordError, match="special token"):
        base.collator([Example(examples[0].question, (f"Yes {mark}",))])


def test_default_system_prompt_is_the_models_own(folder: Path, base: XComposer2) -> None:
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


def test_response_ends_at_the_end_of_turn_and_special_tokens_are_suppressed(base: XComposer2) -> None:
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


def test_greedy_responses_equal_plain_forward_passes(base: XComposer2, plain: Any, examples: list[Example]) -> None:
    families.check_answers(base, examples, lambda example, steps: plain_greedy(base, plain, example.question, steps))


def test_an_image_is_encoded_once(base: XComposer2, examples: list[Example]) -> None:
    families.check_images_once(base, examples)


def test_sampled_responses_depend_only_on_their_record(base: XComposer2, examples: list[Example]) -> None:
    families.check_draws(base, examples)


def test_scores_equal_one_plain_forward_pass_per_completion(
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


def test_training_lowers_the_loss_and_changes_only_the_adapter(policy: XComposer2, examples: list[Example]) -> None:
    families.check_learning(policy, examples)


def test_reference_scores_are_deterministic_during_training(policy: XComposer2, examples: list[Example]) -> None:
    """The image part of a layer has dropout."""
    families.check_reference(policy, examples)


def test_gradients_belong_to_the_adapter_that_was_scored(
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
def test_gpu_results_equal_cpu_results(folder: Path, examples: list[Example]) -> None:
    families.check_gpu(lambda **settings: new(folder, **settings), examples)


def test_a_model_in_half_precision_responds(folder: Path, examples: list[Example]) -> None:
    families.check_half_precision(loaded(folder, dtype="bfloat16"), examples)


def test_shipped_configuration_is_rejected_without_a_pinned_commit() -> None:
    with pytest.raises(ValueError, match=r"vlm.revision: .* pin it"):
        shipped_families.shipped("internlm-xcomposer2-vl-7b")
    vlm = shipped_families.shipped("internlm-xcomposer2-vl-7b", f"--vlm.revision={'a' * 40}")
    assert vlm.name == "internlm/internlm-xcomposer2-vl-7b"


def test_the_shipped_model_responds(folder: Path, examples: list[Example]) -> None:
    """A tiny model replaces the real one."""
    vlm = shipped_families.shipped("internlm-xcomposer2-vl-7b", f"--vlm.model={folder}", "--vlm.lora.r=2")
    assert (vlm.lora.r, vlm.lora.target_modules) == (2, LANGUAGE_LAYERS)
    shipped_families.check_shipped(vlm, examples)


@pytest.mark.slow
def test_the_command_line_trains_and_measures_it(folder: Path, tmp_path: Path, tiny_sets: Path) -> None:
    """As in docs/models.md."""
    vlm = ["--model.vlm=configs/vlm/internlm-xcomposer2-vl-7b.yaml", f"--model.vlm.model={folder}"]
    shipped_families.check_command_line(vlm, tmp_path, tiny_sets)


@pytest.mark.slow
@NO_CODE
def test_published_remote_code_runs_unchanged(examples: list[Example], tmp_path: Path) -> None:
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
