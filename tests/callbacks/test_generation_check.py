"""The share of safe images that the policy calls unsafe, and the warning."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks.generation_check import GenerationCheck, OverFlaggingWarning
from safervlm.errors import RecordError
from safervlm.judge import Judge
from safervlm.protocol import LABELS, SAFE, UNSAFE
from safervlm.records import Example, Question
from safervlm.run import read_manifest
from safervlm.vlm.base import Generation
from safervlm.vlm.packed import PackedBatch
from safervlm.vlm.sampling import Sampling


class Reader(Judge):
    """Reads the label that an answer begins with."""

    def __init__(self) -> None:
        super().__init__(labels=LABELS["alignment"])

    def configure_model(self) -> None:
        pass

    def judge(self, texts, batch_size=64):
        return torch.tensor([[float(text.startswith(label)) for label in self.labels] for text in texts]).log()


class Policy:
    """Calls the images unsafe whose numbers it is given."""

    def __init__(self) -> None:
        self.flagged: set[str] = set()
        self.asked: list[tuple[Sampling, int]] = []

    def generate(self, batch, sampling, seed):
        self.asked.append((sampling, seed))
        return [
            Generation([1], f"{UNSAFE if question.image in self.flagged else SAFE}, I'd say.", "stop")
            for question in batch.questions
        ]


class Scene:
    """A trainer with held-out images, the first ones safe, and a policy."""

    def __init__(
        self, safe: int = 100, unsafe: int = 20, others: tuple[int, int] = (0, 0), run: Path | None = None
    ) -> None:
        answers = [SAFE] * safe + [UNSAFE] * unsafe
        self.examples = [
            Example(Question(f"S/{n}/alignment/0", "S", str(n), None, "alignment", 0, "?", "c", "x", answer))
            for n, answer in enumerate(answers)
        ]
        self.logged: list[tuple[int, str, float]] = []
        self.default_root_dir, self.is_global_zero = str(run), True
        self.done = 0
        self.others = torch.tensor(others)
        self.vlm, self.device = Policy(), torch.device("cpu")
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
        self.datamodule = SimpleNamespace(
            parts=SimpleNamespace(validation=self.examples), val_dataloader=self.val_dataloader
        )
        self.strategy = SimpleNamespace(reduce=lambda counts, reduce_op: counts + self.others)

    def val_dataloader(self):
        for start in range(0, len(self.examples), 16):
            questions = [example.question for example in self.examples[start : start + 16]]
            yield PackedBatch(questions, [[1]] * len(questions), torch.zeros(1), torch.zeros(len(questions)))

    def log(self, name, value, batch_size):
        self.logged.append((self.done, name, value))

    def play(self, check: GenerationCheck, batches: int, flagged: int = 0) -> None:
        """Plays batches with a policy that calls the first images unsafe."""
        self.vlm.flagged = {str(number) for number in range(flagged)}
        for _ in range(batches):
            self.fit_loop.epoch_loop.total_batch_idx = self.done
            check.on_train_batch_start(self, self, None, 0)
            check.on_train_batch_end(self, self, None, None, 0)
            self.done += 1


def test_the_rate_is_of_safe_images_alone_and_measured_where_it_is_time_to(tmp_path: Path):
    scene, check = (
        Scene(run=tmp_path),
        GenerationCheck(Reader(), every_n_batches=3, sampling=Sampling(max_new_tokens=4)),
    )
    check.on_train_start(scene, scene)
    scene.play(check, 1, flagged=7)  # before training
    scene.play(check, 5, flagged=10)
    scene.vlm.flagged = {str(number) for number in range(100, 120)}  # the unsafe ones don't count
    check.on_train_end(scene, scene)
    assert read_manifest(tmp_path)["stages"]["scene"]["unsafe_rate_on_safe"] == {"before": 0.07, "after": 0.0}
    assert scene.logged == [(0, "train/unsafe_rate_on_safe", 0.07), (3, "train/unsafe_rate_on_safe", 0.10)]
    assert len(set(scene.vlm.asked)) == 1  # the same noise each time
    assert scene.vlm.asked[0][0] == Sampling(max_new_tokens=4)


def test_it_warns_when_the_policy_begins_to_call_safe_images_unsafe(tmp_path: Path):
    scene, check = Scene(run=tmp_path), GenerationCheck(Reader(), every_n_batches=1)
    scene.play(check, 1, flagged=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene.play(check, 1, flagged=15)  # by .05, the tolerance
    with pytest.warns(OverFlaggingWarning, match=r"16% of the held-out safe images .* now, 10% before training"):
        scene.play(check, 1, flagged=16)
    with pytest.warns(OverFlaggingWarning):
        check.on_train_end(scene, scene)


def test_a_continued_run_compares_with_the_rate_before_training():
    scene, check = Scene(), GenerationCheck(Reader(), every_n_batches=2)
    scene.play(check, 2, flagged=1)
    continued = GenerationCheck(Reader(), every_n_batches=2)
    continued.load_state_dict(check.state_dict())
    with pytest.warns(OverFlaggingWarning, match="1% before training"):
        scene.play(continued, 1, flagged=50)


def test_the_counts_of_all_processes_are_added():
    scene, check = Scene(others=(30, 60)), GenerationCheck(Reader())
    scene.play(check, 1, flagged=10)
    assert scene.logged[0][2] == pytest.approx((10 + 30) / (100 + 60))


def test_fewer_than_a_hundred_held_out_safe_images_are_refused():
    with pytest.raises(RecordError, match="99 held-out safe images, 100 are needed"):
        GenerationCheck(Reader()).on_train_start(Scene(safe=99), None)
    with pytest.raises(ValueError, match="every_n_batches"):
        GenerationCheck(Reader(), every_n_batches=0)
