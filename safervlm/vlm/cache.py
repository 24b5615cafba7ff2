"""A cache of keys and values with room at its end: a step writes what is new; the library's copies all that is old.

Of a large batch those copies are much of a step's work, and on a GPU each is a little larger than every piece of memory
that was freed before.

Shapes: R rows, A attention heads that have keys, K cached positions, D the width of a head.
"""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer: views of buffers that are longer."""

    buffers: tuple[Tensor, Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begins with no position and no room."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = self.buffers = (key_states[:, :, :0], value_states[:, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Writes (R, A, new, D) keys and values behind the others; gives all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        # What else the library does to a cache leaves other tensors than these views.
        if end > self.buffers[0].shape[2] or self.keys.data_ptr() != self.buffers[0].data_ptr():
            self.buffers = (longer(self.keys, end), longer(self.values, end))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows, and lets go of the memory of the others."""
        super().batch_select_indices(indices)
        self.buffers = (self.keys, self.values)


def longer(cached: Tensor, length: int) -> Tensor:
    """(R, A, K, D) with room for ``length`` positions and a quarter more: few copies, little that stays empty."""
    rows, heads, positions, width = cached.shape
    buffer = cached.new_empty(rows, heads, length + max(64, length // 4), width)
    buffer[:, :, :positions] = cached
    return buffer


def roomy(config: PreTrainedConfig | None = None) -> DynamicCache:
    """An empty cache.

    Args:
        config: of a language model, some of whose layers may keep something else: they are the library's. Without it
            every layer keeps everything.
    """
    cache = DynamicCache(config=config)
    if config is None:
        cache.layer_class_to_replicate = RoomyLayer
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
