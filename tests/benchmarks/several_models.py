"""Two models behind one endpoint next to one of them alone, and what loading one for a request costs.

Both have the weights and the router of the built-in DiT, so that their images cost the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
import psutil

from harmonica.builtin import CHAMPION
from pipelines.config.serve import ServeConfig
from pipelines.serving.serve_args import ServeArgs, ServedModel
from tests.benchmarks.load import PATH, Load, closed_loop_of
from tests.benchmarks.serving import free_port
from tests.benchmarks.timing import Aim, Row, Timing, time_arms

_BATCH, _CLIENTS, _SECONDS, _ROUNDS = 16, 16, 8, 3
_NAMES = ("first", "second")


@contextmanager
def _endpoint(most: int) -> Iterator[str]:
    """URL of one replica on a private cluster, with room for so many of the two models."""
    import ray

    from pipelines.runtime.ray_runtime import connect
    from pipelines.serving import lifecycle

    config = ServeConfig(
        port=free_port(), max_batch_size=_BATCH, max_waiting=4 * _BATCH, max_models_per_replica=most
    )
    models = {name: ServedModel(router=str(CHAMPION)) for name in _NAMES}
    connect()
    try:
        yield lifecycle.deploy_args(ServeArgs(serve=config, models=models, follow_s=5))
    finally:
        lifecycle.shutdown()
        ray.shutdown()


def several_models(*, whole: bool) -> Iterator[Row]:
    """Images a second of two models, with and without room for both, and the cost of a miss."""
    rounds = 3 * _ROUNDS if whole else _ROUNDS
    for most, where in ((2, "both loaded"), (1, "room for one")):
        with _endpoint(most) as url:
            yield from _throughput(url, where, rounds)
            if most == 1:
                yield _miss(url)


def _cpu_seconds() -> float:
    """That the sampling replica has used so far: what other work on the machine changes least."""
    children = psutil.Process().children(recursive=True)
    (replica,) = [
        each
        for each in children
        if "ServeReplica:harmonica:Sampler" in "".join(each.as_dict(["cmdline"])["cmdline"] or [])
    ]
    times = replica.cpu_times()
    return float(times.user + times.system)


def _throughput(url: str, where: str, rounds: int) -> Iterator[Row]:
    """In turn, so that a slow minute hits both."""
    one: list[Load] = []
    both: list[Load] = []
    cpu_s: dict[str, list[float]] = {"one model": [], "two": []}
    for _ in range(rounds):
        for name, models, loads in (("one model", _NAMES[:1], one), ("two", _NAMES, both)):
            before = _cpu_seconds()
            loads.append(closed_loop_of(url, models, _CLIENTS, _SECONDS))
            cpu_s[name].append((_cpu_seconds() - before) / loads[-1].images)
    each = {f"CPU of an image, {name}": _spread(values) for name, values in cpu_s.items()}
    share = each["CPU of an image, two"].median_s / each["CPU of an image, one model"].median_s
    yield Row.judge(f"CPU of two models, {where}", each, share, "of one model's", Aim("<=", 1.1))
    arms = {f"an image, {name}": _timing(loads) for name, loads in (("one model", one), ("two", both))}
    share = arms["an image, one model"].median_s / arms["an image, two"].median_s
    what = f"closed loop of {_CLIENTS} clients, half for each of two models, {where}"
    middle = sorted(both, key=lambda load: load.per_second)[len(both) // 2]
    yield Row.judge(what, arms | middle.arms, share, "of one model's images a second", Aim(">=", 0.9))
    failed = sum(load.failed for load in one + both)
    yield Row.judge(f"requests of that, {where}", {}, failed, "failed", Aim("<=", 0))


def _timing(loads: Sequence[Load]) -> Timing:
    return _spread([1 / load.per_second for load in loads])


def _spread(values: Sequence[float]) -> Timing:
    seconds = sorted(values)
    return Timing(seconds[len(seconds) // 2], seconds[-1] - seconds[0])


def _miss(url: str) -> Row:
    """One client, which asks for the model that was unloaded, and then again."""
    with httpx.Client(base_url=url, timeout=90) as client:
        names = iter(_NAMES * 1000)
        current = ""

        def miss() -> None:
            nonlocal current
            current = next(names)
            ask()

        def ask() -> None:
            client.post(PATH, json={"model": current, "prompt": "7", "seed": 7}).raise_for_status()

        arms = time_arms({"miss": miss, "hit": ask}, rounds=20)
    added_ms = 1000 * (arms["miss"].median_s - arms["hit"].median_s)
    return Row.judge("a request for a model that is not loaded", arms, added_ms, "ms more", Aim("<=", 1000))
