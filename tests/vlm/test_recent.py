"""Recently used pixel values: decoded once, bounded in bytes, and read again where the file has changed."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from safervlm.errors import RecordError
from safervlm.records import Example
from safervlm.vlm.llava import Llava
from safervlm.vlm.recent import RecentPixels


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for number in range(4):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    return [str(tmp_path / str(number)) for number in range(4)]


def test_least_recently_used_file_is_evicted(files: list[str]) -> None:
    recent, made = RecentPixels(max_bytes=3 * 40), []

    def use(place: int) -> None:
        def make() -> torch.Tensor:
            made.append(place)
            return torch.full((10,), float(place))

        assert recent.get(files[place], make).tolist() == [float(place)] * 10

    for place in (0, 1, 2, 0, 3, 0, 1):
        use(place)
    assert made == [0, 1, 2, 3, 1]


def test_an_image_larger_than_the_bound_is_used_and_not_kept(files: list[str]) -> None:
    recent, made = RecentPixels(max_bytes=39), []
    for _ in range(2):
        recent.get(files[0], lambda: made.append(1) or torch.zeros(10))  # type: ignore[func-returns-value]
    assert len(made) == 2


def test_a_changed_file_is_read_again(files: list[str]) -> None:
    recent = RecentPixels()
    assert recent.get(files[0], lambda: torch.zeros(1)).item() == 0
    os.utime(files[0], ns=(1, 1))
    assert recent.get(files[0], lambda: torch.ones(1)).item() == 1
    Path(files[0]).write_bytes(b"longer")
    os.utime(files[0], ns=(1, 1))
    assert recent.get(files[0], lambda: torch.full((1,), 2.0)).item() == 2


def test_a_copy_for_another_process_is_empty(files: list[str]) -> None:
    recent = RecentPixels(max_bytes=400)
    recent.get(files[0], lambda: torch.zeros(1))
    copy = pickle.loads(pickle.dumps(recent))
    assert copy.max_bytes == 400
    assert copy.get(files[0], lambda: torch.ones(1)).item() == 1


def test_batches_are_equal_with_and_without_the_pixel_cache(tiny_llava: Path, make_questions) -> None:
    examples = [Example(question) for question in make_questions(6)]
    collator = Llava(str(tiny_llava), dtype="float32").collator
    first, second = collator(examples), collator(examples)
    fresh = Llava(str(tiny_llava), dtype="float32").collator(examples)
    assert torch.equal(first.pixel_values, fresh.pixel_values)
    assert torch.equal(second.pixel_values, fresh.pixel_values)
    Path(str(examples[0].question.image_path)).unlink()
    with pytest.raises(RecordError, match="is missing"):
        collator(examples)
