"""Settings of the fit of forecasts."""

from dataclasses import dataclass

FOLDS = 4
"""Of a round's trajectories: what some ask for is held against the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig:
    """Fitting the weights of forecasts, after the router's own training."""

    trajectories: int = 0
    """Trajectories in all, each of `train.batch_size` rows; 0 leaves forecasts linear."""
    rounds: int = 1
    """Times the weights are solved for; each round measures anew, around the weights of the one before."""
    probes: int = 4
    """Random directions in which each image's error is seen: each costs a backward pass."""
    order: int = 2
    """Differences that a forecast goes by; a cache keeps one value more."""
    rows_at_once: int = 4
    """Rows that a worker computes at a time: it keeps what a backward along a whole trajectory needs."""

    def __post_init__(self) -> None:
        if self.trajectories < 0:
            raise ValueError(f"train.forecast.trajectories is {self.trajectories}: give 0 or more")
        for name in ("rounds", "probes", "order", "rows_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.forecast.{name} is {getattr(self, name)}: give 1 or more")
        least = FOLDS * self.rounds
        if 0 < self.trajectories < least:
            raise ValueError(
                f"train.forecast.trajectories is {self.trajectories}: give {least} or more, {FOLDS} a round "
                "that check each other, or 0"
            )

    def ends_round(self, done: int) -> bool:
        """Whether a round ends with the trajectory that makes `done` of them."""
        return done * self.rounds // self.trajectories > (done - 1) * self.rounds // self.trajectories
