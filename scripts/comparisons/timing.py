"""Runs implementations in turn, checks that they compute the same, and measures their CPU time."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LR = 1e-6  # learning rate of the training steps


@dataclass
class Side:
    """One implementation of a training step.

    Attributes:
        backward: computes the loss and back-propagates it.
        trained: the adapter's parameters, which all sides have, by their names in the PEFT model.
        optimizer: optimizer of all parameters that this side trains.
        seconds: CPU time of each measured step.
    """

    backward: Callable[[], Tensor]
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)

    def step(self) -> float:
        """Makes one optimizer step and returns the loss."""
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def parameters(self) -> list[Tensor]:
        """Returns all parameters of the optimizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def gradients(self) -> tuple[float, Tensor]:
        """Returns the loss and the adapter's gradient as one vector, without a step."""
        loss = self.backward()
        gradient = torch.cat([self.trained[name].grad.flatten() for name in sorted(self.trained)])  # type: ignore[union-attr]
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), gradient


@dataclass(frozen=True)
class Row:
    """A row of the table: the ratio of their time to ours.

    Attributes:
        measure: the title of the comparison.
        theirs: seconds of each repetition of the other implementation.
        ours: seconds of each repetition of SaferVLM.
        target: the target of the median ratio; None for a row without a target.
    """

    measure: str
    theirs: Sequence[float]
    ours: Sequence[float]
    target: float | None = None

    def ratios(self) -> list[float]:
        """Returns the ratio of each repetition."""
        return [a / b for a, b in zip(self.theirs, self.ours, strict=True)]

    def __str__(self) -> str:
        ratios = self.ratios()
        median = statistics.median(ratios)
        target = "" if self.target is None else f"{self.target:g}" + ("" if median >= self.target else " (missed)")
        shown = " | ".join(
            f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}" for ratio in (median, min(ratios), max(ratios))
        )
        times = f"{statistics.median(self.theirs):.3g} | {statistics.median(self.ours):.3g}"
        return f"| {self.measure} | {shown} | {target} | {times} |"


def titled(objective: str, questions: int) -> str:
    """Returns the name of an objective in the table.

    Args:
        objective: its name.
        questions: number of questions about each image.
    """
    return objective if questions == 1 else f"{objective}, {questions} questions per image"


def say(text: str) -> None:
    """Prints progress to stderr; the table goes to stdout.

    Args:
        text: one line.
    """
    print(text, file=sys.stderr, flush=True)


def measure(sides: dict[str, Side], repeats: int) -> None:
    """Runs all sides in turn, ``repeats`` times, after one round that is not measured.

    Args:
        sides: the implementations by name; the first one is the reference of the comparison.
        repeats: number of measured repetitions.

    Raises:
        SystemExit: the sides do not compute the same gradients or losses.
    """
    first, *others = sides
    loss, gradient = sides[first].gradients()
    for name in others:
        other_loss, other = sides[name].gradients()
        error = float((other - gradient).norm() / gradient.norm())
        say(f"  {name}: loss {other_loss:.6f} ({first}: {loss:.6f}), gradient differs by {error:.1e}")
        if abs(other_loss - loss) > 1e-5 or not error < 1e-4:
            sys.exit(f"{name} and {first} don't compute the same: the comparison is void")
    start_weights = {name: [p.detach().clone() for p in side.parameters()] for name, side in sides.items()}
    for repeat in range(repeats + 1):
        losses = {}
        gc.collect()
        for name, side in sides.items():
            # Each step starts from the same weights: a value head on the policy and a value adapter would diverge.
            for parameter, weight in zip(side.parameters(), start_weights[name], strict=True):
                parameter.data.copy_(weight)
            start = time.process_time()
            losses[name] = side.step()
            if repeat:
                side.seconds.append(time.process_time() - start)
        if not max(losses.values()) - min(losses.values()) < 1e-5:
            sys.exit(f"the losses are not equal: {losses}: the comparison is void")
        if repeat:
            say(f"  {repeat}/{repeats}: " + ", ".join(f"{name} {s.seconds[-1]:.2f} s" for name, s in sides.items()))


def alternate(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Runs all sides in turn, ``repeats`` times, after one round that is not measured.

    Args:
        sides: what to run, by name.
        repeats: number of measured repetitions.

    Returns:
        By name, the CPU seconds of each repetition and the last result.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            start = time.process_time()
            results[name] = side()
            if repeat:
                seconds[name].append(time.process_time() - start)
        if repeat:
            say(f"  {repeat}/{repeats}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()))
    return seconds, results
