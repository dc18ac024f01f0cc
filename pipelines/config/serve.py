"""Settings of the HTTP endpoint; a line under each field says what it does."""

from typing import Annotated

from harmonica.data.text_encoder import OverLimit
from harmonica.validation.settings import Count, Field, Positive, require, settings


@settings("serve")
class ServeConfig:
    """The HTTP endpoint."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    min_replicas: Count = 1
    """Sampling replicas, each with its own copy of the model."""
    max_replicas: Count = 1
    """More are started up to this many while each has more than target_ongoing images, queue included."""
    target_ongoing: Positive | None = None
    """Images a replica should have. Empty: a trajectory's worth being drawn and one waiting."""
    upscale_delay_s: Positive = 10.0
    """How long there must be too many images for another replica."""
    downscale_delay_s: Positive = 300.0
    """How long there must be too few for one less."""
    api_replicas: Count = 1
    """Replicas that speak HTTP; with two, one may be lost and nobody waits for another to start."""
    num_cpus: Positive = 1.0
    """Cores of a replica; torch uses as many threads."""
    use_gpu: bool = False
    """One GPU a replica."""
    max_batch_size: Count = 16
    """Images sampled in one trajectory."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.02
    """How long at most a trajectory waits for images that are expected: the rest of a request, and clients
    that were just answered."""
    latency_target_s: Positive | None = None
    """What an image may take that finds a trajectory running: batches are kept as small as that wants.
    Empty: only max_batch_size bounds them, which is most images a second."""
    timeout_s: Positive = 60.0
    """An image that has waited this long for its trajectory is given up with 504; requests may say less."""
    max_waiting: Count = 64
    """Images that may wait at a replica for a trajectory; more are turned away with 503."""
    read_timeout_s: Positive = 30.0
    """How long a client may take to send a request's body; then it is answered 408."""
    stall_timeout_s: Positive = 600.0
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
    max_images_per_request: Count = 10
    """Upper bound of `n`."""
    max_steps: Annotated[int, Field(ge=2)] = 100
    """Upper bound of `num_inference_steps` where no router is used; the champion's own is always good."""
    api_keys_file: str = ""
    """File with a bearer key a line, which clients must then bring. Empty: those in HARMONICA_API_KEYS,
    separated by commas; where that is empty too, anybody may ask."""
    over_limit: OverLimit = "truncate"
    """Prompts with more tokens than the model reads lose their end, or are refused."""
    keep: bool = False
    """Stay up after the workflow, until Ctrl-C."""

    def __post_init__(self) -> None:
        require(
            self.num_cpus < 1 or self.num_cpus == int(self.num_cpus),
            "serve.num_cpus",
            self.num_cpus,
            "give a whole number, or a part of one core: Ray has no others",
        )
        cure = f"give serve.min_replicas ({self.min_replicas}) or more"
        require(self.max_replicas >= self.min_replicas, "serve.max_replicas", self.max_replicas, cure)
        require(
            self.latency_target_s is None or self.latency_target_s > self.batch_wait_s,
            "serve.latency_target_s",
            self.latency_target_s,
            f"give more seconds than serve.batch_wait_s ({self.batch_wait_s})",
        )
        require(
            self.max_waiting >= self.max_images_per_request,
            "serve.max_waiting",
            self.max_waiting,
            f"give serve.max_images_per_request ({self.max_images_per_request}) or more, or such a request "
            "never has room",
        )
