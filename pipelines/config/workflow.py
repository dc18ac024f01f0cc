"""Every setting of the workflow, with a line under each that says what it does.

`pipelines.presets` fills them in; the command line overrides single fields, as in
`python workflow.py fashion --train.trajectories 50`.
"""

import dataclasses
import re
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

import tyro

from harmonica.data.text_encoder import EncoderDtype, OverLimit
from harmonica.io.paths import shown, shown_within
from harmonica.models.loading import ModelConfig
from harmonica.samplers import SamplerConfig
from harmonica.training.config import TrainingConfig
from harmonica.validation.settings import Count, Cure, Field, Natural, Positive, require, settings

from .compare import CompareConfig
from .evaluate import EvaluateConfig
from .pipeline import PipelineConfig
from .promotion import Promote, PromoteConfig
from .serve import ServeConfig
from .sweep import SweepConfig

Stage = Literal["prompts", "train", "evaluate", "sweep", "register", "serve", "compare"]
STAGES: tuple[Stage, ...] = get_args(Stage)
TEXT_STAGES: tuple[Stage, ...] = tuple(stage for stage in STAGES if stage not in ("sweep", "compare"))
"""The chain, where nothing else is asked for."""
Placement = Literal["PACK", "SPREAD", "STRICT_SPREAD"]
CLASS_STAGES: tuple[Stage, ...] = TEXT_STAGES[1:]
"""Of a model that takes no prompts."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]+/?")


@settings("prompts")
class PromptsConfig:
    """The settings of the prompts that a router is trained on, and of embedding them."""

    path: str = ""
    """A .txt file with a prompt a line, a .parquet file, or a folder of either; local or an s3:// URI. Give
    prompts like those that will be served."""
    column: Annotated[str, Field(min_length=1)] = "prompt"
    """The column of a Parquet file that holds the text; give it where it has another name."""
    max_tokens: Count = 300
    """Tokens that a prompt is padded to: give what the model reads, 120 for PixArt-alpha, 300 for Sigma."""
    over_limit: OverLimit = "truncate"
    """Longer prompts lose their end, with a warning, or are refused before anything is embedded; refuse where
    no end may be lost."""
    batch_size: Count = 32
    """Prompts an actor embeds at once; lower it if an actor runs out of memory."""
    num_actors: Count = 1
    """Ray Data actors, each with its own copy of the text encoder; raise it for many thousands of prompts."""
    use_gpu: bool = False
    """Give each actor a GPU; on wherever the cluster has them."""
    dtype: EncoderDtype = "bfloat16"
    """Precision of the text encoder; what is stored is bfloat16 whatever it is. Give float32 for a small
    encoder on CPUs."""


@settings("train")
class TrainConfig(TrainingConfig):
    """The settings of router training on Ray Train."""

    num_workers: Count = 2
    """Ray Train workers, one core or GPU each; give what the cluster has. The router is the same but for
    rounding."""
    min_workers: Natural = 0
    """Go on with as few as these where there is no room for num_workers, and with more once there is; 0 waits
    for all of them. Give it where nodes come and go."""
    resize_interval_s: Positive = 60.0
    """Seconds between looks for room for more, while training has fewer workers than num_workers."""
    use_gpu: bool = False
    """Give each worker a GPU; on wherever the cluster has them."""
    max_failures: Annotated[int, Field(ge=-1), Cure("0 or more, or -1 for any number")] = 3
    """Worker failures survived, each from the last checkpoint; -1: any number. Raise it on spot machines."""
    placement_strategy: Placement = "PACK"
    """Workers on few nodes (PACK), spread over many (SPREAD), or never two on one (STRICT_SPREAD). Spread
    where the loss of a node should cost few workers."""
    stall_timeout_s: Positive = 1800.0
    """A run of which no worker has begun anything new for this long fails, and says what it waited for. Raise
    it where loading the model takes longer."""

    @classmethod
    def of(cls, training: TrainingConfig, **changes: Any) -> "TrainConfig":
        """Return a training's settings on Ray Train.

        Args:
            changes: replace settings, or give those of Ray Train.
        """
        base = {each.name: getattr(training, each.name) for each in dataclasses.fields(training)}
        return cls(**base | changes)

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        self._check_elastic()
        least = "min_workers" if self.min_workers else "num_workers"
        require(
            min(self.counts) > 1 or not self.shard_model,
            "train.shard_model",
            self.shard_model,
            f"give False, or train.{least} above 1 to share the weights among",
        )
        whom = f"train.num_workers ({self.num_workers})"
        if self.min_workers:
            whom = f"every number from train.min_workers ({self.min_workers}) to {whom}"
        require(
            not any(self.batch_size % count for count in self.counts),
            "train.batch_size",
            self.batch_size,
            f"give a multiple of {whom}, so that workers share evenly",
        )

    def _check_elastic(self) -> None:
        require(
            self.min_workers <= self.num_workers,
            "train.min_workers",
            self.min_workers,
            f"give 1 to train.num_workers ({self.num_workers}), or 0 for all of them or none",
        )
        require(
            not self.min_workers or self.placement_strategy != "STRICT_SPREAD",
            "train.placement_strategy",
            self.placement_strategy,
            "give SPREAD or PACK with train.min_workers, since Ray counts free cores and GPUs, not nodes",
        )

    @property
    def counts(self) -> range:
        """Return the numbers of workers that there may be."""
        return range(self.min_workers or self.num_workers, self.num_workers + 1)


@settings()
class WorkflowConfig:
    """The settings of the whole chain."""

    preset: Annotated[str, tyro.conf.Suppress] = "fashion"  # not a command-line option
    """Name of the preset that the values came from; run ids begin with it. A command takes it as its first
    word."""
    run_id: str = ""
    """Names the run; the same id again skips its finished stages. Empty: a new one. Give it to go on with a
    run, or to tell runs apart."""
    storage_path: str = "runs"
    """Folder, or s3://bucket/prefix, that holds runs; credentials come from the environment or ~/.aws. Give a
    shared one where several machines work."""
    storage_endpoint: str = ""
    """Address of an S3 store that is not Amazon's, such as http://minio:9000; empty takes AWS_ENDPOINT_URL,
    or what ~/.aws/config says."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = CLASS_STAGES
    """What to run, in this order. Give fewer to do a part of the chain; add `sweep` or `compare` to have
    them."""
    done_again_from: Annotated[Stage | None, tyro.conf.arg(name="from")] = None
    """Stage of the run that is done again, with those after it, though it is finished: give it after a change
    of settings."""
    registered_model: str = "harmonica-fashion"
    """Name in MLflow's registry; the alias `champion` points at the version Serve loads. Give another for
    each model that is served by itself."""
    promote: Promote = "gate"
    """Whether a new version becomes the champion: if it passes the gate of `promotion`, never, or always.
    Give `never` for trials beside a champion that is in use."""
    node_metrics_interval_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds between readings of every node's CPU, memory and GPUs, which go to MLflow; 0 takes none. Raise
    it for runs of days."""
    seed: Annotated[int, Field(ge=0, lt=2**62), Cure("a whole number from 0, below 2^62")] = 0
    """Fixes every label and every noise of training; evaluation takes seed + 1. Change it to see how
    much a result depends on chance."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The denoiser."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How it samples."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """The calls of a diffusers pipeline, where the model is run in its loop."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """What a text-to-image model is trained and evaluated on."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Router training."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Search over targets, lambda kinds and seeds; only where the stage sweep is asked for."""
    promotion: PromoteConfig = field(default_factory=PromoteConfig)
    """The gate."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Endpoint."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """Other methods beside this project's."""

    def __post_init__(self) -> None:
        require(
            not self.run_id or bool(_NAME.fullmatch(self.run_id)),
            "run_id",
            self.run_id,
            "give letters, digits, '.', '_' and '-', at most 100",
        )
        require(
            "://" not in self.storage_path or shown(self.storage_path) == self.storage_path.rstrip("/"),
            "storage_path",
            shown(self.storage_path),
            "leave out what may be a credential: it would be logged; the environment or ~/.aws gives it",
        )
        require(
            not self.storage_endpoint or bool(_ENDPOINT.fullmatch(self.storage_endpoint)),
            "storage_endpoint",
            shown(self.storage_endpoint),
            "give http://host:port or https://host, without credentials",
        )
        require(
            self.done_again_from is None or bool(self.run_id),
            "from",
            self.done_again_from,
            "give the --run-id of the run whose stages are to be done again",
        )
        require(
            self.done_again_from in (None, *self.stages),
            "from",
            self.done_again_from,
            f"give one of the stages to run, {', '.join(self.stages)}",
        )
        require(
            bool(_NAME.fullmatch(self.registered_model)),
            "registered_model",
            self.registered_model,
            "give letters, digits, '.', '_' and '-'",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, for records and logs.

        URIs lose the credentials that may be in them.
        """
        plain: dict[str, Any] = shown_within(dataclasses.asdict(self))
        return plain
