"""Settings of the fit of forecasts."""

from harmonica.validation.settings import Count, Natural, require, settings

FOLDS = 4
"""Of a round's trajectories: what some ask for is held against the others."""


@settings("train.forecast")
class ForecastConfig:
    """Fitting the weights of forecasts, after the router's own training."""

    trajectories: Natural = 0
    """Trajectories in all, each of `train.batch_size` rows; 0 leaves forecasts linear."""
    rounds: Count = 1
    """Times the weights are solved for; each round measures anew, around the weights of the one before."""
    probes: Count = 4
    """Random directions in which each image's error is seen: each costs a backward pass."""
    order: Count = 2
    """Differences that a forecast goes by; a cache keeps one value more."""
    rows_at_once: Count = 4
    """Rows that a worker computes at a time: it keeps what a backward along a whole trajectory needs."""

    def __post_init__(self) -> None:
        least = FOLDS * self.rounds
        require(
            self.trajectories == 0 or self.trajectories >= least,
            "train.forecast.trajectories",
            self.trajectories,
            f"give {least} or more, {FOLDS} that check each other for each of train.forecast.rounds, or 0",
        )

    def ends_round(self, done: int) -> bool:
        """Whether a round ends with the trajectory that makes `done` of them."""
        return done * self.rounds // self.trajectories > (done - 1) * self.rounds // self.trajectories
