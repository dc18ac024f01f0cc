"""What the stage `compare` compares."""

from dataclasses import dataclass

from pipelines.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """HarmoniCa beside what else one could do, on the same noise, at the same speeds."""

    targets: tuple[float, ...] = (1.2, 1.4, 1.6, 2.0)
    """Ideal speedups at which methods meet; other libraries take none, and stand where they come to."""
    seeds: int = 1
    """Routers that each learning method trains at each speed; their spread is the method's."""
    samples: int = 256
    """Images of each arm."""
    learners: bool = True
    """Train the rivals that learn: the paper's setting, the released code's, without IEPO,
    Learning-to-Cache."""
    libraries: bool = True
    """Sample with the caches of diffusers and, where it is installed, cache-dit; class-conditional models
    only."""

    def __post_init__(self) -> None:
        require(
            bool(self.targets) and all(1 < target <= 10 for target in self.targets),
            "compare.targets",
            self.targets,
            "give speeds above 1, at most 10",
        )
        require(1 <= self.seeds <= 100, "compare.seeds", self.seeds, "give 1 to 100")
        require(16 <= self.samples <= 50_000, "compare.samples", self.samples, "give 16 to 50000")
