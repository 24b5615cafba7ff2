"""KV caches that are written in place: one that grows, and one of fixed size.

The library's cache copies all keys and values at every step. For a large batch, these copies take much of the time of a
step, and on a GPU each copy is slightly larger than any block of memory that was freed before.

Shapes: R rows, A key/value heads, K cached positions, D head dimension, Q tokens of a row in one step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, stored as views of longer buffers."""

    buffers: tuple[Tensor, Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialises empty keys and values without spare capacity.

        Args:
            key_states: (R, A, K, D) keys, for their shape, data type and device.
            value_states: (R, A, K, D) values, for the same.
        """
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = self.buffers = (key_states[:, :, :0], value_states[:, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Appends keys and values, and returns all cached ones.

        Args:
            key_states: (R, A, new, D) keys to append.
            value_states: (R, A, new, D) values to append.
            *_: Further arguments of the library; ignored.
            **__: Further arguments of the library; ignored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        # Other operations of the library on a cache replace these views by other tensors.
        if end > self.buffers[0].shape[2] or self.keys.data_ptr() != self.buffers[0].data_ptr():
            self.buffers = (longer(self.keys, end), longer(self.values, end))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows, and frees the memory of the others.

        Args:
            indices: Rows to keep, in their new order.
        """
        super().batch_select_indices(indices)
        self.buffers = (self.keys, self.values)


def longer(cached: Tensor, length: int) -> Tensor:
    """Copies cached states into a buffer with spare capacity.

    The capacity is ``length`` plus the larger of 64 positions and a quarter of ``length``. This needs few copies and
    little unused memory.

    Args:
        cached: (R, A, K, D) keys or values.
        length: Number of positions that are needed now, at least K.

    Returns:
        (R, A, capacity, D) the buffer; positions after the first K are uninitialised.
    """
    rows, heads, positions, width = cached.shape
    buffer = cached.new_empty(rows, heads, length + max(64, length // 4), width)
    buffer[:, :, :positions] = cached
    return buffer


def growing_cache(config: PreTrainedConfig | None = None) -> DynamicCache:
    """Returns an empty cache with spare capacity.

    Args:
        config: Configuration of a language model, some of whose layers may need another kind of cache layer; those are
            the library's. Without it, every layer caches all positions.
    """
    cache = DynamicCache(config=config)
    if config is None:
        cache.layer_class_to_replicate = PreallocatedLayer
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Places:
    """Where a step writes into a cache of fixed size; shared by its layers.

    Args:
        columns: (R, Q) position in the cache of each token of the step. The caller changes it in place.
        capacity: K.

    Attributes:
        length: Number of positions that attention uses, from the first one on.
        start: Position at which all rows write, if it is the same for all; None otherwise.
    """

    def __init__(self, columns: Tensor, capacity: int) -> None:
        self.columns, self.capacity, self.length = columns, capacity, capacity
        self.start: int | None = None
        self.starts: dict[int, Tensor] = {}
        self.found: dict[int, Tensor] = {}

    def begin(self, length: int, start: int | None = None) -> None:
        """Sets the columns of the next step, and discards what was computed for the last one.

        Args:
            length: See :attr:`length`.
            start: See :attr:`start`.
        """
        self.length, self.start = length, start
        self.found.clear()

    def indices(self, heads: int) -> Tensor:
        """Returns the (R A Q) places of a step in a (R A K, D) buffer.

        Args:
            heads: A; layers may have different numbers of heads.
        """
        if heads not in self.starts:
            rows = len(self.columns)
            each = torch.arange(rows * heads, device=self.columns.device) * self.capacity
            self.starts[heads] = each.view(rows, heads, 1)
        if heads not in self.found:
            self.found[heads] = (self.starts[heads] + self.columns[:, None]).flatten()
        return self.found[heads]


class FixedLayer(DynamicLayer):
    """Keys and values of one layer in buffers of fixed size.

    Args:
        keys: (R, A, K, D) buffer of the keys.
        values: (R, A, K, D) buffer of the values, perhaps with another D.
        places: Where steps write.
    """

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, places: Places) -> None:
        super().__init__()
        self.keys, self.values, self.places = keys, values, places
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of a step, and returns those that attention uses.

        Args:
            key_states: (R, A, Q, D) keys to write.
            value_states: (R, A, Q, D) values to write.
            *_: Further arguments of the library; ignored.
            **__: Further arguments of the library; ignored.
        """
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            start, width = self.places.start, states.shape[-1]
            if start is None:
                places = self.places.indices(states.shape[1])
                buffer.view(-1, width).index_copy_(0, places, states.reshape(-1, width))
            else:  # takes half the time on a CPU
                buffer[:, :, start : start + states.shape[2]] = states
        return self.keys[:, :, : self.places.length], self.values[:, :, : self.places.length]

    def get_seq_length(self) -> int:
        """Returns how many positions precede the last one that attention uses."""
        return self.places.length - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of positions that attention uses, and the first of them.

        Args:
            query_length: Q; ignored.
        """
        return self.places.length, 0


def fixed(layers: Sequence[tuple[Tensor, Tensor]], places: Places) -> DynamicCache:
    """Returns a cache of fixed size.

    Args:
        layers: Buffers of the keys and values of each layer.
        places: Where steps write.
    """
    cache = DynamicCache()
    cache.layers = [FixedLayer(keys, values, places) for keys, values in layers]
    return cache
