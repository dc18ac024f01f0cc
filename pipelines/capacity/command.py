"""The command's settings, and the estimates that it makes from them."""

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

from harmonica.core.cache import values_kept
from harmonica.core.plan_builders import even_plan, speedup_of
from harmonica.integrations.recorded.kinds import BLOCKS, RecordedKind, check_kinds
from harmonica.models.base import Macs
from harmonica.training.feasibility import check_speedup
from harmonica.training.presets import learned_steps
from harmonica.validation.settings import (
    Count,
    Cure,
    Field,
    Natural,
    Positive,
    SettingError,
    require,
    settings,
)

from ..config.serve import ServeConfig
from ..config.workflow import TrainConfig
from ..serving.serve_args import FOLLOW_S
from .gpus import gpu_named
from .latency import ExecutionLevel, sampling_seconds
from .limits import Cluster, Limit, all_limits
from .models import sized_model
from .serving import ServingEstimate, estimate_serving
from .sizes import Size, SizedModel
from .training import TrainingEstimate, estimate_training

TableName = Literal["model", "training", "serving", "limits"]
TABLES: tuple[TableName, ...] = get_args(TableName)
_SINGLES = 4
"""The latency target where none is given, in trajectories of one image."""


@settings()
class CapacityCommand:
    """Compute what training and serving a router take, and what breaks first."""

    model: str = "dit-xl-2"
    """`dit-xl-2`, `pixart-alpha`, `pixart-sigma`, `flux` (FLUX.1-dev) or `wan-14b` (Wan 2.1); or a model
    folder."""
    height: Natural = 0
    """Height in pixels; 0 is the model's usual."""
    width: Natural = 0
    """Width in pixels; 0 is the model's usual."""
    frames: Natural = 0
    """Frames of a video; 0 is the model's usual."""
    cacheable: Annotated[tuple[RecordedKind, ...], Field(min_length=1)] = (BLOCKS,)
    """What is a branch of FLUX and Wan, as `pipeline.cacheable`: all blocks as one, or some of attn, cross,
    mlp and single."""
    num_inference_steps: Annotated[Natural, Cure("2 or more, or 0 for the model's usual")] = 0
    """Sampling steps T; 0 is the model's usual: 20 for DiT and PixArt, 28 for FLUX, 50 for Wan."""
    gpu: str = "H100"
    """Kind of GPU: H200, H100, A100, L40S or L4."""
    gpu_price: Annotated[float, Field(ge=0)] = 0.0
    """Price of a GPU hour, in any currency; 0 leaves cost out."""
    flops_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the GPU's peak bfloat16 rate that products reach (model FLOPs utilisation). 0: as on an H100,
    0.5 for sampling from graphs, 0.28 eagerly, 0.25 for training."""
    network: Positive = 100.0
    """Gbit/s of each worker's connection."""
    execution: ExecutionLevel = "graphed"
    """How serving runs branches; see `model.execution`."""
    images_per_s: Positive = 10.0
    """Images or videos a second that are asked for."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Share of the images that has to keep to serve.latency_target_s."""
    nodes: Annotated[tuple[Count, ...], Field(min_length=1)] = (10, 100, 1000)
    """Numbers of nodes to hold against the limits of Ray, MLflow and this program."""
    gpus_per_node: Count = 8
    """GPUs of each of these nodes."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig.of(learned_steps()))
    """Training, by default of learned steps, with the plan's target: train.target_speedup, or
    train.target_cur with 0 for the former."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """The endpoint. Without serve.latency_target_s: four times what one image takes alone."""
    tables: Annotated[tuple[TableName, ...], Field(min_length=1)] = TABLES
    """The tables to print."""
    json: bool = False
    """Print all numbers as JSON, whatever `tables` says."""
    markdown: bool = False
    """Print the tables as Markdown."""

    def __post_init__(self) -> None:
        check_kinds(self.cacheable)
        require(
            self.num_inference_steps != 1,
            "num_inference_steps",
            1,
            "give 2 or more, or 0 for the model's usual",
        )
        require(
            self.train.target_speedup > 0 or self.train.target_cur > 0,
            "train.target_speedup",
            self.train.target_speedup,
            "give the plan's speed, a number above 1, or train.target_cur",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimates:
    """All that the command computes."""

    model: SizedModel
    num_steps: int
    speedup: float
    cur: float
    target_s: float
    training: TrainingEstimate
    serving: tuple[ServingEstimate, ...]
    """Uncached, and under the plan."""
    limits: tuple[Limit, ...]

    def to_json(self, nodes: tuple[int, ...]) -> dict[str, Any]:
        """Return the numbers by name, in bytes and seconds."""
        training, model = self.training, self.model
        return {
            "model": {
                "name": model.name,
                "size": str(model.size),
                "macs": model.macs.full,
                "branches": model.num_branches,
                "weight_bytes": model.weight_bytes,
            },
            "num_inference_steps": self.num_steps,
            "ideal_speedup": self.speedup,
            "cur": self.cur,
            "training": dataclasses.asdict(training)
            | {
                "seconds": training.seconds,
                "gpu_hours": training.gpu_hours,
                "memory_bytes": training.memory.total,
            },
            "latency_target_s": self.target_s,
            "serving": [
                dataclasses.asdict(each) | {"memory_bytes": each.memory.total} for each in self.serving
            ],
            "limits": [
                {
                    "name": limit.name,
                    "capacity": limit.capacity,
                    "unit": limit.unit,
                    "where": limit.where,
                    "binds_at": limit.binds_at,
                    "load": {str(count): limit.load(count) for count in nodes},
                    "answer": limit.answer,
                }
                for limit in self.limits
            ],
        }


def _plan_of(train: TrainConfig, macs: Macs, num_steps: int) -> tuple[float, float]:
    """Return the ideal speedup and the CUR of the plan that is to be learned.

    Raises:
        SettingError: no plan of T steps reaches it.
    """
    if train.target_speedup:
        check_speedup(train.target_speedup, macs, num_steps, field="train.target_speedup")
        plan = even_plan(num_steps, macs, train.target_speedup)
        return plan.ideal_speedup(macs), plan.cur
    most = (num_steps - 1) / num_steps
    if train.target_cur > most:
        raise SettingError(
            f"train.target_cur is {train.target_cur}: give {most:.3g} or less for {num_steps} steps"
        )
    return speedup_of(train.target_cur, macs), train.target_cur


def estimate(command: CapacityCommand) -> Estimates:
    """Compute everything.

    Raises:
        ValueError: the settings cannot be used; one sentence.
    """
    gpu = gpu_named(command.gpu)
    size = Size(height=command.height, width=command.width, frames=command.frames)
    model = sized_model(command.model, size, command.cacheable)
    num_steps = command.num_inference_steps or model.num_steps
    speedup, cur = _plan_of(command.train, model.macs, num_steps)
    network = command.network * 1e9 / 8
    training = estimate_training(
        model,
        gpu,
        command.train,
        num_steps=num_steps,
        cur=cur,
        network_bytes_per_s=network,
        price=command.gpu_price,
        share=command.flops_share,
    )
    serve = command.serve
    if serve.latency_target_s is None:
        alone = sampling_seconds(
            model, gpu, 1, num_steps, execution=command.execution, share=command.flops_share
        )
        serve = dataclasses.replace(serve, latency_target_s=_SINGLES * alone + serve.batch_wait_s)
    target_s = serve.latency_target_s
    assert target_s is not None
    serving = tuple(
        estimate_serving(
            model,
            gpu,
            serve,
            rate=command.images_per_s,
            num_steps=num_steps,
            speedup=each,
            values=_values_kept(command.train),
            execution=command.execution,
            quantile=command.quantile,
            price=command.gpu_price,
            share=command.flops_share,
        )
        for each in (1.0, speedup)
    )
    cluster = Cluster(
        model=model,
        gpu=gpu,
        gpus_per_node=command.gpus_per_node,
        train=command.train,
        serve=serve,
        serving=serving[-1],
        follow_s=FOLLOW_S,
        num_steps=num_steps,
        network_bytes_per_s=network,
    )
    return Estimates(
        model=model,
        num_steps=num_steps,
        speedup=speedup,
        cur=cur,
        target_s=target_s,
        training=training,
        serving=serving,
        limits=tuple(all_limits(cluster)),
    )


def _values_kept(train: TrainConfig) -> int:
    """Return how many values of a branch the plan of a training keeps."""
    return values_kept(train.sdt.reuse, train.forecast.order if train.forecast.trajectories else 1)
