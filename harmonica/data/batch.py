"""Define batches of samples: noise, conditions and the keys of further noise."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harmonica.samplers.base import Sampler, State
from harmonica.samplers.noise import SampleKeys


@dataclass(frozen=True, slots=True)
class Batch:
    """Holds N samples on the device that makes their images."""

    noise_NCHW: Tensor
    condition_N: Any
    """Labels (N,), or a `TextCondition`."""
    keys: SampleKeys | None = None
    """The samples' keys, which a stochastic sampler needs."""

    def __len__(self) -> int:
        return len(self.noise_NCHW)

    def split(self, size: int) -> list["Batch"]:
        """Return the samples in order, at most `size` at a time; 0 leaves them together.

        Split before a sampler starts, since guidance doubles rows: [conditional; unconditional].
        """
        size = size or len(self)
        parts = (slice(first, first + size) for first in range(0, len(self), size))
        return [
            Batch(self.noise_NCHW[part], self.condition_N[part], self.keys[part] if self.keys else None)
            for part in parts
        ]

    def start(self, sampler: Sampler) -> State:
        """Return the state from which a sampler begins with these samples."""
        return sampler.start(self.noise_NCHW, self.condition_N, self.keys)
