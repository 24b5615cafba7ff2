r"""A budget for over-flagging: the share of safe images that the policy may call unsafe.

The constrained problem: maximise the reward subject to a mean cost of at most b, where the cost c of a response is 1 if
it calls a safe image Unsafe, else 0. It is solved with a Lagrange multiplier, as in Safe RLHF (arXiv:2310.12773):

.. math:: A = \frac{A_r - \lambda A_c}{1 + \lambda}, \qquad \lambda = \max(0, I + \eta\,n\,(\bar c - b)), \qquad
    I \leftarrow \max(0, I + \eta(\bar c - b))

with the advantages of reward and cost, and the mean cost :math:`\bar c` of the latest responses to questions about safe
images, at least :data:`MIN_RESPONSES` of them. Until there are that many, the multiplier is 0.

The integral I alone would oscillate: it rises as long as the share is above the budget, and is largest when the share
has just fallen to it. The proportional term, with n = :data:`PROPORTIONAL`, damps this (arXiv:2007.03964): it reacts
to the share without delay, in both directions.

GRPO combines the advantages, because dividing by a group's standard deviation undoes any multiplier of its rewards: a
response to a safe image is either right or has a cost, so that both have the same spread. PPO has one value function,
so it function, so it combines the rewards; its advantages are linear in them.

Differences from arXiv:2310.12773: the cost is the judge's verdict rather than a learned cost model; the integral moves
by addition rather than multiplication, so that it can return to 0; there is a proportional term; the KL term is outside
of the combination, so it is not divided by :math:`1 + \lambda`.
"""

from collections import deque
from typing import Any

from safervlm.data.module import SaferData
from safervlm.errors import ArgumentError, RecordError
from safervlm.protocol import SAFE
from safervlm.ranges import in_range

MIN_RESPONSES = 256  # smallest number of responses in the mean; fewer are too coarse for a budget of a few percent
PROPORTIONAL = 40  # in steps of the integral; about the number of rollouts a policy needs to follow the multiplier


class OverFlaggingBudget:
    """The Lagrange multiplier of an over-flagging budget; all processes compute the same one.

    Args:
        budget: The largest share of safe images that may be called Unsafe.
        step: The change of the integral for each rollout, per unit by which the share exceeds the budget.

    Attributes:
        integral: The part of the multiplier that has accumulated, at least 0.
    """

    def __init__(self, budget: float, step: float) -> None:
        in_range("model", above=0, below=1, budget=budget)
        in_range("model", above=0, budget_step=step)
        self.budget, self.step, self.integral = budget, step, 0.0
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

    @property
    def multiplier(self) -> float:
        """The multiplier, at least 0."""
        excess = 0.0 if self.share is None else self.share - self.budget
        return max(0.0, self.integral + PROPORTIONAL * self.step * excess)

    def update(self, flagged: int, safe: int) -> None:
        """Adds a rollout to the moving mean and to the integral.

        Args:
            flagged: Number of responses, of all processes, that call a safe image Unsafe.
            safe: Number of responses, of all processes, to questions about safe images.
        """
        self.rollouts.append((flagged, safe))
        while sum(count for _, count in self.rollouts) - self.rollouts[0][1] >= MIN_RESPONSES:
            self.rollouts.popleft()
        if self.share is not None:
            self.integral = max(0.0, self.integral + self.step * (self.share - self.budget))

    def metrics(self) -> dict[str, float]:
        """Returns the share and the multiplier by name; without the share before there are enough responses."""
        share = {} if self.share is None else {"over_flagging": self.share}
        return share | {"budget_multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as JSON values."""
        return {"integral": self.integral, "rollouts": [list(counts) for counts in self.rollouts]}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Restores the state.

        Args:
            checkpoint: A checkpoint, with :meth:`state_dict` as ``budget``.

        Raises:
            RecordError: The checkpoint contains no such state.
        """
        if "budget" not in checkpoint:
            raise RecordError("model.budget: the checkpoint is of a training without a budget; omit it")
        state = checkpoint["budget"]
        self.integral = state["integral"]
        self.rollouts = deque((flagged, safe) for flagged, safe in state["rollouts"])
