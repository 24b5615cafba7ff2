"""A stand-in for CUDA graphs on a CPU: it records the operations of a step, and repeats them on the same tensors.

As on a GPU, capturing changes nothing, values that the step's Python code has computed are frozen, and an operation
whose result the CPU has to look at raises a RuntimeError.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that would wait for the GPU.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive"}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Executes and keeps the operations, and what they have overwritten.

    Attributes:
        operations: function, arguments, keyword arguments and results of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if name in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if function._schema.is_mutable:
            changed = [
                value
                for value, argument in zip(args, function._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            self.before += [(tensor, tensor.clone()) for tensor in tensors(changed)]
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, tensors(result)))
        return result


class Recorded:
    """A captured step."""

    def __init__(self, step: Callable[[], None]) -> None:
        recording = Recording()
        try:
            with recording:
                step()
        finally:
            for tensor, value in reversed(recording.before):
                tensor.copy_(value)
        self.operations = recording.operations
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, results in self.operations:
                again = tensors(function(*args, **kwargs))
                for tensor, value in zip(results, again, strict=True):
                    if tensor.data_ptr() != value.data_ptr():
                        tensor.copy_(value)


class Recorder:
    """How steps are captured, and what has been captured."""

    def __init__(self) -> None:
        self.captured: list[Recorded] = []
        self.tried = 0

    def __call__(self, step: Callable[[], None]) -> Recorded:
        self.tried += 1
        self.captured.append(Recorded(step))
        return self.captured[-1]
