"""Draw the noise of a stochastic sampler's steps and copy it to the device.

A copy from the host waits for the device, so one copy has many steps. Shapes: N images, T steps, C channels,
H W image.
"""

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from harmonica.samplers.noise import SampleKeys

MOST_VALUES = 2**24
"""Numbers that are drawn at once: 64 MiB in float32, all steps of a usual trajectory."""


def drawn_noise(keys: SampleKeys, steps: range, like_NCHW: Tensor) -> Tensor:
    """Draw the noise of some steps (N, len(steps), C, H, W), on the host.

    Args:
        like_NCHW: what the samples start from; their noise has its shape and precision.
    """
    shape = tuple(like_NCHW.shape[1:])
    return torch.stack([torch.from_numpy(keys.step_noise(i, shape)) for i in steps], 1).to(like_NCHW.dtype)


class StepNoise(Sequence[Tensor]):
    """The noise (N, C, H, W) of every step, copied in few parts."""

    def __init__(self, keys: SampleKeys, num_steps: int, like_NCHW: Tensor) -> None:
        """Draw nothing yet.

        Args:
            like_NCHW: what the samples start from; their noise has its shape, precision and device.
        """
        self._keys, self._num_steps, self._like = keys, num_steps, like_NCHW[:0]
        self._at_once = max(1, MOST_VALUES // max(1, len(keys.seeds) * math.prod(like_NCHW.shape[1:])))
        self._drawn: tuple[range, Tensor] = range(0), like_NCHW[:0]

    def __len__(self) -> int:
        return self._num_steps

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        steps, noise_NKCHW = self._drawn
        if index not in steps:
            steps = range(max(0, index + 1 - self._at_once), index + 1)
            noise_NKCHW = drawn_noise(self._keys, steps, self._like).to(self._like.device)
            self._drawn = steps, noise_NKCHW
        return noise_NKCHW[:, index - steps.start]
