"""The settings of a router's training, and the checks that refuse some of them."""

import dataclasses
import math
from dataclasses import field
from typing import Annotated, Any, Literal, Self

from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.iepo import IepoKind
from harmonica.training.sdt_config import SdtConfig
from harmonica.validation.settings import Count, Cure, Field, Natural, SettingError, require, settings

_MOST_TARGETS = 20
TARGETS = ("target_cur", "target_speedup", "target_psnr")
"""The fields that hold a target; a training sets at most one of them."""
OF_STEPS = ("even", "measured")
"""The values of `initial` that are plans of whole steps."""
Initial = Literal["constant", "alternate", "normal", "even", "measured"]


@settings("train")
class TrainingConfig:
    """The settings of a router's training, with Ray or without."""

    trajectories: Count = 60
    """Number of trajectories of the router phase; each updates every row of the router once. More make a
    better router and take as much longer."""
    batch_size: Count = 8
    """Number of samples (label, noise) of one trajectory, over all workers. More give steadier updates, each
    as much slower."""
    micro_batch_size: Annotated[Natural, Cure("1 or more, or 0 for all at once")] = 0
    """Number of samples that a worker computes at a time, where its share does not fit in memory; 0 is the
    whole share. Each update is that of the whole batch either way. Lower it if a worker runs out of
    memory."""
    shard_model: bool = False
    """Every worker holds its share of the frozen weights (FSDP2), where one GPU cannot hold them all."""
    sdt: SdtConfig = field(default_factory=SdtConfig)
    """Settings of the objective and of the optimiser."""
    target_cur: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """When above 0, beta follows from this share of reused entries; else beta stays as set. Give it to
    compare with the paper, whose tables state this share; else give target_speedup."""
    target_speedup: Annotated[float, Field(ge=0), Cure("a number above 1, or 0 for none")] = 0.0
    """When above 1, beta follows from this ideal speedup, MACs of full sampling over those of the plan, and
    the plan is cut where it meets it. This is the setting to choose first: more speed is less quality."""
    targets: Annotated[tuple[Annotated[float, Field(gt=1)], ...], Field(max_length=_MOST_TARGETS)] = ()
    """More ideal speedups. Each has a router of its own, trained after the one of `target_speedup`, in the
    same way and from the same measured start. Give them to serve several speeds."""
    speed: Literal["macs", "measured"] = "macs"
    """What the target speeds count. `macs`: multiply-accumulates. `measured`: the time of sampling, as it is
    measured before training, at its batch size and level of execution; the run says the speed in MACs that it
    amounts to. A sweep and a comparison count MACs. Give it where what is wanted is a shorter time."""
    target_psnr: Annotated[float, Field(ge=0)] = 0.0
    """When above 0, the target is quality: the speed is the highest at which the images of a measured start
    reach this PSNR to the full ones, in dB of values in [-1, 1]. It is for models that draw pixels and for
    pipelines with a VAE, and counts no fitted forecasts. Give it where the quality is fixed, not the
    speed."""
    budget: Annotated[float, Field(ge=0), Cure("minutes above 0, or 0 for none")] = 0.0
    """Minutes that the training of all routers may take, the model loaded; 0 is no limit. When above 0, the
    numbers of trajectories follow from it, more or fewer than those set: a full sampling is timed first, and
    the run says what it will do. Phases that are set to 0 stay out; a sweep and a comparison train with the
    numbers as set. Give it where time is what you know."""
    initial: Initial = "constant"
    """Research: Logits that training starts from. `constant`: all are `initial_logit`. `alternate`: its sign
    changes from step to step. `normal`: they are drawn from the standard normal distribution (the released
    code). `even` and `measured`: whole steps are reused, as many as the target says, evenly spread or those
    that change the image least (`harmonica.training.plans.search`). Short trainings need `measured`."""
    start_trajectories: Natural = 0
    """Research: Number of trajectories on which the image's gradients are measured, of which a measured start
    is made. Each takes about six full samplings of its samples, ten where branches are computed again."""
    initial_logit: Annotated[float, Field(ge=-100, le=100)] = 5.0
    """Research: The size of the first logits, unless they are normal; 5 computes everything."""
    iepo: IepoKind | Literal["none"] = "leave_one_out"
    """Research: The measure of lambda. `leave_one_out`: as in the paper (Section 4.3). `cumulative`: as in
    the released code. `sensitivity`: leave-one-out per unit of the step's error. `none`: not measured, all
    are 1."""
    iepo_every: Count = 20
    """Research: Number of trajectories between refreshes of lambda (the paper's C)."""
    choice_trajectories: Natural = 0
    """Research: Number of trajectories on which the trained router's plan is compared with the one that it
    started from, by their images; the plan nearer to the full sampler is kept. 0 keeps the trained one."""
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    """Settings of the fit of the plan's forecast weights, which comes last."""
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 20.0
    """Seconds between checkpoints, and so the most work that an interruption costs. Raise it for trainings of
    hours."""

    def __post_init__(self) -> None:
        self._check_targets()
        self._check_start()
        if self.forecast.trajectories and self.sdt.reuse != "forecast":
            raise SettingError(
                f"train.forecast.trajectories is {self.forecast.trajectories} and train.sdt.reuse is "
                f"{self.sdt.reuse}: give reuse forecast, or 0 trajectories"
            )

    def _check_targets(self) -> None:
        """Refuse more than one target, and `targets` without `target_speedup`."""
        require(
            self.target_speedup == 0 or self.target_speedup > 1,
            "train.target_speedup",
            self.target_speedup,
            "give a number above 1, or 0 for none",
        )
        if self.target_speedup and self.target_cur:
            raise SettingError(
                f"train.target_speedup is {self.target_speedup} and train.target_cur {self.target_cur}: give "
                "one of them, and 0 for the other"
            )
        require(
            self.speed == "macs" or self.target_speedup > 0,
            "train.speed",
            self.speed,
            "give macs, or the speed in train.target_speedup; for a target of quality or of reuse, the "
            "evaluation tells the speed in time",
        )
        if self.targets and not self.target_speedup:
            raise SettingError(
                f"train.targets is {self.targets} and train.target_speedup {self.target_speedup}: give the "
                "speed of the first router as well"
            )
        require(
            not (self.target_psnr and (self.target_speedup or self.target_cur)),
            "train.target_psnr",
            self.target_psnr,
            "give decibels above 0, and 0 for train.target_speedup and train.target_cur",
        )
        require(
            self.target_psnr == 0 or self.initial == "measured",
            "train.target_psnr",
            self.target_psnr,
            "give train.initial measured with it, or 0",
        )

    def _check_start(self) -> None:
        """Refuse a start of whole steps without a target, or a choice without a start."""
        is_of_steps = self.initial in OF_STEPS
        if is_of_steps and not self.has_target:
            raise SettingError(
                f"train.initial is {self.initial!r} and train.target_speedup 0: give the speed that it is to "
                "have, or train.target_cur"
            )
        if (self.initial == "measured") != (self.start_trajectories > 0):
            raise SettingError(
                f"train.start_trajectories is {self.start_trajectories} and train.initial {self.initial!r}: "
                "give 1 or more with initial measured, and 0 with any other"
            )
        require(
            is_of_steps or self.choice_trajectories == 0,
            "train.choice_trajectories",
            self.choice_trajectories,
            f"give 0 with train.initial {self.initial}, which reuses no more than it happens to: there is "
            "nothing to fall back to; or train.initial even or measured",
        )
        # A target of speed moves the cut between the scores; else it is at tau.
        least = abs(math.log(self.sdt.threshold / (1 - self.sdt.threshold))) if self.target_cur else 0.0
        require(
            not is_of_steps or self.initial_logit > least,
            "train.initial_logit",
            self.initial_logit,
            f"give a number above {math.ceil(100 * least) / 100:g} with train.initial {self.initial}, so "
            "that scores lie on both sides of train.sdt.threshold, where train.target_cur is counted",
        )

    def for_target(self, **target: float) -> Self:
        """Return these settings with another target in place of all.

        For example `target_speedup=1.5`.
        """
        changes: dict[str, Any] = {**dict.fromkeys(TARGETS, 0.0), "targets": (), **target}
        return dataclasses.replace(self, **changes)

    @property
    def has_target(self) -> bool:
        """Return whether beta follows from a target."""
        return any(getattr(self, name) for name in TARGETS)

    @property
    def extra_targets(self) -> tuple[float, ...]:
        """Return `targets` in order, each once, without `target_speedup`."""
        return tuple(target for target in dict.fromkeys(self.targets) if target != self.target_speedup)

    @property
    def all_trajectories(self) -> int:
        """Return the number of trajectories of all phases and all target speeds."""
        each = self.trajectories + self.choice_trajectories + self.forecast.trajectories
        return self.start_trajectories + each * len(self._speeds)

    @property
    def _speeds(self) -> tuple[float, ...]:
        """Return the target speeds; the first is 1 without a target, and for a quality."""
        return (self.target_speedup or 1 / (1 - self.target_cur), *self.extra_targets)
