"""Load on an endpoint: closed loop by wrk, open loop by httpx at a fixed rate, whatever the answers' pace."""

import asyncio
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.benchmarks.timing import Timing

PATH = "/v1/images/generations"
# Every connection asks for a class and seed of its own. What wrk prints by itself lacks the 95th percentile.
_SCRIPT = """
local threads, count = 0, 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
function request()
  count = count + 1
  local body = string.format('{"prompt": "%d", "seed": %d}', count % 10, id * 1000000 + count)
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, body)
end
function done(summary, latency, requests)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format("RESULT %d %d %d %f %f %f", summary.requests, summary.duration,
    broken + errors.status, latency:percentile(50), latency:percentile(95), latency:percentile(99)))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What came of it."""

    per_second: float
    """Answers with an image."""
    failed: int
    p50_s: float
    p95_s: float
    p99_s: float
    images: int = 0

    @property
    def arms(self) -> dict[str, Timing]:
        """For a comparison's row."""
        return {"p50": Timing(self.p50_s, 0), "p95": Timing(self.p95_s, 0), "p99": Timing(self.p99_s, 0)}


def closed_loop(url: str, clients: int, seconds: int) -> Load | None:
    """So many clients, each of which asks again as soon as it is answered. None where there is no wrk."""
    program = shutil.which("wrk")
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "load.lua")
        script.write_text(_SCRIPT)
        command = [program, "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "60s", "-s", str(script)]
        said = subprocess.run([*command, url + PATH], check=True, capture_output=True, text=True).stdout
    numbers = re.search(r"RESULT (\d+) (\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+)", said)
    assert numbers is not None, said
    requests, micros, failed, *quantiles = (float(number) for number in numbers.groups())
    p50_s, p95_s, p99_s = (quantile / 1e6 for quantile in quantiles)
    return Load((requests - failed) / micros * 1e6, int(failed), p50_s, p95_s, p99_s)


def closed_loop_of(url: str, models: Sequence[str], clients: int, seconds: float) -> Load:
    """As `closed_loop`, by httpx: each client always asks for the same one of the models."""

    async def run() -> tuple[list[float], int, float]:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=url, timeout=90, limits=limits) as client:
            good: list[float] = []
            failed = 0
            ends = time.perf_counter() + seconds

            async def go_on(number: int) -> None:
                nonlocal failed
                model, count = models[number % len(models)], 0
                while (began := time.perf_counter()) < ends:
                    count += 1
                    body = {"model": model, "prompt": str(count % 10), "seed": 1_000_000 * number + count}
                    answer = await client.post(PATH, json=body)
                    if answer.status_code == 200:
                        good.append(time.perf_counter() - began)
                    else:
                        failed += 1

            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for number in range(clients):
                    group.create_task(go_on(number))
            return good, failed, time.perf_counter() - began

    good, failed, passed = asyncio.run(run())
    return _load(good, failed, passed)


def open_loop(url: str, per_second: float, seconds: float) -> Load:
    """Requests at even intervals, so that a slow answer keeps none of the next ones back."""

    async def run() -> tuple[list[float], int, float]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=90, limits=limits) as client:

            async def ask(number: int) -> float | None:
                began = time.perf_counter()
                body = {"prompt": str(number % 10), "seed": number}
                answer = await client.post(PATH, json=body)
                return time.perf_counter() - began if answer.status_code == 200 else None

            await ask(0)
            tasks, started = [], time.perf_counter()
            for number in range(round(per_second * seconds)):
                await asyncio.sleep(max(0.0, started + number / per_second - time.perf_counter()))
                tasks.append(asyncio.create_task(ask(number)))
            answers = await asyncio.gather(*tasks)
            passed = time.perf_counter() - started
        good = [answer for answer in answers if answer is not None]
        return good, len(answers) - len(good), passed

    good, failed, passed = asyncio.run(run())
    return _load(good, failed, passed)


def _load(good: Sequence[float], failed: int, passed: float) -> Load:
    p50_s, p95_s, p99_s = (_quantile(good, share) for share in (0.5, 0.95, 0.99))
    return Load(len(good) / passed, failed, p50_s, p95_s, p99_s, len(good))


def _quantile(values: Sequence[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))
