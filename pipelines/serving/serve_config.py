"""Settings of the HTTP endpoint; a line under each field says what it does."""

from dataclasses import dataclass
from typing import get_args

from harmonica.text.text_encoder import OverLimit
from pipelines.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network."""
    port: int = 8000
    """Port to listen on."""
    min_replicas: int = 1
    """Sampling replicas, each with its own copy of the model."""
    max_replicas: int = 1
    """More are started up to this many while each has more than target_ongoing images, queue included."""
    target_ongoing: float | None = None
    """Images a replica should have. Empty: a trajectory's worth being drawn and one waiting."""
    upscale_delay_s: float = 10.0
    """How long there must be too many images for another replica."""
    downscale_delay_s: float = 300.0
    """How long there must be too few for one less."""
    api_replicas: int = 1
    """Replicas that speak HTTP; with two, one may be lost and nobody waits for another to start."""
    num_cpus: float = 1.0
    """Cores of a replica; torch uses as many threads."""
    use_gpu: bool = False
    """One GPU a replica."""
    max_batch_size: int = 16
    """Images sampled in one trajectory."""
    batch_wait_s: float = 0.02
    """How long at most a trajectory waits for images that are expected: the rest of a request, and clients
    that were just answered."""
    latency_target_s: float | None = None
    """What an image may take that finds a trajectory running: batches are kept as small as that wants.
    Empty: only max_batch_size bounds them, which is most images a second."""
    timeout_s: float = 60.0
    """An image that has waited this long for its trajectory is given up with 504; requests may say less."""
    max_waiting: int = 64
    """Images that may wait at a replica for a trajectory; more are turned away with 503."""
    read_timeout_s: float = 30.0
    """How long a client may take to send a request's body; then it is answered 408."""
    stall_timeout_s: float = 600.0
    """A replica whose trajectory runs for longer is replaced."""
    cors_origins: tuple[str, ...] = ()
    """Web sites such as https://example.org whose pages may ask this endpoint; `*` for all."""
    lenient: bool = False
    """For clients that always send another model, size or `response_format: url`: draw with the served model
    in its own size, answer a data URL, and name in `warnings` what was not followed, unknown fields too."""
    reproducible: bool = False
    """An image is the same to the last bit whatever is drawn beside it, on one kind of machine: trajectories
    have one shape. On a CPU that is one image; on a GPU max_batch_size, filled up where fewer wait (and one,
    where a place in the batch turns out to matter)."""
    max_images_per_request: int = 10
    """Upper bound of `n`."""
    max_steps: int = 100
    """Upper bound of `num_inference_steps` where no router is used; the champion's own is always good."""
    api_keys_file: str = ""
    """File with a bearer key a line, which clients must then bring. Empty: those in HARMONICA_API_KEYS,
    separated by commas; where that is empty too, anybody may ask."""
    over_limit: OverLimit = "truncate"
    """Prompts with more tokens than the model reads lose their end, or are refused."""
    keep: bool = False
    """Stay up after the workflow, until Ctrl-C."""

    def __post_init__(self) -> None:
        require(1 <= self.port <= 65535, "serve.port", self.port, "give 1 to 65535")
        for name in ("min_replicas", "api_replicas"):
            require(getattr(self, name) >= 1, f"serve.{name}", getattr(self, name), "give 1 or more")
        cure = f"give serve.min_replicas ({self.min_replicas}) or more"
        require(self.max_replicas >= self.min_replicas, "serve.max_replicas", self.max_replicas, cure)
        for name in ("upscale_delay_s", "downscale_delay_s", "read_timeout_s", "stall_timeout_s"):
            require(getattr(self, name) > 0, f"serve.{name}", getattr(self, name), "give seconds")
        require(self.max_batch_size >= 1, "serve.max_batch_size", self.max_batch_size, "give 1 or more")
        require(self.batch_wait_s >= 0, "serve.batch_wait_s", self.batch_wait_s, "give 0 or more")
        require(
            self.latency_target_s is None or self.latency_target_s > self.batch_wait_s,
            "serve.latency_target_s",
            self.latency_target_s,
            f"give more seconds than serve.batch_wait_s ({self.batch_wait_s})",
        )
        require(self.timeout_s > 0, "serve.timeout_s", self.timeout_s, "give seconds")
        for name in ("max_waiting", "max_images_per_request"):
            require(getattr(self, name) >= 1, f"serve.{name}", getattr(self, name), "give 1 or more")
        require(
            self.max_waiting >= self.max_images_per_request,
            "serve.max_waiting",
            self.max_waiting,
            f"give serve.max_images_per_request ({self.max_images_per_request}) or more, or such a request "
            "never has room",
        )
        require(self.max_steps >= 2, "serve.max_steps", self.max_steps, "give 2 or more")
        limits = get_args(OverLimit)
        cure = f"give {' or '.join(limits)}"
        require(self.over_limit in limits, "serve.over_limit", self.over_limit, cure)
