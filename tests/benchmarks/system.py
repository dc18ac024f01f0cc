"""Around the arithmetic: two processes beside one, the stream of rows, and what a start consists of."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.data.samples import SampleSpec, Shard
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.trainer import RouterTrainer
from tests.benchmarks.arms import builtin_shape, make_batch, make_dit, make_sampler, random_plan
from tests.benchmarks.timing import Aim, Row, Timing, time_arms

_ROWS, _STEPS, _ROUNDS = 4, 6, 5


def _work(rank: int, processes: int, together: bool, folder: str) -> None:
    """One of some processes with a thread each: seconds of a trajectory of training, and of sampling."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store, group = (f"{folder}/store", (rank, processes)) if together else (f"{folder}/{rank}", (0, 1))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=group[0], world_size=group[1])
    sampler = make_sampler(make_dit(builtin_shape()), _STEPS)
    run = RouterTrainer(sampler, TrainingConfig(batch_size=_ROWS, iepo="none"), seed=0)
    inputs = make_batch(sampler.model, _ROWS)
    batch = Batch(*inputs, SampleKeys.of(1, range(_ROWS)))
    plan = random_plan(_STEPS, len(sampler.model.branches), 0.4)

    def train() -> None:
        run.train_one(batch)
        dist.barrier()

    def draw() -> None:
        sample(sampler, *inputs, plan)
        dist.barrier()

    timings = time_arms({"train": train, "sample": draw}, rounds=_ROUNDS)
    if rank == 0:
        medians = {name: [timing.median_s, timing.spread_s] for name, timing in timings.items()}
        Path(folder, "seconds.json").write_text(json.dumps(medians))
    dist.destroy_process_group()


def _seconds(processes: int, *, together: bool = True) -> dict[str, Timing]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, args=(processes, together, folder), nprocs=processes)
        measured = json.loads(Path(folder, "seconds.json").read_text())
    return {name: Timing(*values) for name, values in measured.items()}


def scaling(*, whole: bool) -> Iterator[Row]:
    """Twice the rows on two processes, in the time of one: one thread each.

    Two that have nothing to do with each other show what the machine itself loses.
    """
    one, two, apart = _seconds(1), _seconds(2), _seconds(2, together=False)
    branches = len(make_dit(builtin_shape()).branches)
    for name, unit in (
        ("train", f"of linear scaling ({4 * branches} bytes to reduce an update)"),
        ("sample", "of linear scaling"),
    ):
        efficiency = one[name].median_s / two[name].median_s
        arms = {"one process": one[name], "two, as many rows each": two[name], "two strangers": apart[name]}
        yield Row.judge(f"{name}, built-in shape, two processes", arms, efficiency, unit, Aim(">=", 0.95))


def data(*, whole: bool) -> Iterator[Row]:
    """Rows a second from Ray Data, next to what training takes."""
    import ray

    from pipelines.data.stream import stream_samples
    from pipelines.runtime.ray_runtime import connect

    connect()
    rows, seconds = 20_000, []
    for _ in range(3):
        stream = stream_samples(
            SampleSpec.of(make_dit(builtin_shape()), 0), Shard(_ROWS), trajectories=rows // _ROWS
        )
        batches = iter(stream.iter_batches(batch_size=_ROWS))
        next(batches)  # what starting up takes is no matter of rate
        started = time.perf_counter()
        count = sum(len(batch["label"]) for batch in batches)
        seconds.append((time.perf_counter() - started) / count)
    ray.shutdown()
    a_row = Timing(sorted(seconds)[1], max(seconds) - min(seconds))
    trained = _seconds(1)["train"].median_s / _ROWS * 20 / _STEPS  # at T = 20
    arms = {"a streamed row": a_row, "a trained row": Timing(trained, 0.0)}
    yield Row.judge(
        "rows of the built-in shape", arms, trained / a_row.median_s, "times as fast", Aim(">=", 20)
    )


_PARTS = {
    "torch": "import torch",
    "timm": (
        "from harmonica.torchvision_ops import ensure_torchvision_imports; ensure_torchvision_imports(); "
        "import timm.layers"
    ),
    "harmonica": "import harmonica.core.sampling, harmonica.models.loading, harmonica.samplers",
    "model": "from harmonica.models.loading import *; loaded = load_model(ModelConfig())",
    "first image": (
        "import torch; from harmonica.samplers import *; from harmonica.core.sampling import sample; "
        "sample(make_sampler(loaded.model, SamplerConfig()), torch.zeros(1, 1, 28, 28), torch.tensor([1]))"
    ),
}


def start(*, whole: bool) -> Iterator[Row]:
    """From a new process to the first image, part by part."""
    lines = ["import time", "last = time.perf_counter()"]
    for name, code in _PARTS.items():
        lines += [code, f"now = time.perf_counter(); print({name!r}, now - last); last = now"]
    rounds: dict[str, list[float]] = {name: [] for name in _PARTS}
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
        )
        for line in done.stdout.splitlines():
            name, _, value = line.rpartition(" ")
            rounds[name].append(float(value))
    arms = {
        name: Timing(sorted(values[1:])[1], max(values[1:]) - min(values[1:]))
        for name, values in rounds.items()
    }
    ours = sum(arms[name].median_s for name in ("harmonica", "model", "first image"))
    total = sum(timing.median_s for timing in arms.values())
    yield Row.judge("new process to first image", arms, ours / total, "is not torch or timm", Aim("<=", 0.5))
