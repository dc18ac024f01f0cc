"""Constant load on an endpoint, from a process of its own: clients that ask for the same few seeded images
again and again, ask once, and write down what came of it.

    python tests/support/serving_load.py URL CLIENTS OUTPUT     # until SIGTERM
"""

import base64
import dataclasses
import hashlib
import json
import signal
import sys
import threading
import time
from pathlib import Path

import httpx

SEEDS = range(6)
_PAUSE_S = 0.25  # without any, the load would keep two cores from replicas that start
ALL_ASK = "every client has an answer"
"""A line of the output, once that is so."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """To one request."""

    at: float
    """When it was asked, since 1970."""
    seconds: float
    seed: int
    status: int
    """0 where the connection broke."""
    version: str = ""
    digest: str = ""
    """Of the picture's bytes."""
    error: str = ""


def digest(picture: bytes) -> str:
    return hashlib.sha256(picture).hexdigest()[:16]


def ask(client: httpx.Client, seed: int) -> Answer:
    at, started = time.time(), time.perf_counter()
    try:
        answer = client.post("/v1/images/generations", json={"prompt": str(seed), "seed": seed})
    except httpx.HTTPError as error:
        return Answer(at, time.perf_counter() - started, seed, 0, error=repr(error)[:300])
    seconds = time.perf_counter() - started
    if answer.status_code != 200:
        return Answer(at, seconds, seed, answer.status_code, error=answer.text[:300])
    body = answer.json()
    picture = base64.b64decode(body["data"][0]["b64_json"])
    return Answer(at, seconds, seed, 200, body["router_version"], digest(picture))


def main() -> None:
    url, clients, output = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    stop, answers = threading.Event(), []
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    begun = threading.Barrier(clients + 1)

    def go_on(number: int) -> None:
        count = number
        with httpx.Client(base_url=url, timeout=90) as client:
            answers.append(ask(client, SEEDS[count % len(SEEDS)]))
            begun.wait()
            while not stop.is_set():
                answers.append(ask(client, SEEDS[count % len(SEEDS)]))
                count += 1
                stop.wait(_PAUSE_S)

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begun.wait()
    sys.stdout.write(f"{ALL_ASK}\n")
    sys.stdout.flush()
    for thread in threads:
        thread.join()
    output.write_text(json.dumps([dataclasses.asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
