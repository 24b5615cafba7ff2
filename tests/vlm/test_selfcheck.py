"""The self-check of a model when it is loaded: each fault that would not raise an exception is found."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import more_families
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from safervlm.errors import ArgumentError
from safervlm.records import Question
from safervlm.vlm import selfcheck
from safervlm.vlm.auto import Transformers
from safervlm.vlm.lora import LoRA
from safervlm.vlm.processors import read_processor
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.selfcheck import Trace, difference, rows_equal_or_incomparable


def model(build: Callable[[Path], None], folder: Path, **settings: Any) -> Transformers:
    build(folder)
    return Transformers(str(folder), **{"dtype": "float32", "lora": LoRA(r=2, alpha=4, min_coverage=0.0), **settings})


POSITIONS = "position_ids of the model differs"


@pytest.mark.parametrize(
    ("build", "large", "reason"),
    [
        (families.llava, False, None),
        (families.llava, True, None),
        (more_families.ernie4_5_vl, False, None),
        pytest.param(more_families.hunyuan_vl, False, POSITIONS, marks=more_families.NEEDS_5_24),
        pytest.param(more_families.hunyuan_vl, True, POSITIONS, marks=more_families.NEEDS_5_24),
        (more_families.minicpmv4_6, False, "its code fails (RuntimeError: "),
        (more_families.emu3, False, "the logits of token 1 differ"),
        (more_families.emu3, True, "the states after 2 layers differ"),
    ],
)
def test_model_whose_batches_change_results_is_run_one_by_one(
    build: Any, large: bool, reason: str | None, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Positions, inputs that can't be joined, and padding that changes an image: computed one by one."""
    if large:
        monkeypatch.setattr(selfcheck, "LARGE", 0)
    vlm = model(build, tmp_path)
    vlm.load()
    assert vlm.checked["layers"] == (2 if large else None)
    assert vlm.checked["images"] == type(vlm.processor.image_processor).__name__
    assert vlm.checked["images"].endswith("Pil") or build is more_families.emu3  # Emu3 has one class alone
    assert (vlm.checked["one_by_one"] or "").startswith(reason or "")
    assert vlm.one_by_one == (reason is not None)
    assert ("the questions are computed one by one" in capsys.readouterr().err) == (reason is not None)


def test_token_types_are_padded_with_the_tokens(tmp_path: Path, monkeypatch: Any) -> None:
    """ERNIE extends the types that choose its experts by itself, so the library doesn't name them."""
    vlm = model(more_families.ernie4_5_vl, tmp_path)
    vlm.load()
    assert vlm.checked["aligned"] == ["attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids"]
    selfcheck.RESULTS.clear()
    monkeypatch.setattr(selfcheck, "aligned", lambda encodings: [])
    other = Transformers(str(tmp_path), dtype="float32")
    other.load()
    assert other.checked["one_by_one"] == "moe_mm_token_type_ids of the model differs"
    selfcheck.RESULTS.clear()


def test_a_generate_without_our_sampling_is_rejected(tmp_path: Path) -> None:
    vlm = model(more_families.janus, tmp_path)
    with pytest.raises(ArgumentError, match=r"^vlm\.model: .* called the logits processor 0 times for 2 tokens, so it"):
        vlm.load()
    with pytest.raises(ArgumentError, match="0 times"):  # not loaded by the first attempt
        vlm.load()


def test_a_large_model_without_our_sampling_is_rejected_at_its_first_question(
    tmp_path: Path, make_questions: Callable[[int], list[Question]], monkeypatch: Any
) -> None:
    """The self-check of a large model stops before the logits."""
    monkeypatch.setattr(selfcheck, "LARGE", 0)
    vlm = model(more_families.janus, tmp_path)
    vlm.load()
    batch = vlm.collator(families.ask(make_questions(1)))
    for temperature in (0.0, 1.0):
        with pytest.raises(ArgumentError, match=r"^vlm\.model: .* its generate never called the logits processor"):
            vlm.generate(batch, Sampling(temperature=temperature, max_new_tokens=2), seed=0)


def test_code_that_fails_is_rejected_with_its_reason(tmp_path: Path) -> None:
    vlm = model(families.llava, tmp_path)

    @wraps(LlavaForConditionalGeneration.forward)  # the library reads its arguments
    def fails(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("no image_outputs")

    with (
        patch.object(LlavaForConditionalGeneration, "forward", fails),
        pytest.raises(ArgumentError, match=r"its code in transformers fails \(no image_outputs\); use another model"),
    ):
        vlm.load()


def test_a_processor_that_fails_is_rejected_with_its_reason(tmp_path: Path) -> None:
    vlm = model(families.llava, tmp_path)
    for error in (TypeError("no images"), ValueError("no images")):
        with (
            patch("transformers.LlavaProcessor.__call__", side_effect=error),
            pytest.raises(ArgumentError, match=r"^vlm\.model: .*: its processor fails \(.*no images\)?\); use another"),
        ):
            vlm.load()


@pytest.mark.parametrize(("setting", "differs"), [("num_additional_image_tokens", "input_ids"), ("tokens", "token_ty")])
def test_another_processor_than_the_models_own_is_rejected(setting: str, differs: str, tmp_path: Path) -> None:
    def other(*args: Any) -> Any:
        processor: Any = read_processor(*args)
        if setting == "tokens":
            processor.tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
        else:
            setattr(processor, setting, 3)
        return processor

    vlm = model(families.llava, tmp_path)
    with (
        patch("safervlm.vlm.auto.read_processor", other),
        pytest.raises(ArgumentError, match=rf"{differs}.* of LlavaProcessor differs from .* of its own LlavaProcessor"),
    ):
        vlm.load()


def test_a_model_is_checked_once_while_its_files_are_the_same(tmp_path: Path) -> None:
    with patch.object(AutoProcessor, "from_pretrained", side_effect=AutoProcessor.from_pretrained) as read:
        vlm = model(families.llava, tmp_path)
        for _ in range(2):
            vlm.load()
            Transformers(str(tmp_path), dtype="float32").load(train=["policy"])
        assert read.call_count == 1
        template = tmp_path / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
        Transformers(str(tmp_path), dtype="float32").load()
        assert read.call_count == 2


def test_self_check_leaves_weights_and_buffers_bit_identical(tmp_path: Path) -> None:
    vlm = model(families.qwen2_vl, tmp_path, dtype="bfloat16")
    vlm.load()
    assert vlm.checked["one_by_one"] is None
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    found = {**dict(vlm.base.named_parameters()), **dict(vlm.base.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert vlm.dtype is torch.bfloat16


def test_running_statistics_stay_while_lora_trains(
    tmp_path: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    """Emu3's image encoder has BatchNorm."""
    vlm = families.with_effect(model(more_families.emu3, tmp_path))
    before = {name: buffer.clone() for name, buffer in vlm.named_buffers() if "running" in name}
    assert len(before) > 2
    examples = families.ask(make_questions(3))
    vlm.generate(vlm.collator(examples), Sampling(max_new_tokens=2), seed=0)
    families.check_reference(vlm, examples)
    vlm.score(vlm.collator(examples))
    assert all(torch.equal(buffer, before[name]) for name, buffer in vlm.named_buffers() if name in before)


@pytest.mark.parametrize(
    ("batch", "alone", "same"),
    [
        ([[1, 2, 3], [0, 4, 5]], [[4, 5]], True),  # padded on the left
        ([[1, 2, 3], [4, 5, 0]], [[4, 5]], False),
        ([[1, 2], [3, 4]], [[3, 4]], True),
        ([[1, 2], [3, 5]], [[3, 4]], False),
        ([[[0, 1, 2], [0, 7, 8]]], [[[7, 8]]], True),  # a leading dimension of coordinates
        ([[[0, 1, 2], [0, 7, 8]]], [[[7, 9]]], False),
        ([1, 2, 3], [2, 3], True),  # without rows, not comparable
        ([[1, 2, 3, 4], [4, 5, 6, 7]], [[4, 5]], True),  # of another kind of length, not comparable
        ([1, 2], [[2]], True),
    ],
)
def test_a_row_is_compared_without_its_padding(batch: list[Any], alone: list[Any], same: bool) -> None:
    assert rows_equal_or_incomparable(torch.tensor(batch), torch.tensor(alone), padding=1) == same


def test_logits_are_compared_while_the_tokens_are_the_same() -> None:
    def traced(rows: list[int], second: float) -> Trace:
        logits: list[Tensor] = [torch.arange(5.0)[None].repeat(len(rows), 1) for _ in range(2)]
        logits[1] = logits[1] * second
        return Trace(3, logits=logits, tokens=torch.tensor(rows)[:, None].repeat(1, 2))

    assert difference(traced([1, 2], 1.0), traced([2], 1.0)) is None
    assert difference(traced([1, 2], 3.0), traced([2], 1.0)) == "the logits of token 2 differ"
    assert difference(traced([1, 3], 3.0), traced([2], 1.0)) is None
