"""What a new version must show before it becomes the champion."""

from dataclasses import dataclass
from typing import Literal

from pipelines.checks import require

Promote = Literal["never", "gate", "always"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteConfig:
    """The gate; every bound is on what the stage evaluate measured."""

    min_psnr_to_full: float = 20.0
    """Mean PSNR to the full sampler's images in dB, at least; 0 asks for none."""
    max_frechet_to_full: float = 0.0
    """Frechet distance to the full sampler's images, at most, where it is measured; 0 asks for none. Its
    scale is that of the features, and it falls with the number of images."""
    min_speedup: float = 1.1
    """Measured speedup over the full sampler, at least."""
    beat_fewer_steps: bool = True
    """Nearer to the full sampler's images than fewer steps at the same measured time."""
    beat_champion: bool = True
    """A higher score than the present champion's, where the two can be compared."""
    db_per_doubling: float = 12.0
    """A version's score is its PSNR in dB plus this many for every doubling of its speed. Sampling in fewer
    steps costs the built-in model some 14 a doubling (38.8 dB at 1.52x, 33.5 at 1.98x)."""

    def __post_init__(self) -> None:
        for name in ("min_psnr_to_full", "max_frechet_to_full", "db_per_doubling"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"promotion.{name}", value, "give 0 or more")
        require(
            1 <= self.min_speedup < float("inf"),
            "promotion.min_speedup",
            self.min_speedup,
            "give 1 or more; 1 is the full sampler's",
        )
