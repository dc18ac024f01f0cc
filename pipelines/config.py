"""Every setting of the workflow. This file is the manual: a line under each field says what it does.

Presets are functions that return a whole `WorkflowConfig`; the command line overrides single fields,
as in `python workflow.py fashion --train.trajectories 50`.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from harmonica.iepo import KINDS, IepoKind
from harmonica.models.dit import DiTConfig
from harmonica.models.loading import ModelConfig
from harmonica.samplers import SamplerConfig
from harmonica.sdt import SdtConfig

Stage = Literal["train", "evaluate", "register", "serve"]
STAGES: tuple[Stage, ...] = ("train", "evaluate", "register", "serve")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _require(condition: bool, field_name: str, value: object, cure: str) -> None:
    if not condition:
        raise ValueError(f"{field_name} is {value!r}: {cure}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Router training on Ray Train."""

    trajectories: int = 60
    """Trajectories in all; each updates every row of the router once."""
    batch_size: int = 8
    """(label, noise) rows of one trajectory, over all workers."""
    num_workers: int = 2
    """Ray Train workers, one core or GPU each."""
    use_gpu: bool = False
    """One GPU a worker."""
    sdt: SdtConfig = field(default_factory=SdtConfig)
    """Objective and optimiser."""
    target_cur: float = 0.0
    """When above 0, beta follows from this share of reused entries; else beta stays as set."""
    initial: Literal["constant", "alternate"] = "constant"
    """Logits to start from: all `initial_logit`, or that sign changing from step to step."""
    initial_logit: float = 5.0
    """Where the logits start; 5 computes everything."""
    iepo: IepoKind | Literal["none"] = "leave_one_out"
    """How lambda is measured: the paper's way, the released code's (cumulative), per unit of step error
    (sensitivity), or not at all (all ones)."""
    iepo_every: int = 20
    """Trajectories between refreshes of lambda (the paper's C)."""
    checkpoint_interval_s: float = 20.0
    """Seconds between checkpoints: the work an interruption can cost."""
    max_failures: int = 3
    """Worker failures survived, each from the last checkpoint."""

    def __post_init__(self) -> None:
        _require(self.trajectories >= 1, "train.trajectories", self.trajectories, "give 1 or more")
        _require(self.num_workers >= 1, "train.num_workers", self.num_workers, "give 1 or more")
        _require(
            self.batch_size >= self.num_workers and self.batch_size % self.num_workers == 0,
            "train.batch_size",
            self.batch_size,
            f"give a multiple of train.num_workers ({self.num_workers}), so that workers share evenly",
        )
        _require(0 <= self.target_cur < 1, "train.target_cur", self.target_cur, "give 0 to below 1")
        _require(self.iepo_every >= 1, "train.iepo_every", self.iepo_every, "give 1 or more")
        _require(
            self.iepo in (*KINDS, "none"), "train.iepo", self.iepo, f"give one of {', '.join(KINDS)}, none"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Sampling the same noise full, cached and with fewer steps, and judging the images."""

    samples: int = 512
    """Images of each arm; a cluster takes 50,000 by the same code."""
    batch_size: int = 32
    """Images an actor samples at once."""
    num_actors: int = 2
    """Ray Data actors, each with its own copy of the model."""
    use_gpu: bool = False
    """One GPU an actor."""
    timing_rounds: int = 5
    """Times each arm is timed, in turn; the medians are compared."""
    timing_batch_size: int = 8
    """Images of one timed batch."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "num_actors", "timing_rounds", "timing_batch_size"):
            _require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "give 1 or more")
        _require(self.samples >= 16, "evaluate.samples", self.samples, "give 16 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network."""
    port: int = 8000
    """Port to listen on."""
    num_replicas: int = 1
    """Sampling replicas, each with its own copy of the model."""
    num_cpus: float = 1.0
    """Cores of a replica; torch uses as many threads."""
    use_gpu: bool = False
    """One GPU a replica."""
    max_batch_size: int = 16
    """Images sampled in one trajectory."""
    batch_wait_s: float = 0.02
    """How long a request waits for others to share its trajectory."""
    max_images_per_request: int = 10
    """Upper bound of `n`."""
    keep: bool = False
    """Stay up after the workflow, until Ctrl-C."""

    def __post_init__(self) -> None:
        _require(1 <= self.port <= 65535, "serve.port", self.port, "give 1 to 65535")
        _require(self.num_replicas >= 1, "serve.num_replicas", self.num_replicas, "give 1 or more")
        _require(self.max_batch_size >= 1, "serve.max_batch_size", self.max_batch_size, "give 1 or more")
        _require(self.batch_wait_s >= 0, "serve.batch_wait_s", self.batch_wait_s, "give 0 or more")
        _require(
            self.max_images_per_request >= 1,
            "serve.max_images_per_request",
            self.max_images_per_request,
            "give 1 or more",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowConfig:
    """The whole chain."""

    preset: str = "fashion"
    """Where the values came from."""
    run_id: str = ""
    """Names the run; the same id again skips its finished stages. Empty: a new one."""
    storage_path: str = "runs"
    """Folder, or s3://bucket/prefix, that holds runs."""
    stages: tuple[Stage, ...] = STAGES
    """What to run, in this order."""
    registered_model: str = "harmonica-fashion"
    """Name in MLflow's registry; the alias `champion` points at the version Serve loads."""
    seed: int = 0
    """Fixes every label and every noise of training; evaluation draws from seed + 1."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The denoiser."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How it samples."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Router training."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Endpoint."""

    def __post_init__(self) -> None:
        _require(
            not self.run_id or bool(_NAME.fullmatch(self.run_id)),
            "run_id",
            self.run_id,
            "give letters, digits, '.', '_' and '-', at most 100",
        )
        _require(bool(self.stages), "stages", self.stages, f"give some of {', '.join(STAGES)}")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        _require(not unknown, "stages", unknown, f"give some of {', '.join(STAGES)}")
        _require(0 <= self.seed < 2**62, "seed", self.seed, "give a whole number from 0")
        _require(
            bool(_NAME.fullmatch(self.registered_model)),
            "registered_model",
            self.registered_model,
            "give letters, digits, '.', '_' and '-'",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def fashion() -> WorkflowConfig:
    """The built-in DiT on Fashion-MNIST, DDIM-20: minutes on two cores, no download.

    Away from the paper in four settings, because minutes allow some 30 updates a row where the
    released setting takes 2,000: reuse by forecast, an alternating start, lambda per unit of step error,
    beta from a target.
    """
    return WorkflowConfig(
        train=TrainConfig(
            trajectories=30,
            batch_size=8,
            sdt=SdtConfig(learning_rate=0.15, threshold=0.5, reuse="forecast"),
            target_cur=0.42,
            initial="alternate",
            initial_logit=2.0,
            iepo="sensitivity",
            iepo_every=10,
        ),
        evaluate=EvaluateConfig(samples=320, timing_rounds=4),
    )


def dit_xl_2_256() -> WorkflowConfig:
    """DiT-XL/2 at 256 x 256, DDIM-20, guidance 1.5, on the released trainer's budget.

    Wants `--model.path` and GPUs.
    """
    return WorkflowConfig(
        preset="dit-xl-2-256",
        registered_model="harmonica-dit-xl-2-256",
        model=ModelConfig(path="DiT-XL-2-256x256.pt", shape=DiTConfig()),
        sampler=SamplerConfig(
            num_inference_steps=20, guidance_scale=1.5, guidance_channels="first_three", clip_sample=False
        ),
        train=TrainConfig(
            trajectories=2_000,
            batch_size=64,
            num_workers=4,
            use_gpu=True,
            sdt=SdtConfig(beta=7e-8, learning_rate=0.01),
            iepo_every=50,
            checkpoint_interval_s=300,
        ),
        evaluate=EvaluateConfig(samples=50_000, num_actors=4, use_gpu=True),
        serve=ServeConfig(use_gpu=True),
    )


PRESETS: dict[str, Callable[[], WorkflowConfig]] = {"fashion": fashion, "dit-xl-2-256": dit_xl_2_256}
