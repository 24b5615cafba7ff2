"""CUDA graphs: a step is captured once, and replayed with one launch.

A replay launches the kernels of the step on the same addresses. A step may therefore be captured if its tensors keep
their addresses, and if no code on the CPU depends on their values.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from safervlm.errors import first_line


class Replayable(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Repeats the step."""


Capture = Callable[[Callable[[], None]], Replayable]


def capture_cuda(step: Callable[[], None]) -> Replayable:
    """Captures a step as a CUDA graph, without executing it.

    Args:
        step: The step. It has been executed before, so that libraries have allocated their workspaces.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, which pin the memory of the next batch, may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


def capture_for(device: torch.device) -> Capture | None:
    """Returns the function that captures steps on a device; None if they can't be captured.

    Args:
        device: The device of the model.
    """
    return capture_cuda if device.type == "cuda" else None


class Graphs:
    """Captured steps, by what determines their shapes.

    Args:
        capture: Function that captures a step; None executes each step without capture.

    Attributes:
        reason: Why no further step is captured, or an empty text.
    """

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture
        self.captured: dict[Hashable, Replayable] = {}
        self.reason = ""

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Executes a step: the first time directly, from then on by replaying it, if it can be captured.

        Args:
            key: Identifies the shapes of the step.
            step: The step.
        """
        if key in self.captured:
            self.captured[key].replay()
            return
        step()
        if self.capture is not None and not self.reason:
            try:
                self.captured[key] = self.capture(step)
            except torch.OutOfMemoryError:
                # The step itself fits: only the graphs, which take memory of their own, do not.
                self.reason = "no CUDA graph: it doesn't fit into memory"
                self.clear()
            except RuntimeError as error:  # the model's code synchronises, for example to route tokens to experts
                self.reason = f"no CUDA graph: {first_line(error)}"

    def clear(self) -> None:
        """Removes the captured steps, because their tensors have been replaced."""
        self.captured.clear()
