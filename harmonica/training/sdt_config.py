"""The settings of step-wise denoising training."""

from typing import Annotated, Literal

from harmonica.core.cache import Reuse
from harmonica.validation.settings import Field, settings

Student = Literal["soft", "hard"]
"""What trajectories follow, in training and for lambda: the soft scores (the paper), or their plan."""


@settings("train.sdt")
class SdtConfig:
    """The router's objective and optimiser."""

    beta: Annotated[float, Field(ge=0, le=1e6)] = 0.007
    """Weight of the sum of scores against lambda_i * MSE: larger means more reuse. Touch it only where no
    target is set, since it then decides the speed."""
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 0.01
    """Research: Learning rate of AdamW, which has no weight decay. Raise it for short trainings."""
    epsilon: Annotated[float, Field(ge=1e-37, le=1)] = 1e-8
    """Research: Epsilon of AdamW. Gradients below it hardly move a logit, and they shrink with lambda, which
    is in squared latents: smaller where beta follows from a target."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Research: The threshold tau: r > tau computes the branch and refreshes its cache."""
    clamp: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Research: Logits stay within [-clamp, clamp]."""
    reuse: Reuse = "hold"
    """A reused branch holds its last value (the paper), or is forecast from its last two, as in all presets
    of learned steps."""
    student: Student = "soft"
    """Research: What later steps start from and the cache takes: what soft scores give (the paper), or what
    the plan does that they make at tau, as in sampling. Gradients are those of the soft pass either way."""
    objective: Literal["stepwise", "pairwise"] = "stepwise"
    """Research: Every step follows the student before it (SDT), or every second step reuses what the full
    step before it computed, along full trajectories (Learning-to-Cache, arXiv 2406.01733, equation 8)."""
    penalty: Literal["count", "macs"] = "count"
    """Research: Beta counts entries (the paper), or their multiply-accumulates, 1 on average: so that time is
    saved."""
    activation_checkpointing: bool = False
    """Compute the student's branches again in the backward instead of keeping what they need: a fraction of
    the memory for about a third more time, the same update. On if a worker runs out of memory with a micro
    batch of 1."""
