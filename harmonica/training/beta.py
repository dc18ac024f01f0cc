"""Choose beta, the weight of reuse, for a target.

It is set so that a given fraction of entries is not worth computing.

Nobody should have to guess beta: its scale is that of lambda times a squared error, which differs by
orders of magnitude between models. Where the loss is at rest, an entry with score r satisfies
`-lambda_i * dMSE/dr = beta`; to first order the left side is `(1 - r)` times what the entry's full
computation is worth. Entries worth less than `beta / (1 - tau)` rest below tau, that is, are reused. Where
the penalty counts MACs, worth is per MAC.
"""

from typing import Any

import torch
from torch import Tensor

DECAY = 0.8
"""Decay of the estimate's moving average over trajectories: one trajectory's gradients are noisy."""
_BEYOND_PRICE = 1e30
_STEEPEST = 1e-7
"""Lower bound of 1 - r, which float32 rounds to 0 for logits above 17."""


class BetaController:
    """Running estimate of each entry's worth, and the beta that meets the target.

    At this beta the target fraction is reused.
    """

    def __init__(self, num_steps: int, costs_B: Tensor, *, fraction: float, threshold: float) -> None:
        """Start without any estimate.

        Args:
            costs_B: what the penalty counts a branch as, 1 on average; the fraction is of these.
            fraction: to be reused of rows 0 ... T-2; row T-1 never is.
        """
        self.fraction = min(1.0, fraction)
        self.threshold = threshold
        self.costs_B = costs_B.cpu()
        self.beta = 0.0
        self.worth_TB = torch.zeros(num_steps - 1, len(costs_B))
        self._latest_TB = torch.zeros_like(self.worth_TB)
        self._observed: list[tuple[int, Tensor, Tensor]] = []
        self._updates = 0

    def spare(self, i: int) -> None:
        """Keep row i from reuse: its entries count as worth more than any other."""
        self.worth_TB[i] = self._latest_TB[i] = _BEYOND_PRICE

    def observe(self, i: int, logit_gradient_B: Tensor, logits_B: Tensor) -> None:
        """Take step i's gradient of the loss, under the present beta, before the update.

        It stays on its device until the trajectory is over, since reading it back waits for the device.
        """
        self._observed.append((i, logits_B.detach().sigmoid(), logit_gradient_B.detach().clone()))

    def update(self) -> float:
        """Return the next beta; called once a trajectory, after all its steps."""
        if self._observed:
            steps, scores, gradients = zip(*self._observed)
            r, gradient = torch.stack([torch.stack(scores), torch.stack(gradients)]).cpu()
            score_gradient = gradient / (r * (1 - r)).clamp_min(_STEEPEST)
            worth = (self.beta - score_gradient / self.costs_B) / (1 - r).clamp_min(_STEEPEST)
            self._latest_TB[list(steps)] = worth.to(self._latest_TB.dtype)
            self._observed.clear()
        decay = DECAY if self._updates else 0.0
        self.worth_TB = torch.lerp(self._latest_TB, self.worth_TB, decay)
        self._updates += 1
        self.beta = (1 - self.threshold) * max(0.0, self._quantile())
        return self.beta

    def _quantile(self) -> float:
        """Return the worth below which `fraction` of the costs lie.

        With equal costs it is the ordinary quantile.
        """
        worth, order = self.worth_TB.flatten().sort()
        costs = self.costs_B.expand_as(self.worth_TB).flatten()[order]
        below = costs.cumsum(0) - costs
        place = self.fraction * float(below[-1])
        upper = min(int(torch.searchsorted(below, place)), len(worth) - 1)
        lower = max(upper - 1, 0)
        gap = float(below[upper] - below[lower])
        weight = (place - float(below[lower])) / gap if gap else 0.0
        return float(worth[lower].lerp(worth[upper], weight))

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state for a checkpoint."""
        return {"beta": self.beta, "worth": self.worth_TB, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.beta, self.worth_TB, self._updates = state["beta"], state["worth"].cpu(), state["updates"]
