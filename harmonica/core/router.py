"""The router: a learned T x B table of logits."""

import torch
from torch import Tensor, nn

from harmonica.core.plan import Plan
from harmonica.samplers.noise import sample_noise

FIXED_LOGIT = 5.0
"""Logits of row T-1, which always computes and is never trained."""
ROUTER_INDEX = 2**62
"""Row index that initial logits are drawn at: no trajectory gets there."""


class Router(nn.Module):
    """A table of logits; a branch is computed if sigmoid(logit) > tau.

    Each step is a parameter of its own, so that its update leaves other steps' optimiser state unchanged.
    """

    def __init__(self, num_steps: int, num_branches: int, initial_logit: float = FIXED_LOGIT) -> None:
        super().__init__()
        last = num_steps - 1
        self.rows = nn.ParameterList(
            nn.Parameter(
                torch.full((num_branches,), FIXED_LOGIT if i == last else initial_logit),
                requires_grad=i != last,
            )
            for i in range(num_steps)
        )

    @classmethod
    def alternating(cls, num_steps: int, num_branches: int, logit: float) -> "Router":
        """Return a router that computes every second step and reuses at the others.

        What hurts is not reuse but runs of it. From equal logits all rows look alike, move together and
        cross tau together; from here training decides where to depart from the pattern.
        """
        logits_TB = torch.full((num_steps, num_branches), logit)
        logits_TB[num_steps % 2 : -1 : 2] = -logit  # steps T-2, T-4, ...
        logits_TB[-1] = FIXED_LOGIT
        return cls.from_logits(logits_TB)

    @classmethod
    def normal(cls, num_steps: int, num_branches: int, seed: int) -> "Router":
        """Return a router with standard normal logits, as in the released code."""
        logits_TB = torch.from_numpy(sample_noise(seed, ROUTER_INDEX, (num_steps, num_branches)))
        logits_TB[-1] = FIXED_LOGIT
        return cls.from_logits(logits_TB)

    @classmethod
    def from_logits(cls, logits_TB: Tensor) -> "Router":
        """Return a router with the given logits."""
        router = cls(*logits_TB.shape).to(logits_TB.dtype)
        with torch.no_grad():
            for row, values in zip(router.rows, logits_TB, strict=True):
                row.copy_(values)
        return router

    @property
    def num_steps(self) -> int:
        """Return T, the number of sampling steps."""
        return len(self.rows)

    @property
    def num_branches(self) -> int:
        """Return B, the number of branches."""
        return len(self.rows[0])

    def logits(self) -> Tensor:
        """(T, B), detached."""
        return torch.stack([row.detach() for row in self.rows])

    def scores(self, i: int) -> Tensor:
        """r = sigmoid(logit) of step i (B,), differentiable."""
        scores_B: Tensor = self.rows[i].sigmoid()
        return scores_B

    def rows_above(
        self, threshold: float, *, limit: float = float("inf"), limited: int = 0
    ) -> list[list[bool]]:
        """Return where scores exceed tau, T rows of B, read back from the device at once.

        Args:
            limit: see the logits of rows 0 ... `limited` - 1 clamped to [-limit, limit].
        """
        logits = [row.detach().clamp(-limit, limit) for row in self.rows[:limited]]
        logits += [row.detach() for row in self.rows[limited:]]
        above: list[list[bool]] = (torch.stack([row.sigmoid() for row in logits]) > threshold).tolist()
        return above

    def plan(self, threshold: float) -> Plan:
        """Return the plan at threshold tau."""
        return Plan.from_scores(self.logits().sigmoid(), threshold)

    @torch.no_grad()
    def clamp_(self, limit: float) -> None:
        """Clamp the trained logits to [-limit, limit]; row T-1 is fixed."""
        trained = list(self.rows)[:-1]
        torch._foreach_clamp_min_(trained, -limit)
        torch._foreach_clamp_max_(trained, limit)

    def extra_repr(self) -> str:
        """Return what `repr` shows of it."""
        return f"num_steps={self.num_steps}, num_branches={self.num_branches}"
