"""Settings of the stage compare; a line under each field says what it does."""

from collections.abc import Mapping
from typing import Annotated, Any

from harmonica.validation.settings import Field, settings

_ADD_OR_DROP_VARIANTS = ("targets", "seeds", "learners", "published", "libraries")
_MAY_GROW = "samples"


@settings("compare")
class CompareConfig:
    """The settings of a comparison of our routers with other methods.

    They sample the same noise at the same speeds. All of it may change when a run is resumed, but for
    `samples`, which may only grow: variants are added or dropped, and measured anew on more images.
    """

    targets: Annotated[tuple[Annotated[float, Field(gt=1, le=10)], ...], Field(min_length=1)] = (
        1.2,
        1.4,
        1.6,
        2.0,
    )
    """Ideal speedups at which methods meet; other libraries take none, and stand where they come to. Give the
    speeds that you may serve."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Routers that each learning method trains at each speed; their spread is the method's. Give 3 or more
    before ranking methods that are near each other."""
    samples: Annotated[int, Field(ge=16, le=50_000)] = 256
    """Images of each variant; a run that is resumed may have more, not fewer. More make the intervals
    narrower."""
    learners: bool = True
    """Train what else learns: HarmoniCa in the paper's setting and in the released code's, SDT without IEPO,
    Learning-to-Cache. Off saves most of the time."""
    published: bool = True
    """Sample by published forecasts and schedules over the same branches: TaylorSeer of orders 2 to 4 and on
    its own intervals, HiCache, FoCa, Spectrum, L2P, SpeCa, DBCache, TeaCache, MagCache and BudCache. Turn it
    off for a quick comparison."""
    libraries: bool = True
    """Sample with the caches of diffusers and, where it is installed, cache-dit; class-conditional models
    only. Off to compare with learned and simple plans alone."""


def free_to_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return names of settings that may differ when a run is resumed.

    An example is `compare.targets`.

    Args:
        before: those of this section that the run has so far, as JSON has them.
        now: those that are given.
    """
    free = {*_ADD_OR_DROP_VARIANTS}
    if now[_MAY_GROW] >= before.get(_MAY_GROW, 0):
        free.add(_MAY_GROW)
    return {f"compare.{name}" for name in free}
