"""Check that a model and its steps can be trained for a target.

The checks run before anything starts.
"""

import math

from harmonica.core.plan_builders import even_plan, fastest_speedup, slowest_speedup
from harmonica.models.base import BranchedTransformer, Macs
from harmonica.models.vae import draws_pixels
from harmonica.training.config import OF_STEPS, TrainingConfig
from harmonica.validation.settings import SettingError, require


def check_training(
    config: TrainingConfig,
    model: BranchedTransformer,
    num_steps: int,
    *,
    field: str = "",
    has_pictures: bool | None = None,
) -> None:
    """Check that the model can be trained for the target of these settings.

    Args:
        field: the setting that the target came from, where it is none of `train`.
        has_pictures: whether training sees pictures; by default, whether the model draws pixels.

    Raises:
        SettingError: a target is beyond what T steps of this model can be planned for, or so low that nothing
            would be reused; or it is one of pictures, and training sees latents alone.
    """
    macs = model.macs()
    if config.target_speedup:
        check_speedup(config.target_speedup, macs, num_steps, field=field or "train.target_speedup")
    for speedup in config.extra_targets:
        check_speedup(speedup, macs, num_steps, field=field or "train.targets")
    if config.target_cur:
        _check_cur(config, macs, num_steps, field or "train.target_cur")
    check_quality_target(config, draws_pixels(model) if has_pictures is None else has_pictures)


def check_quality_target(config: TrainingConfig, has_pictures: bool) -> None:
    """Check that training sees pictures where the target is their quality.

    Raises:
        SettingError: it sees latents alone.
    """
    require(
        not config.target_psnr or has_pictures,
        "train.target_psnr",
        config.target_psnr,
        "the model draws latents, and their distances are no decibels of pictures: give 0, and the speed in "
        "train.target_speedup instead",
    )


def check_speedup(speedup: float, macs: Macs, num_steps: int, *, field: str) -> None:
    """Check that there is a plan of this speed.

    Raises:
        SettingError: no plan of T steps has this speed, or it asks for less reuse than there can be.
    """
    least, most = slowest_speedup(num_steps, macs), fastest_speedup(num_steps, macs)
    if speedup > most:
        raise SettingError(
            f"{field} is {speedup}: {_steps(num_steps)} reach {_down(most, 2)} at most, give no more"
        )
    if even_plan(num_steps, macs, speedup).cur == 0:
        raise SettingError(
            f"{field} is {speedup}: {_steps(num_steps)} would reuse nothing for that, give "
            f"{-_down(-least, 3)} or more"
        )


def _check_cur(config: TrainingConfig, macs: Macs, num_steps: int, field: str) -> None:
    """Refuse a share of reuse above (T-1)/T: row T-1 is always computed."""
    entries = num_steps * len(macs.branches)
    most, least = (num_steps - 1) / num_steps, 1 / entries
    if config.initial in OF_STEPS:
        slowest = slowest_speedup(num_steps, macs)
        least = max(least, (1 - 1 / slowest) * macs.full / sum(macs.branches))
    require(
        least <= config.target_cur <= most,
        field,
        config.target_cur,
        f"give {-_down(-least, 4)} to {_down(most, 3)}, which {_steps(num_steps)} can reuse",
    )


def _steps(count: int) -> str:
    return f"{count} steps of this model (sampler.num_inference_steps)"


def _down(number: float, digits: int) -> float:
    unit = 10.0**digits
    return math.floor(number * unit) / unit
