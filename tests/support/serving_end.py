"""The end of an endpoint that could not start."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import ray

from pipelines.serving import lifecycle


def end_serving() -> None:
    """Stop serving without the 20 s that Serve gives a replica of `Api` which waits for a model in vain.

    Serve lets no replica go before its start is over. The cluster stays.
    """
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(lifecycle.shutdown)
        while not ended.done():
            time.sleep(0.5)
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if "#Api#" in actor["name"]:
                    with contextlib.suppress(ValueError):  # it has ended by itself
                        ray.kill(ray.get_actor(**actor))
        ended.result()
