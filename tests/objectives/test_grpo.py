"""GRPO against a computation by hand, against the losses of TRL, and one row per group against one row per response."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import Hand, Run, bias_head, judged_by_hand
from torch import Tensor, nn

from safervlm.judging.classifier import Judge
from safervlm.objectives import GRPO
from safervlm.objectives.grpo import GroupRollout
from safervlm.records import Example, Question
from safervlm.vlm import packing
from safervlm.vlm.auto import Transformers
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA

TEMPERATURE, LENGTH, QUESTIONS, GROUP, MINI = 0.8, 7, 3, 4, 8
SETTINGS: dict[str, Any] = {
    "group_size": GROUP,
    "clip": 0.2,
    "clip_high": 0.25,
    "kl_coef": 0.3,
    "epochs": 2,
    "mini_batch_size": MINI,
    "micro_batch_size": 4,
    "temperature": TEMPERATURE,
    "response_length": LENGTH,
    "length_bonus": 1.5,
    "no_eos_penalty": -2.0,
    "max_grad_norm": 1e6,
    "lr": 0.02,
    "warmup_steps": 0,
}


@pytest.fixture
def make_grpo(
    llava: Callable[[], Llava], perturb: Callable[[nn.Module], None], tiny_judges: Path
) -> Callable[..., GRPO]:
    """``make_grpo(**settings)``: a GRPO with an effective adapter, whose responses often end early."""

    def make(vlm: Any = None, **settings: Any) -> GRPO:
        folder = tiny_judges / "alignment"
        judge = Judge(checkpoint=str(folder / "epoch_10.pt"), base=str(folder))
        grpo = GRPO(vlm or llava(), judge, **(SETTINGS | settings))
        grpo.configure_model()
        bias_head(grpo.vlm, {grpo.vlm.eos_token_ids[0]: 4.0})
        perturb(grpo)
        return grpo

    return make


@pytest.fixture
def run(
    make_grpo: Callable[..., GRPO], fit_rollouts: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """``run(**settings)``: fits one batch of three questions."""

    def run(judge: Callable[[Sequence[str]], Tensor] | None = None, **settings: Any) -> Run:
        grpo = make_grpo(**settings)
        if judge is not None:
            monkeypatch.setattr(grpo.judge, "judge", judge)
        return fit_rollouts(grpo, QUESTIONS)

    return run


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Checks that two gradients differ by a small part of their norm."""
    assert ours.keys() == theirs.keys()
    assert norm(theirs) > 1e-3
    assert norm({name: ours[name] - theirs[name] for name in ours}) < tolerance * norm(theirs)


def advantages_by_hand(kind: str, rewards: list[float]) -> list[float]:
    mean, size = sum(rewards) / len(rewards), len(rewards)
    if kind == "leave_one_out":
        return [reward - (sum(rewards) - reward) / (size - 1) for reward in rewards]
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (size - 1))
    return [(reward - mean) / (deviation + 1e-4 if kind == "group" else 1.0) for reward in rewards]


OPTIONS = [
    {},
    {"advantage": "centred", "average": "length", "kl_coef": 0.0, "clip_high": None},
    {"advantage": "leave_one_out", "ratio": "product", "kl": "reward"},
    {"ratio": "answer", "clip": 0.01, "clip_high": 0.02},
    {"average": "token"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())) or "default")
def test_rollout_and_updates_equal_the_reference_computation(
    options: dict[str, Any], run: Callable[..., Run], tiny_judges: Path
) -> None:
    done = run(**options)
    (rollout,), grpo = done.rollouts, done.objective
    rows = range(QUESTIONS * GROUP)
    lengths = [len(answer.token_ids) for answer in rollout.answers]
    stopped = [answer.token_ids[-1] == grpo.vlm.eos_token_ids[0] for answer in rollout.answers]
    assert len({answer.text for answer in rollout.answers}) > 5
    assert len(set(lengths)) > 2
    assert len(set(stopped)) == 2

    hand = Hand(grpo, TEMPERATURE)
    hand.load(done.steps.weights[0])
    with torch.no_grad():
        seen = [hand.tokens(rollout, row) for row in rows]
    labels = [question.answer for question in rollout.batch.questions]
    judged = [
        judged_by_hand(tiny_judges / "alignment", answer.text, label)
        for answer, label in zip(rollout.answers, labels, strict=True)
    ]
    earned = [
        (value - min(judged)) / (max(judged) - min(judged))
        + (0.0 if stopped[row] else SETTINGS["no_eos_penalty"])
        + SETTINGS["length_bonus"] * lengths[row] / LENGTH
        for row, value in enumerate(judged)
    ]
    kl = [sum(token["logprob"].item() - token["reference"] for token in tokens) for tokens in seen]
    kl_coef = grpo.kl_coef
    rewards = [earned[row] - (kl_coef * kl[row] if grpo.kl == "reward" else 0.0) for row in rows]
    advantages = []
    for start in range(0, len(rewards), GROUP):
        advantages += advantages_by_hand(grpo.advantage, rewards[start : start + GROUP])
    assert rollout.advantages.flatten().tolist() == pytest.approx(advantages, abs=1e-4)
    assert rollout.signal.all()

    generator = torch.Generator().manual_seed(done.orders[0])
    images = [[0, 1], [2]]  # the questions about each image
    orders = [[q for image in torch.randperm(2, generator=generator) for q in images[image]] for _ in range(2)]
    responses = [[question * GROUP + sample for question in order for sample in range(GROUP)] for order in orders]
    minis = [order[start : start + MINI] for order in responses for start in range(0, len(order), MINI)]
    assert len(done.steps.gradients) == len(minis) == 4
    old = [[token["logprob"].item() for token in tokens] for tokens in seen]
    low, high = 1 - grpo.clip, 1 + (grpo.clip if grpo.clip_high is None else grpo.clip_high)
    sums: dict[str, float] = defaultdict(float)
    total = 0.0
    for mini, weights, gradients in zip(minis, done.steps.weights, done.steps.gradients, strict=True):
        hand.load(weights)
        loss: Any = 0.0
        for row in mini:
            tokens, advantage, length = hand.tokens(rollout, row), advantages[row], lengths[row]
            ratios = [(token["logprob"] - before).exp() for token, before in zip(tokens, old[row], strict=True)]
            whole = math.prod(ratios, start=torch.ones(()))
            weight = {"answer": 1 / length, "token": 1.0, "length": 1 / LENGTH}[grpo.average]
            for token, each, before in zip(tokens, ratios, old[row], strict=True):
                ratio = {"token": each, "answer": whole ** (1 / length), "product": whole}[grpo.ratio]
                policy = torch.maximum(-ratio * advantage, -ratio.clamp(low, high) * advantage)
                away = token["reference"] - token["logprob"]
                k3 = away.exp() - 1 - away
                loss = loss + weight * (policy + (kl_coef * k3 if grpo.kl == "loss" else 0.0))
                sums["policy_loss"] += weight * policy.item()
                share = 1.0 if grpo.average == "token" else 1 / length
                sums["clip_fraction_low"] += share * (ratio.item() < low and advantage < 0)
                sums["clip_fraction_high"] += share * (ratio.item() > high and advantage > 0)
                moved = token["logprob"].item() - before
                sums["approx_kl"] += share * (math.exp(moved) - 1 - moved)
                if grpo.kl == "loss" and kl_coef:
                    sums["kl_loss"] += weight * k3.item()
        count = sum(lengths[row] for row in mini) if grpo.average == "token" else len(mini)
        total += count
        (loss / count).backward()
        assert_near(gradients, hand.gradients())
    assert sums["clip_fraction_low"] + sums["clip_fraction_high"] > 0

    expected = {name: value / total for name, value in sums.items()} | {
        "reward": np.mean(earned),
        "judged": np.mean(judged),
        "kl": np.mean(kl),
        "length": np.mean(lengths),
        "stopped": np.mean(stopped),
        "entropy": sum(token["entropy"].item() for tokens in seen for token in tokens) / sum(lengths),
        "no_signal": 0.0,
    }
    metrics = done.steps.metrics
    assert {name: metrics[f"train/{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def moved(make_grpo: Callable[..., GRPO], make_questions: Callable[[int], list[Question]]) -> Callable[..., Any]:
    """``moved(**settings)``: an objective whose policy has changed since its rollout, and the rollout."""

    def moved(**settings: Any) -> tuple[GRPO, GroupRollout]:
        grpo = make_grpo(**settings)
        grpo._trainer = SimpleNamespace(world_size=1)
        grpo.all_gather = lambda tensor: tensor[None]
        batch = grpo.collator([Example(question) for question in make_questions(QUESTIONS)])
        rollout = grpo.rollout(batch, seed=5)
        generator = torch.Generator().manual_seed(4)
        for parameter in trained(grpo).values():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
        return grpo, rollout

    return moved


def trained(grpo: GRPO) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in grpo.named_parameters() if parameter.requires_grad}


def loss_of(grpo: GRPO, rollout: GroupRollout) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a mini-batch of all responses, and its gradient."""
    loss = grpo.total(grpo.losses(rollout, torch.arange(len(rollout.answers)))) / grpo.summands(rollout.mask)
    parameters = trained(grpo)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


TRL = {
    "grpo": ({"loss_type": "grpo", "beta": 0.3}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"advantage": "centred", "average": "length", "kl_coef": 0.0}),
    "dapo": ({"loss_type": "dapo"}, {"average": "token", "kl_coef": 0.0}),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
        {"ratio": "answer", "clip": 0.03, "clip_high": 0.04, "kl_coef": 0.0},
    ),
    "rloo": ({}, {"advantage": "leave_one_out", "ratio": "product", "kl": "reward"}),
}


@pytest.mark.parametrize("name", TRL)
def test_grpo_loss_equals_trl_loss(name: str, moved: Callable[..., Any]) -> None:
    """TRL's own loss function, given the same log-probabilities."""
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer.utils import nanstd

    theirs, ours = TRL[name]
    grpo, rollout = moved(**ours)
    loss, gradients = loss_of(grpo, rollout)

    mask, groups = rollout.mask, rollout.rewards.view(-1, GROUP)
    advantages = groups - groups.mean(-1, keepdim=True)
    if name == "rloo":
        advantages = groups - (groups.sum(-1, keepdim=True) - groups) / (GROUP - 1)
    elif name != "dr_grpo":
        advantages = advantages / (nanstd(groups, dim=1)[:, None] + 1e-4)
    rows = rollout.batch.select(torch.arange(len(rollout.answers)), [answer.token_ids for answer in rollout.answers])
    logprobs = grpo.vlm.score(rows, sampling=grpo.sampling).logprobs
    settings = {
        "loss_type": "grpo",
        "beta": 0.0,
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.25,
        "max_completion_length": LENGTH,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(num_processes=1, reduce=lambda t, reduction: t, gather=lambda t: t),
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None),
    }
    trainer = SimpleNamespace(**(settings | theirs))
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages.flatten(),
        "old_per_token_logps": rollout.logprobs,
        "ref_per_token_logps": rollout.reference,
        "old_logps": rollout.logprobs.sum(-1),
        "num_items_in_batch": mask.sum(),
    }
    expected = (RLOOTrainer if name == "rloo" else GRPOTrainer)._compute_loss(trainer, trainer.model, inputs)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    parameters = trained(grpo)
    found = torch.autograd.grad(expected, list(parameters.values()))
    assert_near(gradients, dict(zip(parameters, found, strict=True)))
    clipped = [value for metric, (value,) in trainer._metrics["train"].items() if metric.endswith("region_mean")]
    assert clipped[0] > 0


def test_a_group_in_one_row_equals_one_row_per_response(
    moved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grpo, together = moved()
    loss, gradients = loss_of(grpo, together)
    every = torch.arange(QUESTIONS * GROUP)
    assert len(together.select(every).packed.input_ids) <= QUESTIONS
    monkeypatch.setattr(packing, "ROW", 1)
    alone_grpo, alone = moved()
    assert len(alone.select(every).packed.input_ids) == QUESTIONS * GROUP
    assert [answer.token_ids for answer in together.answers] == [answer.token_ids for answer in alone.answers]
    for name in ("logprobs", "reference", "advantages"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), atol=1e-5, rtol=0, msg=name)
    expected_loss, expected = loss_of(alone_grpo, alone)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    assert_near(gradients, expected)


def test_packed_rows_hold_at_most_the_maximum_number_of_responses(
    moved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ROW", 3)
    grpo, rollout = moved()
    rows = rollout.select(torch.tensor([4, 5, 6, 7, 0, 1, 2])).packed
    assert rows.rows.tolist() == [0, 0, 1, 1, 2, 2, 2]  # the two questions are about one image
    assert rows.questions.tolist() == [0, 2, 4]
    whole = grpo.vlm.score(rollout.select(torch.arange(8)), sampling=grpo.sampling).logprobs
    some = grpo.vlm.score(rollout.select(torch.tensor([4, 5, 6, 7, 0, 1, 2])), sampling=grpo.sampling).logprobs
    torch.testing.assert_close(some, whole[[4, 5, 6, 7, 0, 1, 2], : some.shape[1]], atol=1e-5, rtol=0)


def test_step_encodes_each_image_once_and_each_prompt_once_per_pass(
    make_grpo: Callable[..., GRPO], fit_rollouts: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation, policy, reference and two epochs of updates; a prompt's last token is not shared in generation."""
    grpo = make_grpo(mini_batch_size=QUESTIONS * GROUP, micro_batch_size=GROUP)
    images, prompt_tokens = [], []
    encode, forward = grpo.vlm.encode_images, grpo.vlm.forward_packed

    def counted_encode(pixel_values: Tensor) -> Tensor:
        images.append(len(pixel_values))
        return encode(pixel_values)

    def counted_forward(rows: Any, *args: Any) -> Tensor:
        prompt_tokens.append(int((rows.segments == 0).sum()))
        return forward(rows, *args)

    monkeypatch.setattr(grpo.vlm, "encode_images", counted_encode)
    monkeypatch.setattr(grpo.vlm, "forward_packed", counted_forward)
    (rollout,) = fit_rollouts(grpo, QUESTIONS).rollouts
    assert sum(images) == len(rollout.batch.pixel_values) == len(set(rollout.batch.image_rows.tolist()))
    prompts = sum(map(len, rollout.batch.prompt_ids)) // GROUP
    assert sum(prompt_tokens[1:]) == prompts * (2 + 2)
    assert prompt_tokens[0] <= prompts - QUESTIONS


@pytest.fixture
def any_model(tiny_llava: Path) -> Transformers:
    """The tiny LLaVA as any model of transformers."""
    return Transformers(
        str(tiny_llava),
        dtype="float32",
        lora=LoRA(r=4, alpha=8, dropout=0.0),
        template="A chat. USER: <image>\n{question} ASSISTANT:",
    )


def test_any_model_is_trained(make_grpo: Callable[..., GRPO], fit_rollouts: Callable[..., Run], any_model: Any) -> None:
    done = fit_rollouts(make_grpo(vlm=any_model), 2)
    (rollout,) = done.rollouts
    assert len({answer.text for answer in rollout.answers[:GROUP]}) > 1
    assert norm(done.steps.gradients[0]) > 1e-3


@pytest.mark.parametrize("kind", ["packed", "any"])
def test_a_sample_has_its_own_noise(
    kind: str, make_grpo: Callable[..., GRPO], make_questions: Callable[[int], list[Question]], any_model: Any
) -> None:
    grpo = make_grpo(vlm=any_model if kind == "any" else None)
    examples = [Example(question) for question in make_questions(2)]

    def texts(batch: Any) -> list[str]:
        return [answer.text for answer in grpo.vlm.generate(batch, grpo.sampling, seed=3)]

    single, repeated = grpo.collator(examples), grpo.collator(examples).repeat(GROUP)
    assert repeated.samples == [0, 1, 2, 3] * 2
    assert [question.id for question in repeated.questions[:: GROUP - 1]] == [
        examples[number].question.id for number in (0, 0, 1)
    ]
    several = texts(repeated)
    assert several[::GROUP] == texts(single)  # the first sample is the one of a batch without groups
    assert len(set(several)) > GROUP
    order = torch.tensor([6, 1, 3])
    assert texts(repeated.select(order)) == [several[row] for row in order]
    assert repeated.noise_keys(3)[:GROUP:3] == [
        single.noise_keys(3)[0],
        grpo.collator(examples[:1]).repeat(4).noise_keys(3)[3],
    ]


def test_the_micro_batch_changes_nothing(run: Callable[..., Run]) -> None:
    whole, *others = (run(micro_batch_size=size) for size in (12, 4, 3))
    for other in others:
        assert other.rollouts[0].answers == whole.rollouts[0].answers
        for ours, theirs in zip(other.steps.gradients, whole.steps.gradients, strict=True):
            assert_near(ours, theirs, 1e-3)
        assert other.steps.metrics == pytest.approx(whole.steps.metrics, abs=1e-4)


def test_process_with_fewer_responses_takes_part_in_every_backward_pass(
    make_grpo: Callable[..., GRPO], fit_rollouts: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = fit_rollouts(make_grpo(), QUESTIONS)
    grpo = make_grpo()
    monkeypatch.setattr(grpo, "all_gather", lambda t: t[None] if t.is_floating_point() else torch.stack([t, t + 2]))
    backward, passes = grpo.backward_part, []

    def counted(loss: Tensor, last: bool) -> None:
        passes.append(last)
        backward(loss, last)

    monkeypatch.setattr(grpo, "backward_part", counted)
    beside = fit_rollouts(grpo, QUESTIONS)  # another process has two passes more
    assert passes == [False, False, False, True, False, False, True] * 2
    for ours, theirs in zip(beside.steps.gradients, alone.steps.gradients, strict=True):
        assert_near(ours, theirs, 1e-5)
    assert beside.steps.metrics == pytest.approx(alone.steps.metrics, abs=1e-6)


def judge_of(rows: set[int]) -> Callable[[Sequence[str]], Tensor]:
    """A judge that gives the responses of some rows different scores, and the others the same."""

    def judge(texts: Sequence[str]) -> Tensor:
        scores = [-1.0 - (row if row in rows else 0.0) for row in range(len(texts))]
        return torch.tensor(scores)[:, None].expand(-1, 3)

    return judge


def test_groups_with_equal_rewards_are_skipped_without_effect(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = {"no_eos_penalty": 0.0, "length_bonus": 0.0, "kl_coef": 0.0, "mini_batch_size": QUESTIONS * GROUP}
    judge = judge_of({4, 5, 6, 7})  # the second question's
    scored: list[int] = []
    losses = GRPO.losses

    def counted(self: GRPO, rollout: GroupRollout, rows: Tensor) -> dict[str, Tensor]:
        scored.extend(rows.tolist())
        return losses(self, rollout, rows)

    monkeypatch.setattr(GRPO, "losses", counted)
    some = run(judge=judge, **alike)
    assert scored == [4, 5, 6, 7] * 2
    assert some.steps.metrics["train/no_signal"] == pytest.approx(2 / 3)
    monkeypatch.setattr(GRPO, "used", lambda self, rollout, rows: rows)
    every = run(judge=judge, **alike)
    assert len(scored) == 8 + 2 * QUESTIONS * GROUP
    for ours, theirs in zip(some.steps.gradients, every.steps.gradients, strict=True):
        assert_near(ours, theirs)


def test_equal_rewards_in_all_groups_give_zero_gradients(run: Callable[..., Run]) -> None:
    done = run(judge=judge_of(set()), no_eos_penalty=0.0, length_bonus=0.0)
    assert done.steps.metrics["train/no_signal"] == 1.0
    assert done.steps.metrics["train/policy_loss"] == 0.0
    assert all(norm(gradients) == 0.0 for gradients in done.steps.gradients)
    assert all(math.isfinite(value) for value in done.steps.metrics.values())
