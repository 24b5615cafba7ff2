"""Scoring and generation: results with shared computation equal those without."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from safervlm.errors import RecordError
from safervlm.protocol import UNSAFE, aligned_response
from safervlm.records import Example, Question
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA, active
from safervlm.vlm.packed import PackedBatch
from safervlm.vlm.packing import ROW, pack, questions_of_rows
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.weights import weights_fingerprint

LORA = LoRA(r=4, alpha=8, dropout=0.0)


def perturb(vlm: Llava, seed: int = 1) -> None:
    """Sets LoRA's second factor, which is initialised to zero, to random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vlm.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


@pytest.fixture
def vlm(tiny_llava: Path) -> Llava:
    vlm = Llava(str(tiny_llava), dtype="float32", lora=LORA)
    vlm.load(train=["policy", "value"])
    perturb(vlm)
    return vlm


def answers(question: Question) -> tuple[str, str]:
    return aligned_response(UNSAFE, question.prompt_number, "Knife"), ["Yes.", "No", "I see a " + "knife " * 12][
        question.prompt_number % 3
    ]


def plain_logprobs(vlm: Llava, example: Example, completion: str) -> Tensor:
    """A forward pass of the Hugging Face model on one sequence, without sharing."""
    collator = vlm.collator
    single = collator([replace(example, completions=())])
    answer = collator.completion_ids(completion)
    ids = torch.tensor([single.prompt_ids[0] + answer])
    logits = vlm.base(input_ids=ids, pixel_values=single.pixel_values, attention_mask=torch.ones_like(ids)).logits
    start = len(single.prompt_ids[0])
    return logits[0, start - 1 : -1].log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]


def test_scores_equal_one_plain_forward_pass_per_completion(
    vlm: Llava, make_questions: Callable[[int], list[Question]]
) -> None:
    examples = [Example(question, answers(question)) for question in make_questions(5)]
    batch = vlm.collator(examples)
    assert batch.pixel_values.shape[0] == 3  # five questions, three images: each is encoded once
    for adapter in ("policy", "value", "reference"):
        scores = vlm.score(batch, adapter=adapter)
        for index, (example, completion) in enumerate((e, c) for e in examples for c in e.completions):
            with active(vlm.base, adapter):
                expected = plain_logprobs(vlm, example, completion)
            assert scores.mask[index].sum() == len(expected)
            torch.testing.assert_close(scores.logprobs[index, : len(expected)], expected, atol=1e-5, rtol=0)
            assert not scores.logprobs[index, len(expected) :].any()
    policy, reference = (vlm.score(batch, adapter=name).logprobs for name in ("policy", "reference"))
    assert (policy - reference).abs().max() > 1e-2


def test_shared_prompt_gradients_equal_separate_ones(
    vlm: Llava, make_questions: Callable[[int], list[Question]]
) -> None:
    examples = [Example(question, answers(question)) for question in make_questions(4)]
    parameters = [p for name, p in vlm.named_parameters() if ".default." in name]
    weights = torch.linspace(-1, 1, 8)[:, None]  # chosen and rejected have different gradients
    shared = torch.autograd.grad((vlm.score(vlm.collator(examples)).logprobs * weights).sum(), parameters)
    total = sum(
        plain_logprobs(vlm, example, completion).sum() * weight
        for weight, (example, completion) in zip(
            weights[:, 0], ((e, c) for e in examples for c in e.completions), strict=True
        )
    )
    for one, other in zip(shared, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_gpu_results_equal_cpu_results(tiny_llava: Path, make_questions: Callable[[int], list[Question]]) -> None:
    def new(dtype: str = "float32", gradient_checkpointing: bool = False) -> Llava:
        return Llava(str(tiny_llava), dtype=dtype, lora=LORA, gradient_checkpointing=gradient_checkpointing)

    families.check_gpu(new, [Example(question, answers(question)) for question in make_questions(5)])


def test_single_completions_need_no_mask_and_return_the_same(
    vlm: Llava, make_questions: Callable[[int], list[Question]]
) -> None:
    questions = make_questions(5)[::2]  # each about another image
    both = vlm.collator([Example(question, answers(question)) for question in questions])
    chosen = vlm.collator([Example(question, answers(question)[:1]) for question in questions])
    assert chosen.packed is not None
    assert chosen.packed.attention_mask() is None
    alone = vlm.score(chosen).logprobs
    torch.testing.assert_close(vlm.score(both).logprobs[::2, : alone.shape[1]], alone, atol=1e-5, rtol=0)


def test_gradient_checkpointing_keeps_each_adapters_gradient(
    tiny_llava: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    examples = [Example(question, answers(question)) for question in make_questions(3)]
    gradients = []
    for checkpointing in (False, True):
        vlm = Llava(str(tiny_llava), dtype="float32", lora=LORA, gradient_checkpointing=checkpointing)
        vlm.load(train=["policy", "value"])
        perturb(vlm)
        vlm.train()
        batch = vlm.collator(examples)
        value = vlm.score(batch, adapter="value", hidden=True).hidden
        assert value is not None
        # Two adapters, one backward pass, while the reference is active.
        loss = vlm.score(batch).logprobs.sum() + value.pow(2).sum()
        with active(vlm.base, "reference"):
            loss.backward()
        gradients.append({name: p.grad for name, p in vlm.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_lora_is_on_the_language_layers_only(vlm: Llava) -> None:
    trained = [name for name, p in vlm.named_parameters() if p.requires_grad]
    assert trained
    assert all("language_model" in name for name in trained)
    # 7 linear layers in each of 2 blocks, two factors, two adapters
    assert len(trained) == 7 * 2 * 2 * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_responses_depend_only_on_their_record(
    tiny_llava: Path, make_questions: Callable[[int], list[Question]], temperature: float
) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32")
    vlm.load()
    sampling = Sampling(temperature=temperature, top_p=0.9, max_new_tokens=12)
    examples = [Example(question) for question in make_questions(7)]
    assert len({len(ids) for ids in vlm.collator(examples).prompt_ids}) > 2  # otherwise padding is not tested

    def answer(groups: list[list[Example]]) -> dict[str, str]:
        return {
            example.question.id: generation.text
            for group in groups
            for example, generation in zip(group, vlm.generate(vlm.collator(group), sampling, seed=5), strict=True)
        }

    together = answer([examples])
    assert len(set(together.values())) > 4  # the model does not ignore its input
    assert answer([[example] for example in examples]) == together
    assert answer([examples[::-1][:3], examples[::-1][3:]]) == together


def test_greedy_responses_equal_transformers_generate_one_by_one(
    tiny_llava: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    """More questions about an image than fit in a row, of different lengths, with responses of different lengths."""
    vlm = Llava(str(tiny_llava), dtype="float32")
    vlm.load()
    common = range(ROW + 3)
    wider = [replace(q, prompt=f"{q.prompt} {'Really? ' * (n % 4)}") for n, q in enumerate(make_questions(len(common)))]
    about_one = [replace(question, image_path=wider[0].image_path) for question in wider]
    examples = [Example(question) for question in [*about_one, *make_questions(20)[14:]]]
    batch = vlm.collator(examples)
    assert len(questions_of_rows(batch.image_rows.tolist())) == 2 + 3
    expected = []
    for example in examples:
        single = vlm.collator([example])
        ids = torch.tensor(single.prompt_ids)
        answer = vlm.base.generate(
            input_ids=ids,
            pixel_values=single.pixel_values,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            suppress_tokens=vlm.suppressed.tolist(),
            # The random model never generates the end token: here some responses end early, and rows leave the batch.
            eos_token_id=(ends := [vlm.eos_token_ids[0], *range(60, 90)]),
        )
        expected.append(answer[0, ids.shape[1] :].tolist())
    lengths = {len(answer) for answer in expected}
    assert len(lengths) > 3, lengths
    lasting = max(range(len(expected)), key=lambda place: len(expected[place]))
    for order in (list(range(len(expected))), [*(n for n in range(len(expected)) if n != lasting), lasting]):
        # The second time the longest response is in the last row: the rows before it leave the batch.
        batch = vlm.collator([examples[n] for n in order])
        with patch.object(Llava, "eos_token_ids", ends):
            generated = vlm.generate(batch, Sampling(temperature=0, max_new_tokens=40), seed=0)
        assert [answer.token_ids for answer in generated] == [expected[n] for n in order]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_masks_are_additive_and_in_the_model_dtype(
    dtype: str, tiny_llava: Path, make_questions: Callable[[int], list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Boolean mask would be converted in every layer of every step."""
    vlm = Llava(str(tiny_llava), dtype=dtype)
    vlm.load()
    masks = []
    model = vlm.language_model()

    def kept(**inputs: Any) -> Any:
        masks.append(inputs["attention_mask"])
        return model(**inputs)

    monkeypatch.setattr(vlm, "language_model", lambda: kept)
    question = make_questions(1)[0]
    asked = [Example(replace(question, id=str(number), prompt=f"word {number}")) for number in range(3)]
    vlm.generate(vlm.collator(asked), Sampling(temperature=0, max_new_tokens=3), seed=0)
    assert len(masks) == 3
    for mask in masks:
        assert mask.dtype == vlm.dtype
        assert set(mask.unique().tolist()) == {0, -torch.inf}


def test_another_seed_samples_another_response(
    tiny_llava: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32")
    vlm.load()
    batch = vlm.collator([Example(question) for question in make_questions(4)])
    drawn = [vlm.generate(batch, Sampling(max_new_tokens=8), seed=seed) for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_generated_tokens_score_as_when_they_were_sampled(
    vlm: Llava, make_questions: Callable[[int], list[Question]]
) -> None:
    """Tokens that cannot be sampled have no probability in scoring: the two distributions are equal."""
    sampling = Sampling(temperature=0.7, top_p=1.0, max_new_tokens=6)
    batch = vlm.collator([Example(question) for question in make_questions(3)])
    generations = vlm.generate(batch, sampling, seed=0)
    batch.packed = pack(batch.prompt_ids, [[generation.token_ids] for generation in generations])
    scores = vlm.score(batch, sampling=sampling, entropy=True)
    suppressed = vlm.suppressed
    assert {vlm.image_token_id, 0, 1}.issubset(suppressed.tolist())
    assert suppressed.max() == vlm.base.config.text_config.vocab_size - 1
    assert vlm.eos_token_ids[0] not in suppressed
    ids = torch.tensor([batch.prompt_ids[0] + generations[0].token_ids])
    with active(vlm.base, "policy"):
        logits = vlm.base(input_ids=ids, pixel_values=batch.pixel_values[:1]).logits[
            0, len(batch.prompt_ids[0]) - 1 : -1
        ]
    logits[:, suppressed] = -torch.inf
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    length = len(generations[0].token_ids)
    torch.testing.assert_close(
        scores.logprobs[0, :length], distribution.log_prob(torch.tensor(generations[0].token_ids)), atol=1e-5, rtol=0
    )
    assert scores.entropy is not None
    probabilities = distribution.probs.clamp(min=1e-30)
    torch.testing.assert_close(
        scores.entropy[0, :length], -(probabilities * probabilities.log()).sum(-1), atol=1e-4, rtol=0
    )
    (scores.entropy.sum() + scores.logprobs.sum()).backward()
    assert all(p.grad.isfinite().all() for name, p in vlm.named_parameters() if ".default." in name)


def test_collator_is_small_and_pickles(tiny_llava: Path, make_questions: Callable[[int], list[Question]]) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32")
    content = pickle.dumps(vlm.collator)
    assert len(content) < 200_000
    batch = pickle.loads(content)([Example(question, answers(question)) for question in make_questions(2)])
    assert isinstance(batch, PackedBatch)


def test_a_saved_adapter_loads_with_the_same_logits(
    vlm: Llava, tiny_llava: Path, tmp_path: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    vlm.save_adapter(tmp_path)
    batch = vlm.collator([Example(question, answers(question)[:1]) for question in make_questions(3)])
    expected = vlm.score(batch).logprobs
    measured = Llava(str(tiny_llava), dtype="float32", adapter=str(tmp_path))
    measured.load()
    torch.testing.assert_close(measured.score(batch).logprobs, expected, atol=1e-6, rtol=0)
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    inputs = {"input_ids": torch.tensor([batch.prompt_ids[0]]), "pixel_values": batch.pixel_values[:1]}
    before = base(**inputs).logits
    after = PeftModel.from_pretrained(base, str(tmp_path))(**inputs).logits
    with active(vlm.base, "policy"):
        torch.testing.assert_close(after, vlm.base(**inputs).logits, atol=1e-6, rtol=0)
    assert (after - before).abs().max() > 1e-2


def test_an_adapter_of_another_model_is_rejected(vlm: Llava, tiny_llava: Path, tmp_path: Path) -> None:
    vlm.save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("language_model", "text_model"): w for key, w in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"damaged \(adapter_model.safetensors has another checksum"):
        Llava(str(tiny_llava), adapter=str(tmp_path)).load()
    (tmp_path / "safervlm.json").unlink()  # as written by another program
    with pytest.raises(ValueError, match="weights don't fit"):
        Llava(str(tiny_llava), adapter=str(tmp_path)).load()
    with pytest.raises(ValueError, match=r"no adapter_config.json"):
        Llava(str(tiny_llava), adapter=str(tmp_path / "nowhere"))


def test_image_fit_pads_with_the_mean_colour_or_crops(
    tiny_llava: Path, tmp_path: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    wide = Image.new("RGB", (56, 28), "red")
    wide.paste("blue", (14, 0, 42, 28))
    wide.save(tmp_path / "wide.png")
    example = Example(replace(make_questions(1)[0], image_path=str(tmp_path / "wide.png")))
    crop = Llava(str(tiny_llava), image_fit="crop").collator([example]).pixel_values[0]
    pad = Llava(str(tiny_llava), image_fit="pad").collator([example]).pixel_values[0]
    processor = Llava(str(tiny_llava)).collator.image_processor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    blue = (torch.tensor([0.0, 0.0, 1.0]) - mean) / std
    torch.testing.assert_close(crop, blue[:, None, None].expand(3, 28, 28), atol=1e-5, rtol=0)
    # The mean colour is zero after normalisation: the padding above and below the picture is zero.
    assert pad[:, 0].abs().max() < 0.02
    assert pad[:, -1].abs().max() < 0.02
    assert pad[:, 14].abs().max() > 1


def test_checkpoint_of_another_family_is_rejected_with_its_class(tmp_path: Path) -> None:
    families.gemma3(tmp_path)
    with pytest.raises(ValueError, match=r"is a gemma3, not a llava; .* --model\.vlm safervlm\.vlm\.auto\.Tr"):
        _ = Llava(str(tmp_path)).collator


def test_weights_fingerprint_changes_with_weights_and_chat_template(tiny_llava: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_llava, copy)
    assert weights_fingerprint(str(copy), None) == weights_fingerprint(str(tiny_llava), None)
    before = Llava(str(copy)).describe()
    weights = load_file(copy / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, copy / "model.safetensors")
    after = Llava(str(copy)).describe()
    assert after["weights"] != before["weights"]
    (copy / "chat_template.jinja").write_text("another layout of the question")
    assert Llava(str(copy)).describe()["weights"] != after["weights"]


@pytest.mark.parametrize(
    ("prompt", "completions", "message"),
    [
        ("Is <image> safe?", (), "contains the image placeholder"),
        ("Is it safe?", ("See <image>.",), "contains the image placeholder"),
        ("Is it " + "safe " * 400, (), "the model takes 512"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    tiny_llava: Path,
    make_questions: Callable[[int], list[Question]],
    prompt: str,
    completions: tuple[str, ...],
    message: str,
) -> None:
    question = replace(make_questions(1)[0], prompt=prompt)
    with pytest.raises(RecordError, match=f"^{question.id}: .*{message}"):
        Llava(str(tiny_llava)).collator([Example(question, completions)])
