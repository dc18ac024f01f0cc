"""Settings of the stage evaluate; a line under each field says what it does."""

from dataclasses import dataclass
from typing import Literal, get_args

from harmonica.samplers import SamplerName
from pipelines.checks import require

FeatureKind = Literal["auto", "classifier", "inception"]


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
    transfer: tuple[SamplerName, ...] = ()
    """Other samplers of as many steps to measure the router under, such as dpm-solver++: what its plan is
    worth where it was not trained."""
    transfer_guidance: tuple[float, ...] = ()
    """Other guidance scales to measure it under."""
    transfer_steps: tuple[int, ...] = ()
    """Other step counts to measure it at, its plan stretched or shrunk, forecasts linear."""
    features: FeatureKind = "auto"
    """Whose features distances between sets of images are taken of: the shipped Fashion-MNIST `classifier`,
    or `inception`; `auto` is the classifier for built-in models and none for others."""
    inception_path: str = ""
    """torch-fidelity's weights of Inception-v3, a local file on every node: for features `inception`."""
    reference_statistics: str = ""
    """ADM's reference batch, a local .npz with mu and sigma or images: what real images look like to
    Inception."""
    clip_path: str = ""
    """Local folder of a CLIP model, on every node: scores images against their prompts."""
    lpips_path: str = ""
    """torchvision's AlexNet weights, a local file on every node: LPIPS to the uncached sample."""
    noise_floor: bool = True
    """Sample full once more from another seed: how far two sets of full images are apart anyway. Costs as
    much as the full arm."""
    resamples: int = 200
    """Bootstrap resamples behind each 95% interval; 0 leaves the intervals out."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "num_actors", "timing_rounds", "timing_batch_size"):
            require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "give 1 or more")
        require(self.samples >= 16, "evaluate.samples", self.samples, "give 16 or more")
        unknown = [name for name in self.transfer if name not in get_args(SamplerName)]
        known = ", ".join(get_args(SamplerName))
        require(not unknown, "evaluate.transfer", unknown, f"give some of {known}")
        for scale in self.transfer_guidance:
            require(1 <= scale <= 50, "evaluate.transfer_guidance", scale, "give scales of 1 to 50")
        for steps in self.transfer_steps:
            require(2 <= steps <= 1000, "evaluate.transfer_steps", steps, "give counts of 2 to 1000")
        kinds = get_args(FeatureKind)
        require(self.features in kinds, "evaluate.features", self.features, f"give one of {', '.join(kinds)}")
        require(0 <= self.resamples <= 10_000, "evaluate.resamples", self.resamples, "give 0 to 10000")
        self._check_inception()

    def _check_inception(self) -> None:
        uses = self.features == "inception"
        require(
            uses == bool(self.inception_path),
            "evaluate.inception_path",
            self.inception_path,
            "give the file of the weights with evaluate.features inception, and only then",
        )
        require(
            uses or not self.reference_statistics,
            "evaluate.reference_statistics",
            self.reference_statistics,
            "give evaluate.features inception with it: they are Inception's",
        )
