"""Settings that a new version must meet before it becomes the champion."""

from typing import Annotated, Literal

from harmonica.validation.settings import Cure, Field, settings

Promote = Literal["never", "gate", "always"]
_Bound = Annotated[float, Field(ge=0)]


@settings("promotion")
class PromoteConfig:
    """The bounds of the gate, on what the stage evaluate measured."""

    min_psnr_to_full: _Bound = 20.0
    """Mean PSNR to the full sampler's images in dB, at least; 0 asks for none. Set it to what users
    accept."""
    max_frechet_to_full: _Bound = 0.0
    """Frechet distance to the full sampler's images, at most, where it is measured; 0 asks for none. Its
    scale is that of the features, and it falls with the number of images."""
    min_speedup: Annotated[float, Field(ge=1), Cure("1 or more; 1 is the full sampler's")] = 1.1
    """Measured speedup over the full sampler, at least. Raise it to what makes a router worth its upkeep."""
    beat_fewer_steps: bool = True
    """Require images nearer to the full sampler's than those of fewer steps at the same measured time. Off
    only for trials, since fewer steps are the free alternative."""
    beat_champion: bool = True
    """Require a higher score than the present champion's, where the two can be compared. Off where another
    speed is wanted."""
    db_per_doubling: _Bound = 12.0
    """The score of a version is its PSNR in dB plus this many for every doubling of its speed. Sampling in
    fewer steps costs the built-in model some 14 a doubling (38.8 dB at 1.52x, 33.5 at 1.98x). Raise it to
    prefer speed."""
