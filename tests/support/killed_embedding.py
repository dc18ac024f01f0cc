"""A driver that embeds prompts slowly, and is killed on the way."""

import os
import subprocess
import sys
import time
from pathlib import Path

import ray

from harmonica.data.prompt_files import stored_parts

DRIVER = """
import os, sys, time
from pathlib import Path
from pipelines.data import embed_prompts as pipeline
from pipelines.runtime.private_cluster import on_loopback
from pipelines.runtime.ray_runtime import connect

text, folder, out, rows, pids = sys.argv[1:]

class Slow(pipeline.PartEmbedder):
    def __init__(self, *arguments, **named):
        (Path(pids) / str(os.getpid())).touch()
        super().__init__(*arguments, **named)

    def __call__(self, table):
        time.sleep(1)
        return super().__call__(table)

pipeline.PartEmbedder, pipeline.ROWS_PER_PART = Slow, int(rows)
with on_loopback():  # where a private cluster is
    connect()
pipeline.embed_prompts(pipeline.PromptsConfig(path=text, column="text", max_tokens=7), folder, out)
"""


def start_and_kill(arguments: list[str], out: Path, folder: Path) -> None:
    """Run a driver of this cluster until it has some parts, and kill it as a machine that fails would."""
    pids = folder / "pids"
    pids.mkdir()
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", DRIVER, *arguments, str(pids)]
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 200
            while len(stored_parts(str(out))) < 2:
                assert driver.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        finally:
            driver.kill()
            driver.wait()
    while any(Path("/proc", path.name).exists() for path in pids.iterdir()):
        assert time.monotonic() < deadline, "an actor outlived its driver"
        time.sleep(0.05)
