"""Beta from a target: the weight of reuse is set so that a given share of entries is not worth computing.

Nobody should have to guess beta: its scale is that of lambda times a squared error, which differs by
orders of magnitude between models. Where the loss is at rest, an entry with score r satisfies
`-lambda_i * dMSE/dr = beta`; to first order the left side is `(1 - r)` times what the entry's full
computation is worth. Entries worth less than `beta / (1 - tau)` rest below tau, that is, are reused.
"""

from typing import Any

import torch
from torch import Tensor

DECAY = 0.8
"""Of the estimate's moving average over trajectories: one trajectory's gradients are noisy."""


class BetaController:
    """Running estimate of what each entry is worth, and the beta at which the target share is reused."""

    def __init__(self, num_steps: int, num_branches: int, *, target_cur: float, threshold: float) -> None:
        trained = num_steps - 1
        # The target counts row T-1, which is never reused.
        self.share = min(1.0, target_cur * num_steps / trained)
        self.threshold = threshold
        self.beta = 0.0
        self.worth_TB = torch.zeros(trained, num_branches)
        self._latest_TB = torch.zeros_like(self.worth_TB)
        self._updates = 0

    def observe(self, i: int, logit_gradient_B: Tensor, logits_B: Tensor) -> None:
        """Take step i's gradient of the loss, under the present beta, before the update."""
        r = logits_B.detach().sigmoid().cpu()
        score_gradient = logit_gradient_B.detach().cpu() / (r * (1 - r))
        self._latest_TB[i] = (self.beta - score_gradient) / (1 - r)

    def update(self) -> float:
        """Once a trajectory, after all its steps: the next beta."""
        decay = DECAY if self._updates else 0.0
        self.worth_TB = torch.lerp(self._latest_TB, self.worth_TB, decay)
        self._updates += 1
        quantile = self.worth_TB.flatten().quantile(self.share).clamp_min(0).item()
        self.beta = (1 - self.threshold) * quantile
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, "worth": self.worth_TB, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta, self.worth_TB, self._updates = state["beta"], state["worth"].cpu(), state["updates"]
