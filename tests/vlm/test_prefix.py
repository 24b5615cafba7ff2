"""Prefix sharing: the common prefix of rows is computed once, and only where this does not change the result.

The tests detect an encoder that processes several images jointly, attention that looks ahead, and a row with another
row's image.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import pytest
import torch
from torch import Tensor, nn

from safervlm.records import Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.comparing import agree, equals
from safervlm.vlm.deduplicated import DeduplicatedEncoder, split_images
from safervlm.vlm.sampling import Sampling

SHOWN = [2, 0, 2, 2, 1, 0]  # the image of each row


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_equal_rows_are_found_in_every_tensor() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert equals([(one, one), (one, other), (one.clone(), one), (other, one), (one, other)]) == (
        [0, 1, 3],
        [0, 1, 0, 2, 1],
    )


def test_each_image_is_encoded_once(images: Tensor) -> None:
    seen: list[int] = []

    def encode(pixels: Tensor, scale: Tensor, *, bias: float) -> dict[str, Any]:
        seen.append(len(pixels))
        return {"states": (pixels.flatten(1) * scale + bias, pixels.mean((1, 2, 3))), "name": "states"}

    scale = torch.tensor([[1.0], [2.0], [3.0]])
    once = DeduplicatedEncoder(encode)
    for _ in range(2):
        found = once(images[SHOWN], scale[SHOWN], bias=1.0)
        expected = encode(images[SHOWN], scale[SHOWN], bias=1.0)
        for mine, plain in zip(found["states"], expected["states"], strict=True):
            torch.testing.assert_close(mine, plain)
        assert found["name"] == "states"
    # The first time both ways, the second time one row per image; the comparisons here use all six.
    assert seen == [6, 3, 6, 3, 6]
    # The same image at another scale is a different row.
    once(images[SHOWN], torch.arange(6.0)[:, None], bias=0.0)
    assert seen[-1] == 6


def test_encoder_outputs_of_other_types_are_compared(images: Tensor) -> None:
    """Integers, half floats, a scalar for all images, a list with an entry per image: compared without errors."""

    def kinds(pixels: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (pixels.flatten(1) * scale).half(), (pixels.flatten(1) > 0).long()

    def for_all(pixels: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return pixels.flatten(1), pixels.new_tensor(1.0)

    def listed(pixels: Tensor, scale: Tensor) -> list[Tensor]:
        return [image.sum() for image in pixels]

    row, one = torch.ones(len(SHOWN), 1), torch.tensor(2.0)
    for encode, scale, works in ((kinds, row, True), (for_all, row, False), (listed, row, False), (kinds, one, None)):
        once = DeduplicatedEncoder(encode)
        for _ in range(2):
            torch.testing.assert_close(once(images[SHOWN], scale), encode(images[SHOWN], scale))
        assert once.works is works


def test_a_model_without_an_encoder_is_left_alone(tmp_path: Path) -> None:
    """The library returns the model itself as the encoder; wrapped, it would share a cache between equal rows."""
    families.llava(tmp_path)
    vlm = Transformers(str(tmp_path), dtype="float32")
    with patch.object(Transformers, "image_encoder", lambda self, model: model.base_model):
        vlm.load()
    assert not any(isinstance(vars(part).get("forward"), DeduplicatedEncoder) for part in vlm.base.modules())


def test_encoder_with_a_list_of_sizes_is_not_deduplicated(images: Tensor) -> None:
    """They have a row per image, which cannot be inferred."""

    def cropped(pixels: Tensor, sizes: list[int]) -> Tensor:
        return torch.stack([image[:, :size].sum() for image, size in zip(pixels, sizes, strict=True)])

    once = DeduplicatedEncoder(cropped)
    for sizes in ([2] * 6, [1, 2, 3, 4, 1, 2]):
        torch.testing.assert_close(once(images[SHOWN], sizes), cropped(images[SHOWN], sizes))
    assert once.works is None


def test_an_encoder_that_looks_at_all_images_together_is_left_alone(images: Tensor) -> None:
    def with_neighbours(pixels: Tensor) -> Tensor:
        return pixels.flatten(1) + pixels.cumsum(0).flatten(1)

    once = DeduplicatedEncoder(with_neighbours)
    for shown in (SHOWN, [1, 1, 1]):
        for _ in range(2):
            torch.testing.assert_close(once(images[shown]), with_neighbours(images[shown]))
    assert once.works is False


def test_an_encoder_that_fails_on_fewer_images_is_left_alone(images: Tensor) -> None:
    def of_six(pixels: Tensor) -> Tensor:
        if len(pixels) != len(SHOWN):
            raise AssertionError("of another number of images")
        return pixels.flatten(1)

    once = DeduplicatedEncoder(of_six)
    for _ in range(2):
        torch.testing.assert_close(once(images[SHOWN]), of_six(images[SHOWN]))
    assert once.works is False

    def full(pixels: Tensor) -> Tensor:
        if len(pixels) < len(SHOWN):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels.flatten(1)

    once = DeduplicatedEncoder(full)
    with pytest.raises(torch.OutOfMemoryError):
        once(images[SHOWN])
    assert once.works is None


def in_one_row(pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """All images in one row, each as long as its size; the same images in another output with rows of their own."""
    cropped = [image.flatten()[: int(size)] for image, size in zip(pixels, sizes, strict=True)]
    return {"packed": torch.cat(cropped)[None, :, None], "rows": pixels.flatten(1)}


def by_grid(patches: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The patches of all images follow each other; every second one is an output."""
    blocks = patches.split(grid.prod(-1).tolist())
    return torch.cat([(block - block.mean())[::2] for block in blocks]), torch.stack([block.sum() for block in blocks])


def test_an_encoder_that_packs_all_images_encodes_each_once(images: Tensor) -> None:
    sizes = torch.tensor([5, 9, 40])
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [2, 3, 2]])
    patches = [torch.randn(int(grid.prod()), 6) + place for place, grid in enumerate(grids)]
    cases: list[tuple[Any, Any]] = [
        (in_one_row, lambda shown: (images[shown], sizes[shown])),
        (by_grid, lambda shown: (torch.cat([patches[image] for image in shown]), grids[shown])),
    ]
    for encode, given in cases:
        calls: list[int] = []

        def counted(*args: Tensor, encode: Any = encode, calls: list[int] = calls) -> Any:
            calls.append(len(args[1]))
            return encode(*args)

        once = DeduplicatedEncoder(counted)
        for shown in (SHOWN, SHOWN, [1, 1, 1], [0, 1]):
            calls.clear()
            torch.testing.assert_close(once(*given(shown)), encode(*given(shown)))
            assert once.works in (True, None)
        assert once.works
        assert calls == [2], "two distinct images are encoded together"
        calls.clear()
        once(*given(SHOWN))
        assert calls == [1, 1, 1]


def test_images_are_split_by_their_grids_if_those_count_the_patches() -> None:
    patches, grid = torch.arange(6.0)[:, None], torch.tensor([[1, 2, 1], [1, 2, 2]])
    cases: list[tuple[tuple[Any, ...], list[int]]] = [
        ((patches, grid), [2, 4]),
        ((patches, grid + 1), []),
        ((patches, grid.float()), []),
        ((patches, grid, patches[:5]), []),
        ((patches[:2], grid), [1, 1]),
        ((patches, [2, 4]), []),
        ((torch.zeros(3, 3, 4, 4), [-1, -2]), [1, 1, 1]),  # numbers of layers
        ((torch.zeros(2, 3, 4, 4), [4, 3]), []),  # may be sizes
        ((torch.tensor(1.0), patches), []),
        ((), []),
    ]
    for args, expected in cases:
        assert [len(image[0]) for image, _ in split_images(args, {})] == expected


def test_rounding_is_not_a_difference() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 3
    assert agree(logits, logits.bfloat16().float(), torch.bfloat16)
    assert not agree(logits, logits.bfloat16().float(), torch.float32)
    assert agree(logits, logits + 1e-4, torch.float32)
    assert not agree(logits, logits.roll(1, dims=0), torch.bfloat16)
    assert not agree(logits, logits[:2], torch.float32)


def look_ahead(_: nn.Module, __: Any, states: Tensor) -> Tensor:
    return states + states.flip(1).cumsum(1).flip(1)


def fails_after_a_prefix(layer: nn.Module, _: Any, given: dict[str, Any], states: Tensor) -> Tensor:
    """As code whose masks have as many columns as the call has tokens."""
    if 1 < states.shape[1] <= given["position_ids"].max():
        raise AssertionError("a mask of another size")
    return states


@pytest.mark.parametrize(("hook", "takes"), [(look_ahead, False), (fails_after_a_prefix, True)])
def test_model_that_cannot_share_prefixes_is_run_one_by_one(
    hook: Any,
    takes: bool,
    tmp_path: Path,
    make_questions: Callable[[int], list[Question]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A layer that adds the following tokens, which its inputs do not reveal; and one that raises an exception."""
    families.llava(tmp_path)
    vlm = Transformers(str(tmp_path), dtype="float32")
    vlm.load()
    vlm.base.get_decoder().layers[0].register_forward_hook(hook, with_kwargs=takes)
    # Equal lengths: padding would be attended to, too.
    examples = families.ask(make_questions(2))
    examples = [
        replace(example, question=replace(example.question, prompt=f"Is it {word}?"))
        for example, word in zip(examples, ("safe", "nice"), strict=True)
    ]
    greedy = Sampling(temperature=0, max_new_tokens=6)
    together = vlm.generate(vlm.collator(examples), greedy, seed=0)
    assert together == [vlm.generate(vlm.collator([example]), greedy, seed=0)[0] for example in examples]
    assert vlm.sharing.works is False
    assert "one by one" in capsys.readouterr().err
