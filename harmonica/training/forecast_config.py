"""The settings of the fit of forecast weights."""

from harmonica.validation.settings import Count, Natural, require, settings

FOLDS = 4
"""Number of folds that a round's trajectories form for cross-validation of the solution."""


@settings("train.forecast")
class ForecastConfig:
    """The settings of the fit of forecast weights, after the router's own training."""

    trajectories: Natural = 0
    """Number of trajectories in all, each of `train.batch_size` samples; 0 leaves forecasts linear. Give some
    with train.sdt.reuse forecast, for images nearer to the full ones."""
    rounds: Count = 1
    """Research: Number of times that the weights are solved for; each round measures anew, around the last
    weights."""
    probes: Count = 4
    """Research: Number of random directions in which each image's error is measured; each costs a backward
    pass."""
    order: Count = 2
    """Research: Number of differences in a forecast; a cache keeps one value more."""
    rows_at_once: Count = 4
    """Number of samples that a worker computes at a time; it keeps the activations of a whole trajectory.
    Lower it if a worker runs out of memory."""

    def __post_init__(self) -> None:
        least = FOLDS * self.rounds
        require(
            self.trajectories == 0 or self.trajectories >= least,
            "train.forecast.trajectories",
            self.trajectories,
            f"give {least} or more, {FOLDS} that check each other for each of train.forecast.rounds, or 0",
        )

    def ends_round(self, done: int) -> bool:
        """Return whether a round ends once `done` trajectories are done."""
        return done * self.rounds // self.trajectories > (done - 1) * self.rounds // self.trajectories
