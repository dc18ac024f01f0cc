"""Define what an evaluation asks of a model, of whichever kind it is."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from harmonica.core.artifact import RouterArtifact

from ..data.rows import Rows
from .variants import Variant


class EvaluatedModel(ABC):
    """A loaded model that samples variants, and checks a router's golden sample.

    There are two kinds: that of a model with a branch file (`open_model`), and that of any diffusers pipeline
    (`pipeline_model`).
    """

    draws_pixels: bool
    """Whether `sample` gives pixels rather than latents."""
    class_names: tuple[str, ...] = ()
    """Empty for a model that takes prompts."""
    warm_ups = 1
    """After how many runs of a batch all later ones take as long as each other."""

    @abstractmethod
    def rows(self, seed: int) -> Rows:
        """Return the run's rows under a seed."""

    @abstractmethod
    def sample(self, variant: Variant, batch: Any) -> Tensor:
        """Return a variant's samples (N, C, H, W)."""

    def run(self, variant: Variant, batch: Any) -> None:
        """Sample a variant without decoding: what is timed."""
        self.sample(variant, batch)

    def load_vae(self) -> Any:
        """Load the autoencoder of the samples; None if there is none, or they are pixels."""
        return None

    @abstractmethod
    def branch_names(self, artifact: RouterArtifact) -> tuple[str, ...]:
        """Return the names of a router's columns."""

    @abstractmethod
    def record_sample(self, artifact: RouterArtifact) -> RouterArtifact:
        """Return the artifact with its golden sample.

        Raises:
            NotFinite: what it draws is not finite.
        """

    @abstractmethod
    def check_sample(self, artifact: RouterArtifact) -> None:
        """Check that the router is for this model and draws its golden sample again.

        Raises:
            ValueError: it does not; says why.
        """
