"""KV cache with spare capacity: appends in place instead of re-allocating at every step.

The library's cache copies all keys and values at every step. For a large batch, these copies are much of the work of a
step, and on a GPU each copy is slightly larger than any block of memory that was freed before.

Shapes: R rows, A key/value heads, K cached positions, D head dimension.
"""

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

    The capacity is ``length`` and the larger of 64 positions and a quarter of ``length``: few copies, little unused
    memory.

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


def roomy(config: PreTrainedConfig | None = None) -> DynamicCache:
    """Returns an empty cache with spare capacity.

    Args:
        config: Configuration of a language model, some of whose layers may need another kind of cache layer; those stay
            the library's. Without it, every layer caches all positions.
    """
    cache = DynamicCache(config=config)
    if config is None:
        cache.layer_class_to_replicate = PreallocatedLayer
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
