"""The KV cache with spare capacity equals the library's cache after every operation."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from safervlm.vlm.cache import PreallocatedLayer, growing_cache


def states(rows: int, new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 2, new, 4) keys and values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, new, 4, generator=generator)
    return keys, values


def test_preallocated_layer_equals_the_dynamic_layer() -> None:
    """After growth, removal, repetition and reordering of rows, and cropping."""
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    changes = {
        4: lambda layer: layer.batch_select_indices(torch.tensor([0, 2, 3])),
        9: lambda layer: layer.crop(-3),
        12: lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])),
        15: lambda layer: layer.batch_repeat_interleave(2),
    }
    rows = 4
    for step in range(120):
        for layer in (ours, theirs):
            if step in changes:
                changes[step](layer)
        rows = rows if theirs.keys is None else len(theirs.keys)
        new = states(rows, 40 if step == 0 else 1 + step % 3, step)
        for one, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(one, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
    ours.reset()
    assert ours.get_seq_length() == 0
    keys, values = states(2, 3, 0)
    assert torch.equal(ours.update(keys, values)[0], keys)


def test_step_reuses_the_buffer_and_removed_rows_are_freed() -> None:
    layer = PreallocatedLayer()
    layer.update(*states(4, 100, 0))
    place = layer.keys.data_ptr()
    for step in range(60):
        layer.update(*states(4, 1, step))
    assert layer.keys.data_ptr() == place
    layer.batch_select_indices(torch.tensor([1]))
    assert all(len(buffer) == 1 for buffer in layer.buffers)


@pytest.mark.parametrize(("window", "kind"), [(None, PreallocatedLayer), (8, None)])
def test_sliding_window_layers_use_the_library_cache(window: int | None, kind: type | None) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    if window:
        config.sliding_window, config.layer_types = window, ["sliding_attention"] * 2
    expected = [kind] * 2 if kind else [type(layer) for layer in DynamicCache(config=config).layers]
    assert [type(layer) for layer in growing_cache(config).layers] == expected


def test_cache_without_a_configuration_preallocates_every_layer() -> None:
    cache = growing_cache()
    for layer in range(3):
        cache.update(*states(2, 5, layer), layer)
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer] * 3
    assert cache.get_seq_length() == 5
