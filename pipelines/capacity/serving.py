"""Replicas, memory, network and cost of serving at a rate with a latency.

The batch size is what the endpoint would choose: its `LatencyModel`, given the seconds of every batch size
(`latency`), and half of `serve.latency_target_s`, as in `pipelines.serving.batching`. The replicas are those
of `queueing.replicas_for`, and more where the simulated endpoint needs them.
"""

from dataclasses import dataclass

from harmonica.training.memory_estimates import sampling_memory
from harmonica.training.memory_model import Memory
from harmonica.validation.settings import require

from ..config.serve import ServeConfig
from ..serving.latency_model import LatencyModel
from .gpus import Gpu
from .latency import ExecutionLevel, sampling_seconds
from .queueing import replicas_for, simulate
from .sizes import SizedModel
from .training import combined

_BASE64 = 4 / 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingEstimate:
    """Serving under one plan."""

    speedup: float
    """The plan's ideal speedup; 1 is uncached."""
    batch: int
    batch_s: float
    """Seconds of such a batch."""
    single_s: float
    """Seconds of one image alone."""
    replicas_by_formula: int
    replicas: int
    """As many as the simulation needs to keep to the target, one GPU each."""
    latency_s: float
    """The simulated quantile."""
    utilisation: float
    """Share of the replicas' images a second at this batch size that is asked for."""
    memory: Memory
    """Peak bytes of a replica, without VAE, text encoder and CUDA context. Under a plan, a value of every
    branch is counted; a plan of whole steps keeps sums instead, which take less."""
    fits: bool
    bytes_per_s: float
    """Bytes of answers a second, of all replicas: images as base64 without compression, an upper bound."""
    cost_per_hour: float
    cost_per_1000: float
    """Cost of 1,000 images; 0 without a price."""


def estimate_serving(
    model: SizedModel,
    gpu: Gpu,
    config: ServeConfig,
    *,
    rate: float,
    num_steps: int,
    speedup: float,
    values: int,
    execution: ExecutionLevel,
    quantile: float,
    price: float = 0.0,
    share: float = 0.0,
) -> ServingEstimate:
    """Return what a rate of images takes.

    Args:
        rate: images a second.
        speedup: the plan's ideal speedup.
        values: number of a branch's values that the plan's cache keeps.
        quantile: share of the images that has to keep to `config.latency_target_s`.
        price: of a GPU hour.
        share: replaces the assumed share of the peak FLOP/s, if above 0.

    Raises:
        SettingError: the target is shorter than one image takes beside another.
    """
    target_s = config.latency_target_s
    assert target_s is not None, "the command has a default"

    def seconds(images: int) -> float:
        return sampling_seconds(
            model, gpu, images, num_steps, execution=execution, speedup=speedup, share=share
        )

    limit_s = (target_s - config.batch_wait_s) / 2
    least = 2 * seconds(1) + config.batch_wait_s
    require(
        seconds(1) <= limit_s,
        "serve.latency_target_s",
        target_s,
        f"give {least:.3g} or more: one image takes {seconds(1):.3g} s, and may wait for another",
    )
    kept = values if speedup > 1 else 0
    latency_model, sizes = LatencyModel(), range(1, _most_that_fit(model, gpu, config, kept, num_steps) + 1)
    for size in sizes:
        latency_model.add(size, seconds(size))
    batch = latency_model.largest(limit_s, len(sizes))
    by_formula = replicas_for(rate, batch, seconds(batch), target_s - config.batch_wait_s, quantile)
    replicas, latency_s = by_formula, simulate(by_formula, rate, batch, seconds, quantile)
    while latency_s > target_s - config.batch_wait_s:
        replicas += max(1, replicas // 50)
        latency_s = simulate(replicas, rate, batch, seconds, quantile)
    memory = _memory(model, batch, kept, num_steps)
    return ServingEstimate(
        speedup=speedup,
        batch=batch,
        batch_s=seconds(batch),
        single_s=seconds(1),
        replicas_by_formula=by_formula,
        replicas=replicas,
        latency_s=latency_s,
        utilisation=rate * seconds(batch) / batch / replicas,
        memory=memory,
        fits=memory.total < gpu.memory,
        bytes_per_s=rate * model.output_bytes * _BASE64,
        cost_per_hour=replicas * price,
        cost_per_1000=replicas * price / (rate * 3600) * 1000,
    )


def _memory(model: SizedModel, images: int, values: int, num_steps: int) -> Memory:
    """Return the peak of a batch."""
    return combined(
        [
            sampling_memory(
                shape, batch_size=images, is_guided=model.is_guided, values=values, num_steps=num_steps
            )
            for shape in model.shapes
        ]
    )


def _most_that_fit(model: SizedModel, gpu: Gpu, config: ServeConfig, values: int, num_steps: int) -> int:
    """Return the largest batch that the GPU holds, at least 1.

    It is at most `serve.max_batch_size`.
    """
    sizes = range(config.max_batch_size, 1, -1)
    fitting = (size for size in sizes if _memory(model, size, values, num_steps).total < gpu.memory)
    return next(fitting, 1)
