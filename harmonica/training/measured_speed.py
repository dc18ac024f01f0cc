"""Translate speeds in measured time into speeds in MACs (`train.speed`).

A plan that reuses a share f of its steps takes (1 - f) + f r of the time of full sampling, where r is the
time of a reused step over that of a computed one, and (1 - f) + f m of its MACs, where m is what is never
reused.
"""

import dataclasses
from typing import TypeVar

from harmonica.models.base import Macs
from harmonica.training.config import TrainingConfig
from harmonica.validation.settings import SettingError

_Config = TypeVar("_Config", bound=TrainingConfig)


def in_macs(config: _Config, reused_share: float, macs: Macs, num_steps: int) -> _Config:
    """Return the settings with target speeds in MACs in place of those in time.

    Args:
        reused_share: the time of a reused step over that of a computed one.

    Raises:
        SettingError: reuse is not that fast with this model on this machine.
    """

    def translated(speedup: float, field: str) -> float:
        return macs_speedup(speedup, reused_share, macs, num_steps, field=field)

    main = translated(config.target_speedup, "train.target_speedup")
    others = tuple(translated(one, "train.targets") for one in config.targets)
    return dataclasses.replace(config, target_speedup=main, targets=others)


def macs_speedup(
    speedup: float, reused_share: float, macs: Macs, num_steps: int, *, field: str = "train.target_speedup"
) -> float:
    """Return the speed in MACs of the plan of whole steps that has a speed in time.

    Raises:
        SettingError: no plan has it; names the field.
    """
    most = num_steps / (1 + (num_steps - 1) * reused_share)
    if not speedup <= most:
        cure = f"give less than {most:.3g}" if most > 1 else "give train.speed macs"
        raise SettingError(
            f"{field} is {speedup:g} of measured time: a reused step takes {reused_share:.0%} of the time of "
            f"a computed one here, {cure}"
        )
    reused = (1 - 1 / speedup) / (1 - reused_share)
    return 1 / (1 - reused * sum(macs.branches) / macs.full)
