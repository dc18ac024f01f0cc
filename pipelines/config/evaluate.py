"""Settings of the stage evaluate; a line under each field says what it does."""

from typing import Annotated, Literal

from harmonica.samplers import MAX_GUIDANCE_SCALE, SamplerName
from harmonica.samplers.noise_schedule import NUM_TRAIN_TIMESTEPS
from harmonica.validation.settings import Count, Field, require, settings

FeatureKind = Literal["auto", "classifier", "inception"]


@settings("evaluate")
class EvaluateConfig:
    """The settings of the evaluation: the images it samples, and their metrics.

    The same noise is sampled full, cached and with fewer steps.
    """

    samples: Annotated[int, Field(ge=16)] = 512
    """Images of each variant. More make the intervals narrower; published FID is of 50,000."""
    batch_size: Count = 32
    """Images an actor samples at once; lower it if an actor runs out of memory."""
    num_actors: Count = 2
    """Ray Data actors, each with its own copy of the model; give one for each GPU or free core."""
    use_gpu: bool = False
    """Give each actor a GPU; on wherever the cluster has them."""
    timing_rounds: Count = 5
    """Times each variant is timed, in turn; the medians are compared. Raise it on a busy machine."""
    timing_batch_size: Count = 8
    """Images of one timed batch; give the batch that serving will have, since speedups depend on it."""
    transfer: tuple[SamplerName, ...] = ()
    """Other samplers of as many steps to measure the router under, such as dpm-solver++: what its plan is
    worth where it was not trained. Give those that users of the router may switch to."""
    transfer_guidance: tuple[Annotated[float, Field(ge=1, le=MAX_GUIDANCE_SCALE)], ...] = ()
    """Other guidance scales to measure it under; give those that users may ask for."""
    transfer_steps: tuple[Annotated[int, Field(ge=2, le=NUM_TRAIN_TIMESTEPS)], ...] = ()
    """Other step counts to measure it at, its plan stretched or shrunk, forecasts linear; give those that
    users may ask for."""
    features: FeatureKind = "auto"
    """Whose features distances between sets of images are taken of: a shipped `classifier` (of Fashion-MNIST
    or of emoji), or `inception`; `auto` is the classifier for built-in models and none for others. Give
    `inception` for published FID."""
    inception_path: str = ""
    """torch-fidelity's weights of Inception-v3, a local file on every node: give it with features
    `inception`."""
    reference_statistics: str = ""
    """ADM's reference batch, a local .npz with mu and sigma or images: give it for FID to real images, by
    features `inception`."""
    clip_path: str = ""
    """Local folder of a CLIP model, on every node: give it to score images against their prompts."""
    lpips_path: str = ""
    """torchvision's AlexNet weights, a local file on every node: give it to have LPIPS to the uncached
    sample."""
    noise_floor: bool = True
    """Sample full once more from another seed: how far two sets of full images are apart anyway. Costs as
    much as the full variant; off where that is too much."""
    resamples: Annotated[int, Field(ge=0, le=10_000)] = 200
    """Bootstrap resamples behind each 95% interval; 0 leaves the intervals out."""

    def __post_init__(self) -> None:
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
