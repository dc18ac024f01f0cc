"""The settings of the fit of forecasts and of the output's correction."""

from harmonica.training.memory_savings import MemorySavings
from harmonica.validation.settings import Count, Natural, require, settings

_LEAST = 4
"""Number of trajectories that a round takes at least."""
_MEASURED_FOR_ONE_TRIED = 5
_COMPARED_FURTHER = 2
"""Trajectories of the second round that compare finalists; it measures three of them at least."""


@settings("train.forecast")
class ForecastConfig:
    """The settings of the fit of forecasts and of the output's correction.

    It comes after the router's own training.
    """

    trajectories: Natural = 0
    """Number of trajectories in all, each of `train.batch_size` samples; 0 leaves forecasts linear. Give some
    with train.sdt.reuse forecast, for images nearer to the full ones."""
    rounds: Count = 2
    """Research: Largest number of times that the weights are solved for; each round measures anew, around the
    last weights, and takes 4 trajectories at least."""
    probes: Count = 4
    """Research: Number of directions in which each image's error is measured, its own and random ones; each
    costs a backward pass."""
    order: Count = 2
    """Research: Number of differences in a forecast; a cache keeps one value more."""
    finalists: Count = 2
    """Research: Number of plans that are fitted at first, of those that the choice has found nearest. The one
    that is nearest in the trial of the first round and two trajectories of the second goes on."""
    corrections: Natural = 1
    """Research: Number of differences of the model's last outputs that correct its output at every step, from
    20 steps on one more than steps are reused in a row at least; 0 fits the forecasts alone."""
    segments: bool = False
    """Forecast what neighbouring branches add to the hidden state together, where a plan reuses them at the
    same steps, and not each branch alone: fewer values are kept, and computed steps are faster. Give it for
    speed and memory; at the same arithmetic images are less near in the mean."""
    rows_at_once: Count = 4
    """Number of samples that a worker computes at a time; it keeps the activations of a whole trajectory.
    Lower it if a worker runs out of memory."""
    activation_checkpointing: bool = False
    """Compute branches again in the backward passes of the fit and of a measured start, in place of keeping
    what they need: several times less memory, for the time of as many forward passes. The results are the
    same."""
    activation_offloading: bool = False
    """Keep in the host's memory what the backward passes of the fit and of a measured start need. A GPU then
    has the values of a few steps, however many there are. The copies take time; the results are the same."""

    def __post_init__(self) -> None:
        require(
            self.trajectories == 0 or self.trajectories >= _LEAST,
            "train.forecast.trajectories",
            self.trajectories,
            f"give {_LEAST} or more, or 0",
        )

    @property
    def savings(self) -> MemorySavings:
        """Return how the gradients of a trajectory need less memory."""
        return MemorySavings(recompute=self.activation_checkpointing, offload=self.activation_offloading)

    @property
    def cures(self) -> list[str]:
        """Return what to give where a worker runs out of memory."""
        found = {
            "train.forecast.rows_at_once 1": self.rows_at_once == 1,
            "train.forecast.activation_checkpointing True": self.activation_checkpointing,
            "train.forecast.activation_offloading True": self.activation_offloading,
        }
        return [cure for cure, is_given in found.items() if not is_given]

    @property
    def num_rounds(self) -> int:
        """Return how many rounds the trajectories are enough for."""
        return max(1, min(self.rounds, self.trajectories // _LEAST))

    def is_tried(self, place: int) -> bool:
        """Return whether a trajectory tries solutions, and does not measure.

        It is so for the last ones of a round, at least one in six.

        Args:
            place: number of the trajectory, from 0.
        """
        places = self._round_of(place)
        return place in places[-max(1, len(places) // (1 + _MEASURED_FOR_ONE_TRIED)) :]

    def ends_round(self, done: int) -> bool:
        """Return whether a round ends once `done` trajectories are done."""
        return done > 0 and done == self._round_of(done - 1).stop

    @property
    def compared(self) -> int:
        """Return after how many trajectories one of the finalists goes on.

        They are those of the first round and, where there is a second, the first two of that, which compare
        the fitted plans on more images than a trial has.
        """
        first = self._round_of(0).stop
        return first + (_COMPARED_FURTHER if first < self.trajectories else 0)

    def _round_of(self, place: int) -> range:
        """Return the places of the round that a trajectory belongs to."""
        number = place * self.num_rounds // self.trajectories
        begin, end = (-(-k * self.trajectories // self.num_rounds) for k in (number, number + 1))
        return range(begin, end)
