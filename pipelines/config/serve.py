"""Settings of the HTTP endpoint; a line under each field says what it does."""

from typing import Annotated

from harmonica.data.text_encoder import OverLimit
from harmonica.validation.settings import Count, Field, Positive, require, settings


@settings("serve")
class ServeConfig:
    """The settings of the HTTP endpoint."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on; give another where it is taken."""
    min_replicas: Count = 1
    """Number of sampling replicas at least, each with its own copy of the model. Give as many as the least
    load needs."""
    max_replicas: Count = 1
    """Number of sampling replicas at most. More are started while each has more than target_ongoing images,
    those that wait included. Give as many as the cluster has GPUs or cores for."""
    target_ongoing: Positive | None = None
    """Number of images a replica should have. Empty: as many as one trajectory samples, and as many again
    that wait. Lower it to scale up sooner."""
    upscale_delay_s: Positive = 10.0
    """How long there must be too many images before another replica is started. Raise it where load comes in
    short bursts."""
    downscale_delay_s: Positive = 300.0
    """How long there must be too few images before a replica is stopped. Raise it where starting a replica
    takes long."""
    api_replicas: Count = 1
    """Number of replicas that answer HTTP. With two, one may be lost and no client waits for another to
    start."""
    max_models_per_replica: Count | None = None
    """Number of models a sampling replica has loaded at once, where several are served; the least recently
    used one is unloaded for another. Empty: all of them. Give as many as fit in its memory."""
    num_cpus: Positive = 1.0
    """Number of cores a sampling replica takes; torch uses as many threads. Raise it to sample each image
    faster on CPUs."""
    use_gpu: bool = False
    """Give each sampling replica one GPU; on wherever the cluster has them."""
    max_batch_size: Count = 16
    """Number of images sampled in one trajectory at most. Lower it if a replica runs out of memory."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.02
    """How long a trajectory waits at most for images that are expected: the rest of a request, and the next
    requests of clients that were just answered. Raise it for larger batches, lower it for less latency."""
    latency_target_s: Positive | None = None
    """How long an image may take that arrives while a trajectory runs; batches are kept small enough for
    that. Empty: only max_batch_size bounds them, which gives most images a second. Give it where users wait
    for single images."""
    timeout_s: Positive = 60.0
    """How long an image may wait for its trajectory before it is given up with 504; a request may ask for
    less. Set it to what clients wait for."""
    max_waiting: Count = 64
    """Number of images that may wait at a replica for a trajectory; more are rejected with 503. Lower it to
    refuse early, rather than late."""
    read_timeout_s: Positive = 30.0
    """How long a client may take to send a request's body before it is answered 408. Raise it for clients
    with slow connections."""
    stall_timeout_s: Positive = 600.0
    """How long a trajectory may run before its replica is replaced. Raise it where one trajectory of a large
    model takes longer."""
    cors_origins: tuple[str, ...] = ()
    """Web sites such as https://example.org whose pages may send requests; `*` allows all. Give yours where a
    page of yours calls the endpoint."""
    lenient: bool = False
    """Accept requests for another model or size, for `response_format: url` and with unknown fields: the
    served model generates in its own size, a data URL is answered, and `warnings` names what was not
    followed. On for clients that were written for another service."""
    reproducible: bool = False
    """Make an image the same to the last bit whatever else is in its batch, on one kind of machine: all
    batches have one size. On a CPU that is one image; on a GPU it is max_batch_size, filled up if fewer
    images wait, or one if an image turns out to depend on its place in the batch. On where images are
    compared by their bytes; it costs throughput."""
    max_images_per_request: Count = 10
    """Largest `n` of a request; raise it for clients that ask for many at once."""
    max_steps: Annotated[int, Field(ge=2)] = 100
    """Largest `num_inference_steps` of a request that uses no router; the champion's own number is always
    allowed. Lower it to bound what a request costs."""
    max_pixels: Count = 2**22
    """Largest area of an image, width times height, where the served pipeline leaves the size to requests;
    the size that it has by default is always allowed. Lower it to bound what a request costs."""
    max_upload_bytes: Count = 20 * 2**20
    """Largest body of a request that edits pictures; raise it for larger pictures."""
    api_keys_file: str = ""
    """File with one bearer key a line; clients must then send one of them. Empty: the keys are those in
    HARMONICA_API_KEYS, separated by commas; if that is empty too, no key is needed. Give keys before the
    endpoint is opened to a network."""
    over_limit: OverLimit = "truncate"
    """Whether prompts with more tokens than the model reads lose their end, or are refused; refuse where no
    end may be lost."""
    keep: bool = False
    """Serve on after the workflow, until Ctrl-C. On to try the endpoint by hand."""

    def __post_init__(self) -> None:
        require(
            self.num_cpus < 1 or self.num_cpus == int(self.num_cpus),
            "serve.num_cpus",
            self.num_cpus,
            "give a whole number, or a part of one core: Ray has no others",
        )
        require(
            self.num_cpus == round(self.num_cpus, 4),
            "serve.num_cpus",
            self.num_cpus,
            "give a multiple of 0.0001: Ray has no smaller parts of a core",
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
