"""The HTTP endpoint next to the sampler that it serves: what answering costs, alone and when it is full."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import torch

from harmonica.builtin import CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from pipelines.config.serve import ServeConfig
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from tests.benchmarks.load import PATH, closed_loop, cores, open_loop
from tests.benchmarks.timing import Aim, Row, Timing, time_arms

_BATCH, _SECONDS, _ROUNDS = 16, 15, 3


def _images() -> ImageSampler:
    images = ImageSampler(load_model(ModelConfig()))
    images.use(images.make_plan(RouterArtifact.load(CHAMPION), "builtin"))
    return images


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _endpoint(threads: int) -> Iterator[str]:
    """URL of one replica on a private cluster."""
    import ray

    from pipelines.runtime.ray_runtime import connect
    from pipelines.serving import lifecycle

    port = free_port()
    config = ServeConfig(port=port, num_cpus=threads, max_batch_size=_BATCH, max_waiting=4 * _BATCH)
    connect()
    try:
        url = lifecycle.deploy(config, ModelConfig(), registered_model="bench", router=str(CHAMPION))
        yield url
    finally:
        lifecycle.shutdown()
        ray.shutdown()


def serving(*, whole: bool) -> Iterator[Row]:
    """Images a second under saturation, what one request takes longer than its image, and open loop."""
    images, before = _images(), torch.get_num_threads()
    batch = [ImageRequest(number % 10, number, 0) for number in range(_BATCH)]
    rounds = 3 * _ROUNDS if whole else _ROUNDS
    try:
        for threads in sorted({1, cores()}):
            torch.set_num_threads(threads)
            where = f"built-in champion, {threads} of {cores()} cores to torch"
            with _endpoint(threads) as url:
                yield from _single(url, images, where)
                yield from _saturated(url, images, batch, where, rounds)
    finally:
        torch.set_num_threads(before)


def _single(url: str, images: ImageSampler, where: str) -> Iterator[Row]:
    with httpx.Client(base_url=url, timeout=90) as client:
        body = {"prompt": "7", "seed": 7}
        arms = time_arms(
            {
                "request": lambda: client.post(PATH, json=body).raise_for_status(),
                "sampler": lambda: images.generate([ImageRequest(7, 7, 0)]),
            },
            rounds=60,
        )
    added_ms = 1000 * (arms["request"].median_s - arms["sampler"].median_s)
    yield Row.judge(f"one request, {where}", arms, added_ms, "ms more than its image", Aim("<=", 15))


def _saturated(
    url: str, images: ImageSampler, batch: list[ImageRequest], where: str, rounds: int
) -> Iterator[Row]:
    """In turn, so that a slow minute hits both: the bare sampler in batches, and twice as many clients."""
    bare, served = [], []
    for _ in range(rounds):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < _SECONDS:
            images.generate(batch)
            count += len(batch)
        bare.append((time.perf_counter() - started) / count)
        load = closed_loop(url, 2 * _BATCH, _SECONDS)
        if load is None:
            print("    wrk is not installed: no closed loop")
            return
        served.append(load)
    served.sort(key=lambda load: load.per_second)
    middle, seconds = served[len(served) // 2], sorted(bare)[len(bare) // 2]
    arms = {
        "an image, bare": Timing(seconds, max(bare) - min(bare)),
        "an image, served": Timing(
            1 / middle.per_second, 1 / served[0].per_second - 1 / served[-1].per_second
        ),
    }
    share = middle.per_second * seconds
    what = f"closed loop of {2 * _BATCH} clients, {where}"
    yield Row.judge(what, arms | middle.arms, share, "of the bare sampler's images", Aim(">=", 0.95))
    for part in (0.5, 0.8):
        load = open_loop(url, part * middle.per_second, _SECONDS)
        what = f"open loop at {part:.0%} of that ({part * middle.per_second:.1f} a second), {where}"
        yield Row.judge(what, load.arms, load.failed, "requests failed", Aim("<=", 0))
