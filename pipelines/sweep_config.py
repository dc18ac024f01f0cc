"""What a sweep varies, and how it searches."""

from dataclasses import dataclass
from typing import Literal, get_args

from harmonica.iepo import KINDS, IepoKind
from pipelines.checks import require

Search = Literal["grid", "asha"]
Target = Literal["target_cur", "target_speedup"]
LambdaKind = IepoKind | Literal["none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Many short trainings on Ray Tune; all that is not varied is the run's own settings."""

    over: Target = "target_speedup"
    """The setting of training that `targets` are of."""
    targets: tuple[float, ...] = (1.2, 1.4, 1.6, 2.0)
    """Speedups, or shares of reused entries."""
    iepo: tuple[LambdaKind, ...] = ()
    """Ways to measure lambda; none: that of train.iepo."""
    seeds: tuple[int, ...] = ()
    """Of training; none: the run's. All are judged on the same rows, which none was trained on."""
    search: Search = "grid"
    """Train every combination to its end (grid), or stop early those whose score falls behind (asha). The
    score is that of promotion, by ideal speedup."""
    report_every: int = 10
    """Trajectories between reports and checkpoints of a trial."""
    report_samples: int = 8
    """Images of each report's PSNR."""
    reduction_factor: int = 2
    """asha: of so many trials that get as far, one goes on."""
    max_concurrent: int = 2
    """Trials at once, one core or, with train.use_gpu, one GPU each."""

    def __post_init__(self) -> None:
        kinds = get_args(Search)
        require(self.search in kinds, "sweep.search", self.search, f"give one of {', '.join(kinds)}")
        kinds = get_args(Target)
        require(self.over in kinds, "sweep.over", self.over, f"give one of {', '.join(kinds)}")
        for name in ("report_every", "report_samples", "max_concurrent"):
            require(getattr(self, name) >= 1, f"sweep.{name}", getattr(self, name), "give 1 or more")
        require(self.reduction_factor >= 2, "sweep.reduction_factor", self.reduction_factor, "give 2 or more")
        for name in ("targets", "iepo", "seeds"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"sweep.{name}", values, "give each value once")
        require(bool(self.targets), "sweep.targets", self.targets, "give one or more")
        is_cur = self.over == "target_cur"
        good = all(0 < t < 1 if is_cur else 1 < t < float("inf") for t in self.targets)
        cure = "give values above 0 and below 1" if is_cur else "give values above 1"
        require(good, "sweep.targets", self.targets, cure)
        unknown = [kind for kind in self.iepo if kind not in (*KINDS, "none")]
        require(not unknown, "sweep.iepo", unknown, f"give some of {', '.join(KINDS)}, none")
        require(all(0 <= seed < 2**62 for seed in self.seeds), "sweep.seeds", self.seeds, "give 0 or more")
