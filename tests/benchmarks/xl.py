"""DiT-XL/2 with random weights through the whole method on this machine, with peak memory of each phase.

    python -m tests.benchmarks.xl [--image-size 512] [--layers 28] [--dtypes float32 bfloat16] [--folder DIR]

Writes a public-layout `.pt`, then in a process of its own per precision: loads it, trains three
trajectories at T = 4, samples full and planned, saves the router, reloads it and samples the same again.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.dit.config import dit_shape
from harmonica.models.dit.model import DiT
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.presets import dit_xl_2_256_t10
from harmonica.training.trainer import RouterTrainer

STEPS, TRAJECTORIES = 4, 3
_FOLDER = Path(tempfile.gettempdir()) / "harmonica-xl"
_MIB = 2**10  # /proc counts in kB


@dataclass(frozen=True)
class Phase:
    """One phase of the run, as measured."""

    name: str
    seconds: float
    anonymous_mib: int
    """Memory of the process's own at the phase's end; mapped weights are not in it."""
    peak_mib: int
    """Highest resident size so far, mapped weights that were read included."""


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) // _MIB
    raise AssertionError(f"no {field} in /proc/self/status")


def write_checkpoint(path: Path, image_size: int, layers: int) -> None:
    """Random weights, none of them silent, in the public layout and float32."""
    model = DiT(replace(dit_shape("DiT-XL/2", image_size), num_layers=layers))
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    torch.save({"ema": model.state_dict()}, path)


def run(path: Path, dtype: str) -> list[Phase]:
    """Load, train, sample, save, reload; raises if anything is not as it was."""
    phases: list[Phase] = []
    started = time.perf_counter()

    def done(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        phases.append(Phase(name, round(now - started, 2), _status("RssAnon"), _status("VmHWM")))
        started = now

    loaded = load_model(ModelConfig(path=str(path), dtype=dtype))  # type: ignore[arg-type]
    done("load")
    recipe = dit_xl_2_256_t10()
    settings = replace(recipe.train, trajectories=TRAJECTORIES, batch_size=1, iepo_every=TRAJECTORIES)
    sampler = make_sampler(loaded.model, replace(recipe.sampler, num_inference_steps=STEPS))
    training = RouterTrainer(sampler, settings, seed=0)
    keys, side = SampleKeys.of(0, [0]), loaded.model.sample_size
    noise, label = torch.from_numpy(keys.start_noise((4, side, side))), torch.tensor([207])
    for _ in range(TRAJECTORIES):
        metrics = training.train_one(Batch(noise, label, keys))
    assert all(map(torch.isfinite, map(torch.tensor, metrics.values())))
    done(f"train {TRAJECTORIES} trajectories, one lambda refresh")
    full = sample(sampler, noise, label)
    done("sample, full")
    artifact = training.artifact()
    cached = sample(sampler, noise, label, artifact.plan)
    done(f"sample, CUR {artifact.plan.cur:.0%}")
    assert full.isfinite().all() and not torch.equal(full, cached)
    with tempfile.TemporaryDirectory() as folder:
        again = RouterArtifact.load(artifact.save(folder))
    model = load_model(ModelConfig(path=str(path), dtype=dtype)).model  # type: ignore[arg-type]
    again.check(model, sampler.config)
    repeated = sample(make_sampler(model, again.sampler), noise, label, again.plan)
    assert torch.equal(repeated, cached), "a reloaded router samples the same"
    done("reload router and model, sample")
    return phases


def main(
    image_size: int = 256,
    layers: int = 28,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    folder: Path = _FOLDER,
    child: bool = False,
) -> None:
    """Measure; `--child` is one precision in this process, as JSON."""
    path = folder / f"dit-xl-2-{image_size}-{layers}-layers.pt"
    if child:
        print(json.dumps([asdict(phase) for phase in run(path, dtypes[0])]))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_checkpoint(path, image_size, layers)
    print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")
    for dtype in dtypes:
        command = [sys.executable, "-m", "tests.benchmarks.xl", "--child", f"--image-size={image_size}"]
        command += [f"--layers={layers}", f"--folder={folder}", "--dtypes", dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        for phase in json.loads(done.stdout.splitlines()[-1]):
            print(
                f"{dtype:9} {phase['name']:44} {phase['seconds']:8.1f} s   own memory "
                f"{phase['anonymous_mib']:6} MiB   peak resident {phase['peak_mib']:6} MiB",
                flush=True,
            )


if __name__ == "__main__":
    tyro.cli(main)
