"""Settings of the stage sweep: what it varies, and how it searches."""

from typing import Annotated, Literal

from harmonica.training.iepo import IepoKind
from harmonica.validation.settings import Count, Field, require, settings

Search = Literal["grid", "asha"]
_DEFAULTS = {"target_speedup": (1.2, 1.4, 1.6, 2.0), "target_cur": (0.2, 0.3, 0.4, 0.5)}
Target = Literal["target_cur", "target_speedup"]
LambdaKind = IepoKind | Literal["none"]


@settings("sweep")
class SweepConfig:
    """The settings of a sweep: many short trainings on Ray Tune.

    All that is not varied is the run's own settings.
    """

    over: Target = "target_speedup"
    """The setting of training that `targets` are of: a share where results are compared with the paper, else
    a speed."""
    targets: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """Speedups, or shares of reused entries. None: speedups 1.2, 1.4, 1.6 and 2, or shares 0.2, 0.3, 0.4 and
    0.5. Give those between which to choose."""
    iepo: tuple[LambdaKind, ...] = ()
    """Research: Ways to measure lambda; none: that of train.iepo."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**62)], ...] = ()
    """Seeds of training; none: the run's. Give several to tell a better setting from chance. All are
    evaluated on the same rows, which none was trained on."""
    search: Search = "grid"
    """Train every combination to its end (grid), or stop early those whose score falls behind (asha). The
    score is that of promotion, by ideal speedup. Give asha for more than some ten combinations."""
    report_every: Count = 10
    """Trajectories between reports and checkpoints of a trial. Fewer let asha stop trials earlier, and cost
    the sampling of report_samples images more often."""
    report_samples: Count = 8
    """Images of each report's PSNR; raise it if asha stops trials by chance."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """asha: one of this many trials that get as far goes on. Raise it for large sweeps that must be cheap."""
    max_concurrent: Count = 2
    """Trials at once, one core or, with train.use_gpu, one GPU each; raise it to what is free."""

    def __post_init__(self) -> None:
        for name in ("targets", "iepo", "seeds"):
            values = getattr(self, name) or ()
            require(len(set(values)) == len(values), f"sweep.{name}", values, "give each value once")
        is_cur = self.over == "target_cur"
        good = all(0 < target < 1 if is_cur else target > 1 for target in self.all_targets)
        cure = f"give values {'above 0 and below' if is_cur else 'above'} 1 for sweep.over {self.over}"
        require(good, "sweep.targets", self.targets, cure)

    @property
    def all_targets(self) -> tuple[float, ...]:
        """Return the targets that are given, or the defaults if there are none."""
        return self.targets or _DEFAULTS[self.over]
