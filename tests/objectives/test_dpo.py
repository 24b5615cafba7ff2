"""Direct preference optimisation against TRL's trainer, and the cached reference."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trl_oracle import LR, STEPS, train_with_trl

from safervlm.errors import RecordError
from safervlm.objectives import DPO
from safervlm.records import Example
from safervlm.vlm.llava import Llava
from safervlm.vlm.local import LocalVLM


@pytest.fixture
def make_dpo(llava: Callable[[], Llava], perturb: Callable[[nn.Module], None]) -> Callable[..., DPO]:
    def make(**settings: float) -> DPO:
        dpo = DPO(llava(), lr=LR, warmup_steps=0, **settings)  # type: ignore[arg-type]
        dpo.configure_model()
        perturb(dpo)
        return dpo

    return make


@pytest.mark.parametrize("rpo_alpha", [0.0, 0.7])
def test_three_dpo_steps_equal_trl(
    rpo_alpha: float, make_dpo: Callable[..., DPO], pairs: list[Example], fit: Callable[..., Any], tmp_path: Path
) -> None:
    dpo = make_dpo(beta=0.3, rpo_alpha=rpo_alpha)
    batch = dpo.collator(pairs)
    loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, rpo_alpha]} if rpo_alpha else {}
    oracle = train_with_trl(dpo.vlm, pairs, tmp_path, beta=0.3, **loss)

    # TRL places all chosen sequences before all rejected ones.
    packed = batch.packed
    assert packed is not None
    answers = [row[keep].tolist() for row, keep in zip(packed.target, packed.mask, strict=True)]
    assert oracle.sequences(oracle.batch["completion_mask"]) == answers[0::2] + answers[1::2]
    assert oracle.sequences() == [
        prompt + answer
        for number in (0, 1)
        for prompt, answer in zip(batch.prompt_ids, answers[number::2], strict=True)
    ]
    assert min(len({len(answer) for answer in answers[number::2]}) for number in (0, 1)) > 3

    steps = fit(dpo, [batch], epochs=STEPS)
    assert abs(steps.losses[0] - math.log(2)) > 1e-2
    oracle.assert_equal(steps, dpo.vlm)


def test_the_first_loss_is_ln_2(llava: Callable[[], Llava], pairs: list[Example], fit: Callable[..., Any]) -> None:
    """Before the first step the policy is the reference."""
    dpo = DPO(llava())
    assert fit(dpo, [dpo.collator(pairs)]).losses == pytest.approx([math.log(2)], abs=1e-6)


@pytest.fixture
def reference_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of each batch that the reference model scores."""
    calls: list[list[str]] = []
    score = LocalVLM.score

    def counted(self: LocalVLM, batch: Any, adapter: Any = "policy", **kwargs: Any) -> Any:
        if adapter == "reference":
            calls.append([question.id for question in batch.questions])
        return score(self, batch, adapter, **kwargs)

    monkeypatch.setattr(LocalVLM, "score", counted)
    return calls


def test_reference_log_probabilities_are_computed_once(
    make_dpo: Callable[..., DPO],
    pairs: list[Example],
    fit: Callable[..., Any],
    reference_calls: list[list[str]],
    tmp_path: Path,
) -> None:
    dpo = make_dpo()
    parts = [pairs[:2], pairs[2:]]
    fit(dpo, map(dpo.collator, parts), epochs=3)
    assert reference_calls == [[example.question.id for example in part] for part in parts]
    assert dpo.trainer.global_step == 6
    dpo.trainer.save_checkpoint(tmp_path / "third.ckpt")

    # Resumed, in another order: nothing is scored again, and the numbers are identical.
    reference_calls.clear()
    resumed = make_dpo()
    shuffled = [[pairs[4], pairs[0], pairs[2]], [pairs[3], pairs[1]]]
    fit(resumed, map(resumed.collator, shuffled), epochs=4, ckpt_path=tmp_path / "third.ckpt")
    assert resumed.trainer.global_step == 8
    assert reference_calls == []
    assert resumed.reference == dpo.reference


def test_cached_reference_log_probabilities_equal_those_of_a_fresh_model(
    make_dpo: Callable[..., DPO], llava: Callable[[], Llava], pairs: list[Example], fit: Callable[..., Any]
) -> None:
    dpo = make_dpo()
    fit(dpo, [dpo.collator(pairs)], epochs=2)
    fresh = llava()
    fresh.load()  # no adapter at all
    for example in pairs:
        batch = fresh.collator([Example(example.question)])
        expected = []
        for completion in example.completions:
            answer = fresh.collator.completion_ids(completion)
            ids = torch.tensor([batch.prompt_ids[0] + answer])
            with torch.no_grad():
                logits = fresh.base(input_ids=ids, pixel_values=batch.pixel_values).logits[0, -len(answer) - 1 : -1]
            expected.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().item())
        assert dpo.reference[example.question.id] == pytest.approx(expected, abs=1e-4)
        assert abs(expected[0] - expected[1]) > 1


def test_a_checkpoint_of_another_adapter_is_rejected(
    make_dpo: Callable[..., DPO],
    llava: Callable[[], Llava],
    pairs: list[Example],
    fit: Callable[..., Any],
    tmp_path: Path,
) -> None:
    dpo = make_dpo()
    fit(dpo, [dpo.collator(pairs)])
    dpo.trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    again = DPO(llava())
    again.vlm.lora = replace(again.vlm.lora, target_modules=r".*language_model.*\.q_proj", min_coverage=0.0)
    with pytest.raises(RecordError, match=r"--ckpt_path: .* 24 weights don't fit"):
        fit(again, [again.collator(pairs)], epochs=2, ckpt_path=tmp_path / "one.ckpt")
