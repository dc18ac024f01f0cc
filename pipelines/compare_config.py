"""What the stage `compare` compares."""

from typing import Annotated

from harmonica.settings import Field, settings


@settings("compare")
class CompareConfig:
    """HarmoniCa beside what else one could do, on the same noise, at the same speeds."""

    targets: Annotated[tuple[Annotated[float, Field(gt=1, le=10)], ...], Field(min_length=1)] = (
        1.2,
        1.4,
        1.6,
        2.0,
    )
    """Ideal speedups at which methods meet; other libraries take none, and stand where they come to."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Routers that each learning method trains at each speed; their spread is the method's."""
    samples: Annotated[int, Field(ge=16, le=50_000)] = 256
    """Images of each arm."""
    learners: bool = True
    """Train the rivals that learn: the paper's setting, the released code's, without IEPO,
    Learning-to-Cache."""
    libraries: bool = True
    """Sample with the caches of diffusers and, where it is installed, cache-dit; class-conditional models
    only."""
