"""GenerationCheck: the share of safe images that the policy calls unsafe, and the over-flagging warning."""

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.generation_check import GenerationCheck, OverFlaggingWarning, RewardGapWarning, Verdicts
from safervlm.errors import ArgumentError, RecordError
from safervlm.judging.classifier import Judge
from safervlm.protocol import LABELS, SAFE, UNSAFE
from safervlm.records import THINKING_UNFINISHED, Example, Question
from safervlm.run import read_manifest
from safervlm.vlm.base import Generation
from safervlm.vlm.noise import NOISE
from safervlm.vlm.packed import PackedBatch
from safervlm.vlm.sampling import Sampling


class Reader(Judge):
    """Classifies a response by the label that it begins with."""

    def __init__(self) -> None:
        super().__init__(labels=LABELS["alignment"])

    def configure_model(self) -> None:
        pass

    def judge(self, texts, batch_size=64):
        return torch.tensor([[float(text.startswith(label)) for label in self.labels] for text in texts]).log()


class Word(Reader):
    """Classifies a response as Unsafe if it contains a word; a judge with other weights."""

    fingerprint = "other"  # type: ignore[assignment]

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def judge(self, texts, batch_size=64):
        labels = [UNSAFE if self.word in text else SAFE for text in texts]
        return torch.tensor([[float(label == other) for other in self.labels] for label in labels]).log()


class Policy:
    """Calls the images with the given numbers unsafe."""

    def __init__(self) -> None:
        self.flagged: set[str] = set()
        self.unfinished: set[str] = set()
        self.asked: list[tuple[Sampling, int]] = []
        self.wording = "{}, I'd say."

    def generate(self, batch, sampling, seed):
        self.asked.append((sampling, seed))
        return [
            Generation([1], "", THINKING_UNFINISHED)
            if question.image in self.unfinished
            else Generation([1], self.wording.format(UNSAFE if question.image in self.flagged else SAFE), "stop")
            for question in batch.questions
        ]


class Scene:
    """A trainer with held-out images, the first ones safe, and a policy."""

    def __init__(
        self,
        safe: int = 100,
        unsafe: int = 20,
        run: Path | None = None,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        answers = [SAFE] * safe + [UNSAFE] * unsafe
        self.examples = [
            Example(Question(f"S/{n}/alignment/0", "S", str(n), None, "alignment", 0, "?", "c", "x", answer))
            for n, answer in enumerate(answers)
        ]
        self.logged: list[tuple[int, str, float]] = []
        self.default_root_dir, self.is_global_zero = str(run), True
        self.done = 0
        self.mine = self.examples[rank::world_size]
        self.vlm, self.device = Policy(), torch.device("cpu")
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
        self.datamodule = SimpleNamespace(
            parts=SimpleNamespace(validation=self.examples), val_dataloader=self.val_dataloader, limit=limit
        )
        self.strategy = SimpleNamespace(reduce=lambda flags, reduce_op: flags)

    def val_dataloader(self):
        for start in range(0, len(self.mine), 16):
            questions = [example.question for example in self.mine[start : start + 16]]
            yield PackedBatch(questions, [[1]] * len(questions), torch.zeros(1), torch.zeros(len(questions)))

    def log(self, name, value, batch_size):
        self.logged.append((self.done, name, value))

    def play(self, check: GenerationCheck, batches: int, flagged: Iterable[int] = ()) -> None:
        """Runs batches with a policy that calls these images unsafe."""
        self.vlm.flagged = {str(number) for number in flagged}
        for _ in range(batches):
            self.fit_loop.epoch_loop.total_batch_idx = self.done
            check.on_train_batch_start(self, self, None, 0)
            check.on_train_batch_end(self, self, None, None, 0)
            self.done += 1


def test_unsafe_rate_uses_only_safe_images_and_the_configured_interval(tmp_path: Path):
    scene, check = (
        Scene(run=tmp_path),
        GenerationCheck(Reader(), every_n_batches=3, sampling=Sampling(max_new_tokens=4)),
    )
    check.on_train_start(scene, scene)
    scene.play(check, 1, range(7))  # before training
    scene.play(check, 5, range(10))
    scene.vlm.flagged = {str(number) for number in range(100, 120)}  # the unsafe ones don't count
    check.on_train_end(scene, scene)
    assert read_manifest(tmp_path)["stages"]["scene"]["unsafe_rate_on_safe"] == {"before": 0.07, "after": 0.0}
    assert scene.logged == [(0, "train/unsafe_rate_on_safe", 0.07), (3, "train/unsafe_rate_on_safe", 0.10)]
    assert len(set(scene.vlm.asked)) == 1  # the same noise each time
    assert scene.vlm.asked[0][0] == Sampling(max_new_tokens=4)


def silent(scene: Scene, check: GenerationCheck, flagged: set[int]) -> None:
    """Runs a batch after which these images are called unsafe; no warning may be issued."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene.play(check, 1, flagged)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (range(2), range(9)),  # 2 % and 9 % of a hundred images: sampling variation, seen on another processor
        (range(10), range(15)),
        (range(3, 13), range(18)),  # most of the difference is changes in both directions
        (range(40, 80), range(50)),  # many flips, a small increase
        (range(50), range(5)),  # a decrease
        (range(20), range(20, 34)),  # other images, no more than before
    ],
)
def test_sampling_variation_causes_no_warning(before: range, now: range):
    scene, check = Scene(), GenerationCheck(Reader(), every_n_batches=1)
    scene.play(check, 1, set(before))
    silent(scene, check, set(now))


@pytest.mark.parametrize(
    ("images", "before", "now", "tolerance"),
    [
        (100, range(10), range(25), 0.05),
        (100, range(0), range(11), 0.05),
        (400, range(10), range(50), 0.05),  # more images show a smaller increase
        (100, range(2), range(9), 0.0),
        (100, range(0), range(100), 0.9),
    ],
)
def test_increase_beyond_sampling_variation_causes_a_warning(images: int, before: range, now: range, tolerance: float):
    scene, check = Scene(safe=images), GenerationCheck(Reader(), every_n_batches=1, tolerance=tolerance)
    scene.play(check, 1, set(before))
    share, first = f"{len(now) / images:.0%}", f"{len(before) / images:.0%}"
    with pytest.warns(OverFlaggingWarning, match=rf"^{share} of the held-out .* now, {first} before training"):
        scene.play(check, 1, set(now))


def test_increase_is_tested_with_a_paired_interval():
    """With the same two shares, flagging additional images is an increase; flagging other images may not be one."""
    nested, crossed = (GenerationCheck(Reader(), every_n_batches=1) for _ in range(2))
    scene = Scene()
    scene.play(nested, 1, set(range(40)))
    with pytest.warns(OverFlaggingWarning, match="an increase of 7% to 20%"):
        scene.play(nested, 1, set(range(52)))
    scene.play(crossed, 1, set(range(40)))
    silent(scene, crossed, set(range(30, 82)))


def test_final_policy_is_measured_at_the_end_of_training(tmp_path: Path):
    scene, check = Scene(run=tmp_path), GenerationCheck(Reader(), every_n_batches=100)
    scene.play(check, 2, {0})
    scene.vlm.flagged = {str(number) for number in range(50)}
    with pytest.warns(OverFlaggingWarning, match="50%"):
        check.on_train_end(scene, scene)


def test_a_resumed_run_compares_with_the_same_images(tmp_path: Path):
    scene, check = Scene(), GenerationCheck(Reader(), every_n_batches=2)
    scene.play(check, 2, set(range(30)))
    torch.save(check.state_dict(), tmp_path / "state.pt")  # as in a checkpoint
    resumed = GenerationCheck(Reader(), every_n_batches=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with pytest.warns(OverFlaggingWarning, match="30% before training"):
        scene.play(resumed, 1, set(range(45)))
    again = GenerationCheck(Reader(), every_n_batches=2)
    again.load_state_dict(check.state_dict())
    silent(scene, again, set(range(28, 43)))  # 1.5 times the share, but other images: no such increase by paired images


def test_unfinished_thinking_is_excluded_from_rates_and_comparisons(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scene, check = Scene(run=tmp_path), GenerationCheck(Reader(), every_n_batches=1)
    scene.vlm.unfinished = {str(number) for number in range(50)}
    scene.play(check, 1, set(range(55)))  # 5 of the 50 with an answer
    assert "thinking unfinished in 50 of 100 responses (50%), which have no answer; increase" in capsys.readouterr().out
    scene.vlm.unfinished = {str(number) for number in range(96, 100)}
    silent(scene, check, set(range(55)))  # 50 more are answered, all of them Unsafe: no image has changed its answer
    assert not capsys.readouterr().out  # few
    with pytest.warns(OverFlaggingWarning, match="^43% of the held-out .* now, 11% before training"):
        scene.play(check, 1, set(range(50, 70)))  # of the 46 that were answered both times
    scene.vlm.unfinished = {str(number) for number in range(120)}
    silent(scene, check, set())
    assert [value for _, _, value in scene.logged] == [0.1, 55 / 96, 20 / 96]
    check.on_train_end(scene, scene)
    assert read_manifest(tmp_path)["stages"]["scene"]["unsafe_rate_on_safe"] == {"before": 0.1, "after": None}


def test_an_earlier_versions_checkpoint_is_rejected():
    with pytest.raises(ArgumentError, match="earlier version"):
        GenerationCheck(Reader()).load_state_dict({"first": 0.02})


@pytest.mark.parametrize(
    ("temperature", "stored", "rejected"),
    [(1.0, {"noise": NOISE}, False), (1.0, {"noise": NOISE - 1}, True), (1.0, {}, True), (0.0, {}, False)],
)
def test_a_baseline_of_other_noise_is_rejected(temperature: float, stored: dict[str, int], rejected: bool):
    check = GenerationCheck(Reader(), sampling=Sampling(temperature=temperature))
    with pytest.raises(ArgumentError, match="noise of version 1") if rejected else nullcontext():
        check.load_state_dict({"before": {"x": True}, **stored})
    assert check.before == (None if rejected else Verdicts({"x": True}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"judge": "b"}, "GenerationCheck: judge: .* those of 'a', .* those of 'b'"),
        ({"second_judge": "c"}, "second_judge: .* those of None, .* those of 'c'"),
        ({"sampling": Sampling(temperature=0.5)}, "sampling.temperature: .* those of 1.0, .* those of 0.5"),
        ({"sampling": Sampling(top_p=1, max_new_tokens=8)}, "top_p, sampling.max_new_tokens: .*0.9, 512.*1, 8"),
        ({}, ""),
    ],
)
def test_a_baseline_of_other_judges_or_sampling_is_rejected(change: dict[str, object], named: str):
    def check(judge: str, second_judge: str | None = None, **settings: Any) -> GenerationCheck:
        judges = [Word(""), Word("")]
        for made, name in zip(judges, (judge, second_judge), strict=True):
            made.checkpoint = made.fingerprint = name
        return GenerationCheck(judges[0], second_judge=judges[1] if second_judge else None, **settings)

    before = check("a")
    resumed = check(**{"judge": "a"} | change)
    resumed.load_state_dict(before.state_dict())  # of a run that has not asked yet
    before.before = Verdicts({"x": True})
    with pytest.raises(ArgumentError, match=named) if named else nullcontext():
        resumed.load_state_dict(before.state_dict())


def test_results_of_all_processes_are_combined():
    """Two processes, each of which evaluates half of the images."""
    parts = [Scene(rank=rank, world_size=2) for rank in range(2)]
    checks = [GenerationCheck(Reader(), every_n_batches=1) for _ in parts]

    def play(flagged: set[int]) -> None:
        found: list[torch.Tensor] = []
        for scene in parts:
            scene.vlm.flagged = {str(number) for number in flagged}
            scene.strategy = SimpleNamespace(reduce=lambda flags, reduce_op: found.append(flags) or flags)
            GenerationCheck(Reader()).verdicts(scene, scene)
        assert [flags[:100, 1].sum().item() for flags in found] == [
            len([image for image in flagged if image < 100 and image % 2 == rank]) for rank in range(2)
        ]
        for scene, check in zip(parts, checks, strict=True):
            scene.strategy = SimpleNamespace(reduce=lambda flags, reduce_op: sum(found))
            scene.play(check, 1, flagged)

    play({0, 1, 2, 101})
    assert [scene.logged[-1][2] for scene in parts] == [0.03, 0.03]
    assert checks[0].state_dict() == checks[1].state_dict()
    with pytest.warns(OverFlaggingWarning, match="20% of .* 3% before") as warned:
        play(set(range(20)))
    assert len(warned) == 2


def test_fewer_than_a_hundred_held_out_safe_images_are_rejected():
    with pytest.raises(RecordError, match="99 held-out safe images, 100 are needed"):
        GenerationCheck(Reader()).on_train_start(Scene(safe=99), None)


def test_limited_run_accepts_fewer_held_out_images(capsys: pytest.CaptureFixture[str]):
    scene = Scene(safe=20, limit=20)
    check = GenerationCheck(Reader(), every_n_batches=1)
    check.on_train_start(scene, scene)
    assert capsys.readouterr().out.splitlines() == [
        "GenerationCheck: 20 held-out safe images under data.limit 20: the share that is called Unsafe is coarse "
        "(without a limit 100 are needed)"
    ]
    scene.play(check, 1, {0})
    silent(scene, check, set(range(5)))
    GenerationCheck(Reader()).on_train_start(Scene(safe=100, limit=200), Scene())
    assert not capsys.readouterr().out
    with pytest.raises(RecordError, match="0 held-out safe images"):
        GenerationCheck(Reader()).on_train_start(Scene(safe=0, limit=20), None)


def gap_check(**settings) -> GenerationCheck:
    """The judge reads only the first word; the second judge reads whether the response contains Unsafe at all."""
    return GenerationCheck(Word("x"), every_n_batches=1, tolerance=0.9, second_judge=Word(UNSAFE), **settings)


def test_reward_gap_compares_both_judges_on_all_held_out_images(tmp_path: Path):
    """The judge prefers responses with an x, which the second judge ignores."""
    scene, check = Scene(run=tmp_path), gap_check()
    scene.vlm.wording = "x, {}"
    scene.play(check, 1, range(90, 110))  # the judge: 20 unsafe ones right. The second: 90 safe, 10 unsafe ones right
    assert scene.logged[-1] == (0, "train/reward_gap", (20 - 100) / 120)
    scene.vlm.wording = "{}"
    with pytest.warns(RewardGapWarning, match=r"grown by 0\.67 to 0\.00"):
        scene.play(check, 1, ())  # both: the 100 safe ones right
    with pytest.warns(RewardGapWarning):
        check.on_train_end(scene, scene)
    assert read_manifest(tmp_path)["stages"]["scene"]["reward_gap"] == {"before": -80 / 120, "after": 0.0}
    state = check.state_dict()
    resumed = gap_check()
    resumed.load_state_dict(state)
    with pytest.warns(RewardGapWarning):
        scene.play(resumed, 1, ())


@pytest.mark.parametrize(
    ("growths", "warned"),
    [
        ([1] * 6 + [0] * 94, True),  # .06
        ([1] * 5 + [0] * 95, False),  # not more than the tolerance
        ([1] * 26 + [-1] * 20 + [0] * 54, False),  # sampling variation
        ([-1] * 30 + [0] * 70, False),
        ([1], False),
        ([], False),
    ],
)
def test_reward_gap_warning_needs_growth_beyond_tolerance_and_sampling(growths: list[int], warned: bool):
    before, now = {str(n): 0 for n in range(len(growths))}, {str(n): growth for n, growth in enumerate(growths)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gap_check().warn_of_gap(before, now)
    assert [warning.category for warning in caught] == [RewardGapWarning] * warned


def test_the_second_judge_has_to_be_another_one():
    with pytest.raises(ArgumentError, match="second_judge has the weights"):
        gap_check().on_train_start(Scene(), Scene())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("every_n_batches", 0), ("minimum", 0), ("tolerance", -0.1), ("tolerance", 1)),
        *(("gap_tolerance", -0.1), ("gap_tolerance", float("nan"))),
    ],
)
def test_a_setting_out_of_bounds_is_rejected(name: str, value: float):
    with pytest.raises(ArgumentError, match=f"{name}: .*, got {value}"):
        GenerationCheck(Reader(), **{name: value})
