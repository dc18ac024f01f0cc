"""Settings of a router's training, and what of them is refused."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from harmonica.forecast_config import ForecastConfig
from harmonica.iepo import KINDS, IepoKind
from harmonica.sdt import SdtConfig

_MOST_TARGETS = 20

Initial = Literal["constant", "alternate", "normal", "even", "measured"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Router training, wherever it runs."""

    trajectories: int = 60
    """Trajectories in all; each updates every row of the router once."""
    batch_size: int = 8
    """(label, noise) rows of one trajectory, over all workers."""
    micro_batch_size: int = 0
    """Rows that a worker computes at a time, where its share does not fit in memory; 0 is all of it. An
    update is that of the whole batch all the same."""
    shard_model: bool = False
    """Every worker holds its share of the frozen weights (FSDP2), where one GPU cannot hold them all."""
    sdt: SdtConfig = field(default_factory=SdtConfig)
    """Objective and optimiser."""
    target_cur: float = 0.0
    """When above 0, beta follows from this share of reused entries; else beta stays as set."""
    target_speedup: float = 0.0
    """When above 1, beta follows from this ideal speedup, MACs of full sampling over those of the plan, and
    the plan is cut where it meets it."""
    targets: tuple[float, ...] = ()
    """More ideal speedups: a router for each of them too, from the same measured start, trained as the one of
    `target_speedup` is, after it."""
    target_psnr: float = 0.0
    """When above 0, in its place: as fast as a measured start can be whose images are so near to the full
    ones, in dB of values in [-1, 1]. Fitted forecasts come on top."""
    initial: Initial = "constant"
    """Logits to start from: all `initial_logit`, that with its sign changing from step to step, standard
    normal (the released code), or steps reused that meet the target speedup: evenly spread, or those that
    change the image least (`harmonica.start`)."""
    start_trajectories: int = 0
    """Trajectories on which a measured start is measured; each costs some T full ones."""
    initial_logit: float = 5.0
    """Where all but normal logits start; 5 computes everything."""
    iepo: IepoKind | Literal["none"] = "leave_one_out"
    """How lambda is measured: the paper's way, the released code's (cumulative), per unit of step error
    (sensitivity), or not at all (all ones)."""
    iepo_every: int = 20
    """Trajectories between refreshes of lambda (the paper's C)."""
    choice_trajectories: int = 0
    """Trajectories, once the router is trained, on which its plan is held against the one that it started
    from, image against image; the nearer one is kept. 0 keeps what was trained."""
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    """Weights of the plan's forecasts, fitted in the end."""
    checkpoint_interval_s: float = 20.0
    """Seconds between checkpoints: the work an interruption can cost."""

    def __post_init__(self) -> None:
        for name in ("trajectories", "batch_size", "iepo_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}: give 1 or more")
        if self.micro_batch_size < 0:
            raise ValueError(
                f"train.micro_batch_size is {self.micro_batch_size}: give 1 or more, or 0 for all at once"
            )
        if not 0 <= self.target_cur < 1:
            raise ValueError(f"train.target_cur is {self.target_cur}: give 0 to below 1")
        if self.target_speedup and self.target_speedup <= 1:
            raise ValueError(
                f"train.target_speedup is {self.target_speedup}: give a number above 1, or 0 for none"
            )
        if self.target_speedup and self.target_cur:
            raise ValueError(
                f"train.target_speedup is {self.target_speedup} and train.target_cur {self.target_cur}: give "
                "one of them, and 0 for the other"
            )
        if self.targets and not self.target_speedup:
            raise ValueError(
                f"train.targets is {self.targets} and train.target_speedup {self.target_speedup}: give the "
                "speed of the first router as well"
            )
        if len(self.targets) > _MOST_TARGETS or not all(target > 1 for target in self.targets):
            raise ValueError(f"train.targets is {self.targets}: give at most {_MOST_TARGETS} numbers above 1")
        if self.choice_trajectories < 0:
            raise ValueError(f"train.choice_trajectories is {self.choice_trajectories}: give 0 or more")
        if self.iepo not in (*KINDS, "none"):
            raise ValueError(f"train.iepo is {self.iepo!r}: give one of {', '.join(KINDS)}, none")
        if self.initial not in get_args(Initial):
            raise ValueError(f"train.initial is {self.initial!r}: give one of {', '.join(get_args(Initial))}")
        if self.target_psnr < 0 or (self.target_psnr and (self.target_speedup or self.target_cur)):
            raise ValueError(
                f"train.target_psnr is {self.target_psnr}: give decibels above 0, and 0 for "
                "train.target_speedup and train.target_cur"
            )
        if self.target_psnr and self.initial != "measured":
            raise ValueError(f"train.target_psnr is {self.target_psnr}: give train.initial measured with it")
        if self.initial in ("even", "measured") and not (self.target_speedup or self.target_psnr):
            raise ValueError(
                f"train.initial is {self.initial!r} and train.target_speedup 0: give the speed it is to have"
            )
        if (self.initial == "measured") != (self.start_trajectories > 0):
            raise ValueError(
                f"train.start_trajectories is {self.start_trajectories} and train.initial {self.initial!r}: "
                "give 1 or more with initial measured, and 0 with any other"
            )
        if self.forecast.trajectories and self.sdt.reuse != "forecast":
            raise ValueError(
                f"train.forecast.trajectories is {self.forecast.trajectories} and train.sdt.reuse is "
                f"{self.sdt.reuse}: give reuse forecast, or 0 trajectories"
            )

    @property
    def others(self) -> tuple[float, ...]:
        """`targets` as they come, each once, without `target_speedup`."""
        return tuple(target for target in dict.fromkeys(self.targets) if target != self.target_speedup)

    @property
    def all_trajectories(self) -> int:
        """Those of the start, and for each speed those of the router, the choice and the forecasts."""
        each = self.trajectories + self.choice_trajectories + self.forecast.trajectories
        return self.start_trajectories + each * (1 + len(self.others))
