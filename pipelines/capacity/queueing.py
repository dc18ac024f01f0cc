"""Compute replicas for a request rate and a latency.

A formula gives them, and a simulation checks it.

Batches are the customers: they arrive at rate / b, and each of c replicas serves them in s seconds.

- Erlang's C, the probability that a batch waits (Erlang 1917; Kleinrock 1975, Queueing Systems I, section
  3.5), from the recurrence of Erlang's B.
- The wait is longer than t with probability C exp(-(c / s - rate / b) t) in M/M/c (Kleinrock, the same).
- Allen and Cunneen's approximation (Allen 1990, Probability, Statistics and Queueing Theory) scales the mean
  wait by (C_a^2 + C_s^2) / 2: here 1/2, since arrivals are random (C_a = 1) and a trajectory always
  takes as long (C_s = 0). The exponent is scaled by the inverse.

The formula takes no notice that Serve gives a request to the shorter of two random queues (`pow_2_router`, in
ray/serve/_private/request_router), at once, and that images do not come in batches. `simulate` does both.
"""

import math
import random
from collections import deque
from collections.abc import Callable

_VARIABILITY = 0.5
_SIMULATED_IMAGES = 20_000


def erlang_c(servers: int, load: float) -> float:
    """Return the probability that a customer waits in M/M/c.

    Args:
        load: arrival rate times service time, in servers; less than `servers`.
    """
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = load * blocked / (k + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))


def wait_quantile(servers: int, rate: float, batch: int, seconds: float, quantile: float) -> float:
    """Return the seconds that a share of batches wait at most, by the formula.

    Args:
        rate: images a second, of all replicas.
        seconds: of a batch.
    """
    waits = erlang_c(servers, rate / batch * seconds)
    if waits <= 1 - quantile:
        return 0.0
    return _VARIABILITY * math.log(waits / (1 - quantile)) / (servers / seconds - rate / batch)


def replicas_for(rate: float, batch: int, seconds: float, target_s: float, quantile: float) -> int:
    """Return the fewest replicas whose wait and batch together keep to a latency.

    Raises:
        ValueError: a batch alone takes longer than the target.
    """
    if seconds > target_s:
        raise ValueError(f"a batch takes {seconds:.3g} s and the target is {target_s:.3g} s")
    servers = math.floor(rate / batch * seconds) + 1
    while seconds + wait_quantile(servers, rate, batch, seconds, quantile) > target_s:
        servers += 1
    return servers


class _Replica:
    """A replica that takes up to `batch` waiting images as soon as it is free."""

    def __init__(self, batch: int, seconds: Callable[[int], float]) -> None:
        self._batch, self._seconds = batch, seconds
        self._waiting = deque[float]()
        self._free_at, self._running = 0.0, 0
        self.latencies: list[float] = []

    def add(self, time: float) -> None:
        self._waiting.append(time)

    def advance(self, time: float) -> None:
        """Run all batches that begin until a time."""
        while self._waiting and max(self._free_at, self._waiting[0]) <= time:
            begin, arrived = max(self._free_at, self._waiting[0]), list[float]()
            while self._waiting and len(arrived) < self._batch and self._waiting[0] <= begin:
                arrived.append(self._waiting.popleft())
            self._free_at, self._running = begin + self._seconds(len(arrived)), len(arrived)
            self.latencies += [self._free_at - each for each in arrived]

    def ongoing(self, time: float) -> int:
        """Return the images that wait or run."""
        return len(self._waiting) + (self._running if self._free_at > time else 0)


def simulate(
    replicas: int, rate: float, batch: int, seconds: Callable[[int], float], quantile: float, *, seed: int = 0
) -> float:
    """Return the seconds that this share of simulated images take no longer than.

    Images arrive at random (Poisson); each goes to the shorter queue of two replicas drawn at random.

    Args:
        seconds: of a batch of a size.
    """
    draw, time = random.Random(seed), 0.0
    all_replicas = [_Replica(batch, seconds) for _ in range(replicas)]
    for _ in range(min(max(_SIMULATED_IMAGES, 20 * batch * replicas), 10 * _SIMULATED_IMAGES)):
        time += draw.expovariate(rate)
        two = draw.sample(all_replicas, min(2, replicas))
        for each in two:
            each.advance(time)
        chosen = min(two, key=lambda each: each.ongoing(time))
        chosen.add(time)
        chosen.advance(time)
    for each in all_replicas:
        each.advance(math.inf)
    latencies = sorted(latency for each in all_replicas for latency in each.latencies)
    return latencies[min(len(latencies) - 1, math.ceil(quantile * len(latencies)) - 1)]
