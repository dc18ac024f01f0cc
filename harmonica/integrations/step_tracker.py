"""Track a trajectory's steps by the timesteps that a pipeline passes."""

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)


class StepCounter:
    """Counts a trajectory's calls from step T-1 down and checks their timesteps.

    Where those are known, the noisiest one begins a trajectory and each call has to bring its own. Where
    another sampler is allowed, a timestep that rises begins one: that its steps are too few shows only when
    the pipeline ends or the next trajectory begins.
    """

    def __init__(self, num_steps: int, timesteps: Sequence[float] | None, sampler: str) -> None:
        """Wait for the first step of a trajectory.

        Args:
            timesteps: of each step, ascending: entry i is step i; None counts calls alone.
            sampler: what errors tell users to go back to.
        """
        self.num_steps, self.sampler = num_steps, sampler
        self._timesteps = timesteps
        self.reset()

    def reset(self) -> None:
        """Drop the trajectory; the next call begins a new one."""
        self._calls = 0
        self._last = float("inf")

    @property
    def calls(self) -> int:
        """Return the trajectory's calls so far; 0 before the first and after the last."""
        return self._calls % self.num_steps

    @property
    def is_checked(self) -> bool:
        """Return whether each call's timestep is compared with the router's."""
        return self._timesteps is not None

    @property
    def expected(self) -> float | None:
        """The timestep of the next call, where it is known and goes on with a trajectory."""
        return self._timesteps[-1 - self.calls] if self._timesteps is not None and self.calls else None

    def begins(self, timestep: float) -> bool:
        """Return whether a call with this timestep begins a trajectory."""
        if self._timesteps is None:
            return self._rises(timestep)
        wanted = self._timesteps[-1 - self.calls]
        return timestep == self._timesteps[-1] and (self.calls == 0 or timestep != wanted)

    def next_step(self, timestep: float) -> int:
        """Return the step i of a call.

        Raises:
            ValueError: the call is none of the plan's.
        """
        if self._timesteps is None:
            self._count(timestep)
        else:
            self._compare(timestep, self._timesteps)
        self._calls, self._last = self._calls + 1, timestep
        return self.num_steps - self._calls

    def _compare(self, timestep: float, timesteps: Sequence[float]) -> None:
        self._calls = 0 if self.begins(timestep) else self.calls  # the last one may have been broken off
        wanted = timesteps[-1 - self._calls]
        if timestep != wanted:
            raise self.mismatch(timestep, wanted)

    def mismatch(self, timestep: float, wanted: float) -> ValueError:
        """Return the error of a call that has another timestep than its step's."""
        assert self._timesteps is not None, "without them nothing is compared"
        call = self.num_steps - list(self._timesteps).index(wanted)
        return ValueError(
            f"timestep is {timestep:g} in call {call} of the trajectory and the router was "
            f"made for {wanted:g}: give the pipeline num_inference_steps {self.num_steps} and the "
            f"scheduler {self.sampler}, or apply with allow_other_sampler; to call the transformer by "
            "itself, harmonica.remove first"
        )

    def _count(self, timestep: float) -> None:
        if self._rises(timestep):
            if self.calls:
                logger.warning(
                    "a trajectory of %d of %d calls was broken off, or num_inference_steps is not %d",
                    *(self._calls, self.num_steps, self.num_steps),
                )
            self._calls = 0
        elif self._calls == self.num_steps:
            raise ValueError(
                f"timestep is {timestep:g} in call {self._calls + 1} of the trajectory and the router was "
                f"made for {self.num_steps} steps: give the pipeline num_inference_steps {self.num_steps} "
                "and a scheduler with one call a step"
            )

    def _rises(self, timestep: float) -> bool:
        # After one call, the same again is the next trajectory; later, rounding can make two steps equal.
        return timestep > self._last or (timestep == self._last and self._calls == 1)
