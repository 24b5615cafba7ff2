"""Scoring with any model of transformers falls back to a row per completion where a row can't be shared."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import pytest
import torch
from torch import Tensor

from safervlm.finite import NotFiniteError, NotFiniteRecordError
from safervlm.records import Example, Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.layers import evaluated
from safervlm.vlm.lora import LoRA
from safervlm.vlm.sampling import Sampling


@pytest.fixture
def vlm(tmp_path: Path) -> Transformers:
    families.llava(tmp_path)
    return families.with_effect(Transformers(str(tmp_path), dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.5)))


@pytest.fixture
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    return families.ask(make_questions(5))


def plain(vlm: Transformers, batch: Any) -> Tensor:
    with patch.object(vlm.scoring, "works", False):
        return vlm.score(batch).logprobs


def failing(**inputs: Any) -> Any:
    if inputs["attention_mask"].dim() == 4:
        raise ValueError("no such mask")
    return MODEL["forward"](**inputs)


def without_mask(**inputs: Any) -> Any:
    if inputs["attention_mask"].dim() == 4:
        inputs["attention_mask"] = None
    return MODEL["forward"](**inputs)


MODEL: dict[str, Any] = {}


@pytest.mark.parametrize("forward", [failing, without_mask])
def test_model_without_support_for_token_masks_is_scored_one_per_row(
    forward: Any, vlm: Transformers, examples: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    vlm.eval()
    assert vlm.sharing.plain
    batch = vlm.collator(examples)
    expected = plain(vlm, batch)
    MODEL["forward"] = vlm.base.forward
    with patch.object(vlm.base, "forward", forward):
        torch.testing.assert_close(vlm.score(batch).logprobs, expected)
    assert vlm.scoring.works is False
    assert "scored one per row" in capsys.readouterr().err


def test_the_comparison_draws_no_dropout_and_restores_modes(vlm: Transformers, examples: list[Example]) -> None:
    vlm.train()
    modes = [module.training for module in vlm.modules()]
    torch.manual_seed(0)
    first = vlm.score(vlm.collator(examples)).logprobs
    assert vlm.scoring.works
    assert [module.training for module in vlm.modules()] == modes
    torch.manual_seed(0)
    torch.testing.assert_close(vlm.score(vlm.collator(examples)).logprobs, first, atol=0, rtol=0)
    with evaluated(vlm.base):
        assert not any(module.training for module in vlm.base.modules())


def test_packing_is_not_decided_by_questions_that_share_no_prefix(vlm: Transformers, examples: list[Example]) -> None:
    """Three images with a completion each: whether rows can be packed is decided later."""
    vlm.eval()
    batch = vlm.collator([replace(example, completions=example.completions[:1]) for example in examples[::2]])
    vlm.score(batch)
    assert vlm.scoring.works is None
    both = vlm.collator(examples)
    torch.testing.assert_close(vlm.score(both).logprobs, plain(vlm, both), atol=1e-5, rtol=0)
    assert vlm.scoring.works


def test_same_image_with_other_pixel_values_is_not_shared(vlm: Transformers, examples: list[Example]) -> None:
    vlm.eval()
    batch = vlm.collator(examples[:2])
    batch.encodings[1] = {**batch.encodings[1], "pixel_values": -batch.encodings[1]["pixel_values"]}
    torch.testing.assert_close(vlm.score(batch).logprobs, plain(vlm, batch), atol=1e-5, rtol=0)
    assert vlm.scoring.works  # the two completions of a question share a row


def test_padding_does_not_contain_image_placeholders(vlm: Transformers, examples: list[Example]) -> None:
    """Rows of different lengths; a placeholder in their padding would have no image."""
    vlm.eval()
    batch = vlm.collator(examples)
    shown = torch.tensor(sorted(vlm.image_token_ids))
    for place, encoding in enumerate(batch.encodings):
        ids = encoding["input_ids"]
        first = int(torch.isin(ids[0], shown).nonzero()[0, 0])
        assert first > 0
        batch.encodings[place] = {
            name: value[:, first:] if value.shape == ids.shape else value for name, value in encoding.items()
        }
    torch.testing.assert_close(vlm.score(batch).logprobs, plain(vlm, batch), atol=1e-5, rtol=0)
    assert vlm.scoring.works


def test_scoring_keeps_no_tensors_after_a_batch(vlm: Transformers, examples: list[Example]) -> None:
    vlm.eval()
    for _ in range(2):
        vlm.score(vlm.collator(examples))
        assert vlm.scoring.last is None
        assert vlm.logit_transform is not None


def test_an_exception_restores_modes(
    vlm: Transformers, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.train()
    modes = [module.training for module in vlm.modules()]
    seen: list[bool] = []

    def fails(*_: Any, **__: Any) -> Any:
        seen.append(any(module.training for module in vlm.modules()))
        raise NotFiniteError("no number")

    monkeypatch.setattr(vlm, "decode", fails)
    monkeypatch.setattr(vlm, "score", fails)
    with pytest.raises(NotFiniteError):
        vlm.generate(vlm.collator(examples), Sampling(max_new_tokens=2), seed=0)
    assert [module.training for module in vlm.modules()] == modes
    with pytest.raises(NotFiniteRecordError):
        vlm.first_words(vlm.collator(examples))
    assert [module.training for module in vlm.modules()] == modes
    assert seen == [False, False]
