"""Time, memory, network and cost of training a router.

The cost of a trajectory in full samplings is what `harmonica.training.phases.phase_costs` counts: SDT's
updates with teacher, student and backward, lambda's refreshes, the measured start, the choice and the fit of
forecasts. A full sampling takes T forwards of a worker's rows (`latency`). Memory is
`harmonica.training.memory_estimates.training_memory`, or `learning_memory` where a trajectory's gradients
take more.

The network carries three things, in bytes sent by each of n workers:

- All-reduces of small vectors: B float32 numbers an update (the gradient of a row), 2(T-1) a refresh of
  lambda, and the sums of the other phases. A ring sends 2(n-1)/n of the vector (Patarasuk and Yuan 2009,
  J. Parallel Distrib. Comput. 69(2)); so small a message costs latency, 2 ceil(log2 n) hops of a reduction
  and a broadcast along a tree (Thakur, Rabenseifner and Gropp 2005, Int. J. High Perform. Comput. Appl.
  19(1)).
- The rows of a trajectory, once.
- With `train.shard_model`, the layers that the other workers hold, gathered in each forward and backward, at
  the network's whole rate and not hidden behind arithmetic, which is an upper bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harmonica.training.memory_estimates import learning_memory, training_memory
from harmonica.training.memory_model import Memory
from harmonica.training.phases import phase_costs
from harmonica.training.plans.step_form import size_of_form
from harmonica.training.progress import PhaseCosts

from ..config.workflow import TrainConfig
from .gpus import Gpu
from .latency import TRAINING, forward_seconds
from .sizes import SizedModel

HOP_S = 20e-6
"""Seconds of one hop of a small message between nodes: an assumption."""
_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEstimate:
    """One phase of a training."""

    name: str
    trajectories: int
    samplings: float
    """Cost in full samplings of the batch."""
    compute_s: float
    network_s: float
    reduced_bytes: float
    """Bytes that each worker sends in all-reduces."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.network_s


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEstimate:
    """A router's training."""

    workers: int
    phases: tuple[PhaseEstimate, ...]
    update_s: float
    """Seconds of one update of SDT, with its all-reduce."""
    reduce_s: float
    """Seconds of one all-reduce of a row."""
    memory: Memory
    """Peak bytes of a worker, without the CUDA context (about 1 GiB)."""
    row_bytes: float
    """Bytes of all trajectories' rows."""
    start_bytes: float
    """Bytes of the weights that all workers read at the start."""
    fits: bool
    cost: float
    """In the currency of the price; 0 without one."""

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.workers / 3600


def reduce_seconds(workers: int, size: float, bytes_per_s: float) -> float:
    """Return the seconds of an all-reduce of a vector of `size` bytes."""
    hops = 2 * math.ceil(math.log2(workers)) if workers > 1 else 0
    return hops * HOP_S + ring_bytes(workers, size) / bytes_per_s


def ring_bytes(workers: int, size: float) -> float:
    """Return the bytes that a worker sends in a ring's all-reduce."""
    return 2 * (workers - 1) / workers * size


def forward_in_training(
    model: SizedModel, gpu: Gpu, images: float, parts: int, *, share: float = 0.0
) -> float:
    """Return the seconds of a forward of a worker's images, in so many micro-batches."""
    return parts * forward_seconds(model, gpu, model.rows * images / parts, TRAINING, share=share)


def _messages(
    phase: PhaseCosts, config: TrainConfig, branches: int, num_steps: int, cur: float
) -> list[float]:
    """Return the bytes of each all-reduce of a phase."""
    count, effects = phase.trajectories, 2 * (num_steps - 1)
    if phase.name == "router":
        refreshes = -(-count // config.iepo_every) if config.iepo != "none" else 0
        updates = [float(branches * _FLOAT)] * (count * (num_steps - 1))
        return updates + [3.0 * _FLOAT] * count + [float(effects * _FLOAT)] * refreshes
    if phase.name == "start":
        return [
            float(size_of_form(num_steps, config.forecast.corrections) ** 2 * _DOUBLE),
            float(_DOUBLE),
        ] * count
    if phase.name == "choice":
        return [3.0 * _DOUBLE] * count
    # Normal equations of the weights of all reused entries.
    weights = cur * num_steps * branches * config.forecast.order
    return [weights**2 * _DOUBLE] * count


def estimate_training(
    model: SizedModel,
    gpu: Gpu,
    config: TrainConfig,
    *,
    num_steps: int,
    cur: float,
    network_bytes_per_s: float,
    price: float = 0.0,
    share: float = 0.0,
) -> TrainingEstimate:
    """Return what training costs on `config.num_workers` GPUs.

    Args:
        cur: cache utilisation ratio of the plan to be learned.
        network_bytes_per_s: of each worker's connection.
        price: of a GPU hour.
        share: replaces the assumed share of the peak FLOP/s, if above 0.
    """
    workers = config.num_workers
    images = config.batch_size // workers
    size = config.micro_batch_size or images
    parts = -(-images // size)
    forward_s = forward_in_training(model, gpu, images, parts, share=share)
    gathered = 0.0
    if config.shard_model:
        sharded = sum(shape.sharded_weights for shape in model.shapes)
        gathered = parts * sharded * (workers - 1) / workers / network_bytes_per_s
    phases: list[PhaseEstimate] = []
    for phase in phase_costs(config, num_steps):
        sizes = _messages(phase, config, model.num_branches, num_steps, cur)
        forwards = sum(phase.costs) * num_steps
        phases.append(
            PhaseEstimate(
                name=phase.name,
                trajectories=phase.trajectories,
                samplings=sum(phase.costs),
                compute_s=forwards * forward_s,
                network_s=forwards * gathered
                + sum(reduce_seconds(workers, each, network_bytes_per_s) for each in sizes),
                reduced_bytes=sum(ring_bytes(workers, each) for each in sizes),
            )
        )
    reduce_s = reduce_seconds(workers, model.num_branches * _FLOAT, network_bytes_per_s)
    memory = _memory(model, config, images, num_steps, cur)
    seconds = sum(phase.seconds for phase in phases)
    return TrainingEstimate(
        workers=workers,
        phases=tuple(phases),
        update_s=(3.0 + config.sdt.activation_checkpointing) * (forward_s + gathered) + reduce_s,
        reduce_s=reduce_s,
        memory=memory,
        row_bytes=float(config.all_trajectories * config.batch_size * model.sample_bytes),
        start_bytes=float(model.weight_bytes * workers),
        fits=memory.total < gpu.memory,
        cost=seconds * workers / 3600 * price,
    )


def _memory(model: SizedModel, config: TrainConfig, images: int, num_steps: int, cur: float) -> Memory:
    """Return the memory of the phase that takes most.

    The phases are the router's, the measured start and the fit. Of the host's memory it is the most that any
    of them takes.
    """
    processes = config.num_workers if config.shard_model else 1
    router = combined(
        [
            training_memory(
                shape,
                batch_size=images,
                micro_batch_size=config.micro_batch_size,
                is_guided=model.is_guided,
                reuse=config.sdt.reuse,
                activation_checkpointing=config.sdt.activation_checkpointing,
                processes=processes,
                num_steps=num_steps,
            )
            for shape in model.shapes
        ]
    )
    forecast = config.forecast
    learning = [
        learning_memory(
            shape,
            rows_at_once=min(images, config.micro_batch_size or forecast.rows_at_once),
            computed_steps=(1 - cur) * num_steps,
            is_guided=model.is_guided,
            order=forecast.order,
            segments=forecast.segments and not model.is_recorded,
            savings=forecast.savings,
            processes=processes,
            num_steps=num_steps,
        )
        for shape in model.shapes
    ]
    starts, fits = zip(*learning, strict=True)
    phases = [router]
    if config.start_trajectories:
        phases.append(combined(starts))
    if forecast.trajectories:
        phases.append(combined(fits))
    return replace(max(phases, key=lambda phase: phase.total), host=max(phase.host for phase in phases))


def combined(parts: Sequence[Memory]) -> Memory:
    """Return the memory of a model whose kinds of blocks run one after another."""
    return Memory(
        sum(part.weights for part in parts),
        sum(part.caches for part in parts),
        sum(part.activations for part in parts),
        max(part.working for part in parts),
        sum(part.host for part in parts),
    )
