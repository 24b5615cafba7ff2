r"""A budget for over-flagging: the share of safe images that the policy may call unsafe.

The constrained problem: maximise the reward subject to a mean cost of at most b, where the cost c of a response is 1 if
it calls a safe image Unsafe, else 0. It is solved with a Lagrange multiplier, as in Safe RLHF (arXiv:2310.12773):

.. math:: r' = \frac{r - \lambda c}{1 + \lambda}, \qquad \lambda \leftarrow \max(0, \lambda + \eta(\bar c - b))

with the mean cost :math:`\bar c` of the latest responses to questions about safe images, at least
:data:`MIN_RESPONSES` of them. Until there are that many, the multiplier stays 0.

Differences from the paper: the cost is the judge's verdict rather than a learned cost model; the multiplier moves by
addition rather than multiplication, so that it can return to 0; the rewards of the responses are combined rather than
the advantages, and the KL term is outside of them, so it is not divided by :math:`1 + \lambda`.
"""

from collections import deque
from typing import Any

from safervlm.data.module import SaferData
from safervlm.errors import ArgumentError, RecordError
from safervlm.protocol import SAFE
from safervlm.ranges import in_range

MIN_RESPONSES = 256  # smallest number of responses in the mean; fewer are too coarse for a budget of some percent


class OverFlaggingBudget:
    """The Lagrange multiplier of an over-flagging budget; all processes compute the same one.

    Args:
        budget: The largest share of safe images that may be called Unsafe.
        step: The change of the multiplier for each rollout, per unit by which the share exceeds the budget.

    Attributes:
        multiplier: The multiplier, at least 0.
    """

    def __init__(self, budget: float, step: float) -> None:
        in_range("model", above=0, below=1, budget=budget)
        in_range("model", above=0, budget_step=step)
        self.budget, self.step, self.multiplier = budget, step, 0.0
        self.rollouts: deque[tuple[int, int]] = deque()  # of each rollout: safe images called unsafe, safe images

    def require_safe_images(self, data: Any) -> None:
        """Rejects training data without safe images.

        Args:
            data: The data module; those of other packages are not checked.

        Raises:
            ArgumentError: No question has the answer Safe.
        """
        known = data.parts.train if isinstance(data, SaferData) else []
        if known and all(example.question.answer != SAFE for example in known):
            raise ArgumentError(
                f"model.budget {self.budget}: the training data has no question whose answer is {SAFE}; add safe "
                "images or omit the budget"
            )

    @property
    def share(self) -> float | None:
        """The moving mean of the cost; None before there are enough responses."""
        flagged, safe = (sum(column) for column in zip(*self.rollouts, strict=True)) if self.rollouts else (0, 0)
        return flagged / safe if safe >= MIN_RESPONSES else None

    def update(self, flagged: int, safe: int) -> None:
        """Adds a rollout to the moving mean and updates the multiplier.

        Args:
            flagged: Number of responses, of all processes, that call a safe image Unsafe.
            safe: Number of responses, of all processes, to questions about safe images.
        """
        self.rollouts.append((flagged, safe))
        while sum(count for _, count in self.rollouts) - self.rollouts[0][1] >= MIN_RESPONSES:
            self.rollouts.popleft()
        if self.share is not None:
            self.multiplier = max(0.0, self.multiplier + self.step * (self.share - self.budget))

    def metrics(self) -> dict[str, float]:
        """Returns the share and the multiplier by name; without the share before there are enough responses."""
        share = {} if self.share is None else {"over_flagging": self.share}
        return share | {"budget_multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as JSON values."""
        return {"multiplier": self.multiplier, "rollouts": [list(counts) for counts in self.rollouts]}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Restores the state.

        Args:
            checkpoint: A checkpoint, with :meth:`state_dict` as ``budget``.

        Raises:
            RecordError: The checkpoint has none.
        """
        if "budget" not in checkpoint:
            raise RecordError("model.budget: the checkpoint is of a training without a budget; omit it")
        state = checkpoint["budget"]
        self.multiplier = state["multiplier"]
        self.rollouts = deque((flagged, safe) for flagged, safe in state["rollouts"])
