"""Promise 2, training: non-finite numbers stop it and are never exported; checkpoints are verified."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.adapter_export import AdapterExport
from callbacks.checkpoint import LastCheckpoint
from safervlm.errors import UserError
from safervlm.finite import SKIPPED_IN_A_ROW, NotFiniteError, TrainingGuard
from safervlm.io.seals import differences, origin_of, seal_file, seal_folder, verify_seal
from safervlm.judging.classifier import Judge
from safervlm.objectives import DPO, PPO, SFT
from safervlm.objectives.base import Objective
from safervlm.records import Example, Question
from safervlm.vlm.adapters import adapter_fingerprint
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA

Make = Callable[[int], list[Question]]
NAN = float("nan")


class Plain(Objective):
    """A custom objective, which overrides hooks without calling the base class."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.vlm.score(batch).logprobs.mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass

    def on_before_backward(self, loss: Tensor) -> None:
        pass


@pytest.fixture
def objective(tiny_llava: Path, tiny_judges: Path) -> Callable[[str], Objective]:
    def make(name: str, **settings: Any) -> Objective:
        vlm = Llava(str(tiny_llava), dtype="float32", lora=LoRA(r=2, alpha=4, dropout=0.0), system="")
        settings = {"lr": 0.01, "warmup_steps": 0} | settings
        if name == "PPO":
            folder = tiny_judges / "alignment"
            judge = Judge(str(folder / "epoch_10.pt"), base=str(folder))
            return PPO(vlm, judge, response_length=4, mini_batch_size=1, **settings)
        return {"SFT": SFT, "DPO": DPO, "Plain": Plain}[name](vlm, **settings)

    return make


@pytest.fixture
def fit(tmp_path: Path, make_questions: Make) -> Callable[..., L.Trainer]:
    """``fit(objective, *callbacks)``: four batches of two, with the shipped callbacks, into tmp_path."""

    def run(module: Objective, *callbacks: L.Callback, ckpt_path: Path | None = None, **settings: Any) -> L.Trainer:
        given = {0: (), 1: ("No.",), 2: ("No.", "Yes, it is.")}[module.completions]
        examples = [Example(question, given) for question in make_questions(8)]
        batches = [module.collator(examples[start : start + 2]) for start in range(0, 8, 2)]
        trainer = L.Trainer(
            **{"max_epochs": 1} | settings,
            accelerator="cpu",
            callbacks=[AdapterExport(), LastCheckpoint(1), *callbacks],  # export first: the order must not matter
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


class PoisonWeight(L.Callback):
    """Sets a trained weight to a value before a batch."""

    def __init__(self, batch: int, number: float) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            weight = next(p for n, p in pl_module.named_parameters() if p.requires_grad and "lora_B" in n)
            weight.data.view(-1)[0] = self.number


class PoisonGradient(L.Callback):
    """Sets a gradient to a value after the backward pass of some batches."""

    def __init__(self, batches: tuple[int, ...], number: float) -> None:
        self.batches, self.number = batches, number

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.epoch_loop.batch_idx in self.batches:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = self.number


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("name", ["SFT", "DPO", "PPO", "Plain"])
@pytest.mark.parametrize("kind", [PoisonWeight, PoisonGradient], ids=["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_every_objective(
    kind: type[L.Callback], name: str, number: float, objective, fit, tmp_path: Path
) -> None:
    module = objective(name)
    where: Any = 2 if kind is PoisonWeight else (2,)
    with pytest.raises(UserError, match="not finite") as caught:
        fit(module, kind(where, number))
    assert "\n" not in str(caught.value)
    if kind is PoisonGradient:
        step = {"PPO": 5}.get(name, 3)  # of a rollout of two answers, two optimizer steps
        assert f"at optimizer step {step}" in str(caught.value)
    assert not (tmp_path / "adapter").exists()
    last = tmp_path / "checkpoints" / "last.ckpt"
    verify_seal(last, origin_of(module))
    state = torch.load(last, weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    assert fit(objective(name), ckpt_path=last).global_step == (8 if name == "PPO" else 4)  # still usable
    assert (tmp_path / "adapter" / "safervlm.json").is_file()


class PoisonOutput(L.Callback):
    """Sets something that PPO computes in a rollout to NaN."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx != 2:
            return
        if self.where == "judge":
            read = pl_module.judge.judge
            pl_module.judge.judge = lambda texts: read(texts).fill_(NAN)
        elif self.where == "weights of the judge":
            pl_module.judge.classifier.weight.data[0, 0] = NAN
        elif self.where == "values":
            pl_module.value_head.weight.data[0, 0] = NAN
        else:
            pl_module.vlm.base.get_output_embeddings().weight.data.fill_(NAN)


@pytest.mark.parametrize("where", ["judge", "weights of the judge", "values", "logits"])
def test_non_finite_rollout_output_names_the_step_and_a_remedy(where: str, objective, fit, tmp_path: Path) -> None:
    """Two rollouts of two optimizer steps each precede the one that fails."""
    with pytest.raises(UserError) as caught:
        fit(objective("PPO"), PoisonOutput(where))
    said = str(caught.value)
    assert "\n" not in said
    assert "finite" in said
    assert "at optimizer step 5, batch 3; " in said
    assert (
        said.count("nothing of this step is kept, checkpoints/last.ckpt stays usable if there is one; lower model.lr")
        == 1
    )
    assert {"judge": "judge", "weights of the judge": "judge", "values": "value", "logits": "logits"}[where] in said
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_non_finite_logits_in_training_name_the_step(name: str, objective, fit, monkeypatch, tmp_path: Path) -> None:
    module = objective(name)

    def broken(batch, batch_idx):
        raise NotFiniteError("vlm: the logits are not finite")

    monkeypatch.setattr(module, "training_step", broken)
    with pytest.raises(NotFiniteError, match=r"at optimizer step 1, batch 1; nothing of this step is kept"):
        fit(module)


def test_weights_that_became_non_finite_are_neither_saved_nor_exported(objective, fit, tmp_path: Path) -> None:
    class BreakAfter(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                next(p for n, p in pl_module.named_parameters() if p.requires_grad).data.fill_(NAN)

    with pytest.raises(NotFiniteError, match=r"the trained weight vlm.*lora_A.* is not finite"):
        fit(objective("SFT"), BreakAfter())
    assert not (tmp_path / "adapter").exists()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


class Scaling:
    """The part of the float16 precision plugin that the guard uses."""

    scaler = object()


@pytest.mark.parametrize(("run", "stops"), [(1, False), (SKIPPED_IN_A_ROW - 1, False), (SKIPPED_IN_A_ROW, True)])
def test_loss_scaler_may_skip_only_a_limited_number_of_steps_in_a_row(
    run: int, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, weight = TrainingGuard(), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    monkeypatch.setattr(type(trainer), "precision_plugin", Scaling(), raising=False)

    def step(number: float) -> None:
        guard.on_before_backward(trainer, None, torch.tensor(1.0))
        weight.grad = torch.tensor([1.0, number, 1.0])
        guard.on_before_optimizer_step(trainer, None, optimizer)

    for _ in range(3):  # skipped steps count only if they are consecutive
        for _ in range(run - 1):
            step(NAN)
        step(1.0)
    for _ in range(run - 1):
        step(NAN)
    if stops:
        with pytest.raises(NotFiniteError, match=f"skipped {SKIPPED_IN_A_ROW} optimizer steps in a row"):
            step(NAN)
    else:
        step(NAN)
    guard.on_before_backward(trainer, None, torch.tensor(NAN))
    with pytest.raises(NotFiniteError, match="the loss is not finite"):  # a loss is never skipped
        guard.on_before_optimizer_step(trainer, None, optimizer)


@pytest.mark.parametrize(
    "settings",
    [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}, {"limit_train_batches": 0.0}],
    ids=str,
)
def test_zero_steps_train_nothing(settings: dict[str, Any], objective, fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trains nothing|nothing was trained") as caught:
        fit(objective("SFT"), **settings)
    assert "trainer" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_a_learning_rate_too_small_to_change_anything_exports_nothing(objective, fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the adapter is as it was at the start") as caught:
        fit(objective("SFT", lr=1e-45))
    assert "model.lr" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_a_complete_run_that_is_started_again_exports_again(objective, fit, tmp_path: Path) -> None:
    fit(objective("SFT"))
    before = adapter_fingerprint(str(tmp_path / "adapter"))
    shutil.rmtree(tmp_path / "adapter")
    fit(objective("SFT"), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert adapter_fingerprint(str(tmp_path / "adapter")) == before


# Checkpoints

ORIGIN = {"class": "a.B", "lr": 0.1, "vlm": {"model": "m", "weights": "1" * 16, "dtype": "float32"}, "lora": {"r": 4}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    content = {
        "state_dict": {"w": torch.arange(50.0)},
        "epoch": 1,
        "trained": ["w"],
        "loops": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(50)}}}],
        "lr_schedulers": [],
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, tmp_path / "last.ckpt")
    seal_file(tmp_path / "last.ckpt", ORIGIN)
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)  # torch can load a sealed file
    assert torch.equal(loaded["state_dict"]["w"], content["state_dict"]["w"])
    verify_seal(tmp_path / "last.ckpt", ORIGIN)
    return tmp_path / "last.ckpt"


def test_one_flipped_bit_anywhere_is_rejected(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        checkpoint.write_bytes(damaged)
        with pytest.raises(UserError, match=r"--ckpt_path: .* is damaged") as caught:
            verify_seal(checkpoint, ORIGIN)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "of version 0.1"])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99], ids=str)
def test_truncated_checkpoint_is_rejected(kept: float, seal: bool, checkpoint: Path) -> None:
    if not seal:
        torch.save(torch.load(checkpoint, weights_only=True), checkpoint)
        verify_seal(checkpoint, ORIGIN)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(kept if isinstance(kept, int) else kept * len(content))])
    with pytest.raises(UserError, match=r"--ckpt_path: .* is (damaged|empty)"):
        verify_seal(checkpoint, ORIGIN)


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {}}, torch.ones(3), print], ids=["list", "dict", "tensor", "code"]
)
def test_file_that_is_not_a_checkpoint_is_rejected(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"--ckpt_path: .*not a checkpoint") as caught:
        verify_seal(tmp_path / "x.ckpt", ORIGIN)
    assert "\n" not in str(caught.value)


OTHER = {
    "objective": ({"class": "a.C", "beta": 1}, "model.class: 'a.B' there, 'a.C' now"),
    "rank": ({"lora": {"r": 8}}, "model.lora.r: 4 there, 8 now"),
    "base": ({"vlm": ORIGIN["vlm"] | {"weights": "2" * 16}}, "model.vlm.weights: "),
    "learning rate": ({"lr": 0.2}, "model.lr: 0.1 there, 0.2 now"),
    "a new setting": ({"beta": 0.5}, "model.beta: None there, 0.5 now"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_of_other_settings_is_rejected(case: str, checkpoint: Path) -> None:
    settings, message = OTHER[case]
    with pytest.raises(UserError) as caught:
        verify_seal(checkpoint, ORIGIN | settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_location_of_the_base_model_is_not_compared_if_its_weights_are_known() -> None:
    assert not differences(ORIGIN, ORIGIN | {"vlm": ORIGIN["vlm"] | {"model": "elsewhere/m"}})
    assert not differences(ORIGIN, ORIGIN | {"lr": 3}, ignore=["lr"])
    unknown = ORIGIN["vlm"] | {"weights": None}
    assert differences(ORIGIN | {"vlm": unknown}, ORIGIN | {"vlm": unknown | {"model": "n"}})


def test_a_sharded_checkpoint_is_verified_file_by_file(tmp_path: Path) -> None:
    def write() -> Path:
        folder = tmp_path / "last.ckpt"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoint").mkdir(parents=True)
        for name in ("checkpoint/rank_0.pt", "checkpoint/rank_1.pt", "latest"):
            (folder / name).write_bytes(name.encode() * 100)
        seal_folder(folder, ORIGIN)
        verify_seal(folder, ORIGIN)
        return folder

    for name in ("checkpoint/rank_1.pt", "latest", "safervlm.json"):
        file = write() / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            verify_seal(tmp_path / "last.ckpt", ORIGIN)
    (write() / "checkpoint" / "rank_0.pt").unlink()
    with pytest.raises(UserError, match=r"rank_0\.pt is missing"):
        verify_seal(tmp_path / "last.ckpt", ORIGIN)
    with pytest.raises(UserError, match=r"model\.lora\.r"):
        verify_seal(write(), ORIGIN | {"lora": {"r": 8}})
