"""Packed rows: each sequence attends only to itself, and shared prefixes are stored once per row."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safervlm.records import Example, Question
from safervlm.vlm import packing
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA
from safervlm.vlm.packing import Packed, pack, pack_completions, rows_of_completions
from safervlm.vlm.sampling import Sampling

# Questions about two images; the second and the last are one prompt, and 4 is the beginning of every prompt.
IMAGES = [0, 1, 0, 0, 0]
PROMPTS = [[4, 9, 1, 2], [4, 8, 5], [4, 9, 1, 3, 6], [4, 9], [4, 9, 1, 3, 6]]
COMPLETIONS = [[[11, 12], [13]], [[14, 15]], [[16, 17, 18], [19, 20]], [[21], [22, 23]], [[24, 25], [26]]]


def visible(packed: Packed, sequence: int) -> list[tuple[int, int]]:
    """The tokens, with their positions, from which a sequence's last token is predicted."""
    row, count = int(packed.rows[sequence]), int(packed.mask[sequence].sum())
    place = int(packed.source[sequence, count - 1])
    mask = packed.attention_mask()
    keys = torch.arange(place + 1) if mask is None else mask[row, 0, place].nonzero()[:, 0]
    return [(int(packed.input_ids[row, key]), int(packed.position_ids[row, key])) for key in keys]


def test_packed_sequence_attends_only_to_itself_at_its_own_positions() -> None:
    packed = pack_completions(IMAGES, PROMPTS, COMPLETIONS)
    expected = [(prompt, tokens) for prompt, those in zip(PROMPTS, COMPLETIONS, strict=True) for tokens in those]
    assert len(packed.rows) == len(expected)
    for sequence, (prompt, tokens) in enumerate(expected):
        assert visible(packed, sequence) == [(token, place) for place, token in enumerate((prompt + tokens)[:-1])]
        assert packed.target[sequence][packed.mask[sequence]].tolist() == tokens
        assert (packed.sequences == sequence).any() or len(tokens) == 1
    for row, (ids, numbers) in enumerate(zip(packed.input_ids, packed.sequences, strict=True)):
        for token, number, position, segment in zip(
            ids, numbers, packed.position_ids[row], packed.segments[row], strict=True
        ):
            prompt, tokens = expected[int(number)]
            assert segment < 0 or (prompt + tokens)[int(position)] == token


def test_shared_prefixes_are_stored_once_per_row() -> None:
    packed = pack_completions(IMAGES, PROMPTS, COMPLETIONS)
    (shared,) = (row for row, question in enumerate(packed.questions.tolist()) if IMAGES[question] == 0)
    kept = packed.input_ids[shared][packed.segments[shared] >= 0].tolist()
    # The beginning leaves a token of each prompt: that is 4 alone. The prompt that occurs twice is there once.
    assert kept == [4, 9, 1, 2, 11, 9, 1, 3, 6, 16, 17, 19, 24, 9, 22]
    assert packed.rows.tolist() == [shared, shared, 1 - shared, *[shared] * 6]


def test_one_sequence_per_row_needs_no_mask() -> None:
    packed = pack_completions([0, 1], PROMPTS[:2], [[[11, 12]], [[14]]])
    assert packed.attention_mask() is None
    assert packed.input_ids.tolist() == [[4, 9, 1, 2, 11], [4, 8, 5, 0, 0]]
    assert packed.source.tolist() == [[3, 4], [2, 0]]


def test_packed_generation_rows_contain_every_token() -> None:
    packed = pack([[4, 9]], [[[1, 2], [1, 3, 6]]])
    assert packed.input_ids.tolist() == [[4, 9, 1, 2, 1, 3, 6]]
    assert packed.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert packed.ends.tolist() == [3, 6]
    assert visible(packed, 1) == [(4, 0), (9, 1), (1, 2), (3, 3)]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([0] * 3, [[0, 1, 2]]),
        ([0, 1, 0, 1], [[0, 2], [1, 3]]),
        ([0] * 9, [[0, 1, 2, 3], [4, 5, 6, 7, 8]]),  # at most eight; nine are divided evenly
        # Seven questions in one row would make most of the other rows padding.
        ([0] * 7 + list(range(1, 30)), None),
    ],
)
def test_questions_share_rows_where_fewer_tokens_are_computed(images: list[int], expected: Any) -> None:
    prompts = [[*range(20), 100 + number, 200, 300, 400, 500] for number in range(len(images))]
    completions = [[[7] * 6]] * len(images)
    rows = rows_of_completions(images, prompts, completions)
    assert sorted(question for row in rows for question in row) == list(range(len(images)))
    if expected is not None:
        assert rows == expected
    else:
        packed = pack_completions(images, prompts, completions)
        assert max(map(len, rows)) < 7
        assert packed.input_ids.numel() <= len(images) * 30


@pytest.fixture
def vlm(tiny_llava: Path) -> Llava:
    vlm = Llava(str(tiny_llava), dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.0))
    vlm.load(train=["policy"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in vlm.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return vlm


@pytest.fixture
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    """Ten questions about two images, two of them equal, with two responses each."""
    first, second = make_questions(3)[::2]
    prompts = ["Is it safe?" + " Is it?" * (number // 2 % 4) for number in range(10)]
    asked = [replace((first, second)[n % 2], id=str(n), prompt=prompt) for n, prompt in enumerate(prompts)]
    return [
        Example(question, ("Yes, it is." + " Yes." * number, "No." + " No!" * (number % 3)))
        for number, question in enumerate(asked)
    ]


def test_an_exception_while_generating_restores_modes(
    vlm: Llava, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.train()
    modes = [module.training for module in vlm.modules()]

    def fails(*_: Any) -> Any:
        assert not any(module.training for module in vlm.modules())
        raise RuntimeError("no kernel")

    monkeypatch.setattr(vlm, "decode", fails)
    with pytest.raises(RuntimeError, match="no kernel"):
        vlm.generate(vlm.collator(examples), Sampling(max_new_tokens=2), seed=0)
    assert [module.training for module in vlm.modules()] == modes


def test_a_row_per_image_equals_a_row_per_question(
    vlm: Llava, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 1, 2 * len(examples))[:, None]
    images: list[int] = []
    tokens: list[int] = []
    encode, forward = vlm.encode_images, vlm.forward_packed

    def counted(pixels: Any) -> Any:
        images.append(len(pixels))
        return encode(pixels)

    def counted_forward(packed: Packed, *args: Any) -> Any:
        tokens.append(int((packed.segments >= 0).sum()))
        return forward(packed, *args)

    monkeypatch.setattr(vlm, "encode_images", counted)
    monkeypatch.setattr(vlm, "forward_packed", counted_forward)
    found = []
    for most in (8, 1):
        monkeypatch.setattr(packing, "ROW", most)
        scores = vlm.score(vlm.collator(examples), entropy=True)
        assert scores.entropy is not None
        loss = ((scores.logprobs + scores.entropy) * weights).sum() / scores.mask.sum()
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        found.append((scores.logprobs, loss, gradient))
    (logprobs, loss, gradient), (plain_logprobs, plain_loss, plain_gradient) = found
    torch.testing.assert_close(logprobs, plain_logprobs, atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-5)
    assert (gradient - plain_gradient).norm() < 1e-4 * plain_gradient.norm()
    # Both encode each image once. The rest is counted: an image with five questions is in one row.
    assert images == [2, 2]
    collator = vlm.collator
    prompts = [collator.prompt_ids(example.question.prompt) for example in examples]
    answers = sum(len(collator.completion_ids(text)) - 1 for example in examples for text in example.completions)
    beginning = len(packing.common_beginning([list(prompt) for prompt in {*map(tuple, prompts)}]))
    distinct = {(number % 2, tuple(prompt)) for number, prompt in enumerate(prompts)}
    assert tokens == [
        2 * beginning + sum(len(prompt) - beginning for _, prompt in distinct) + answers,
        sum(map(len, prompts)) + answers,
    ]
