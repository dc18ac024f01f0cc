"""Train the router of one trial, in a process that reports to Ray Tune.

Its state and what it has reported lie in the run's storage as training's checkpoints do. A trial that starts
again reports all of it again at once, so that a new Tuner knows what the one before did; Tune's own way to
restore an experiment unpickles what it finds in the storage.
"""

import dataclasses
import itertools
import tempfile
from typing import Any

import numpy as np
import torch
from ray import tune

from harmonica.cli.train import trained
from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import Reuse
from harmonica.core.sampling import sample
from harmonica.data.samples import Shard, make_samples
from harmonica.evaluation.image_metrics import psnr
from harmonica.evaluation.metric_table import CUR, IDEAL_SPEEDUP, PSNR_TO_FULL
from harmonica.models.base import BranchedTransformer
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.validation.finite import check_finite

from ..config.sweep import LambdaKind, Target
from ..config.workflow import WorkflowConfig
from ..data.stream import sample_spec
from ..evaluation.latency import device_of
from ..promotion.gate import score
from ..run_state.resume import ROUTER, work_folder
from ..run_state.storage import RunStorage
from ..runtime.ray_runtime import quiet_libraries
from ..training.checkpoints import Checkpoints

SCORE, TRAJECTORY = "score", "trajectory"
_REPORTS = "reports"


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """The settings in which one training of a sweep differs from the others."""

    over: Target
    target: float
    iepo: LambdaKind
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the trial and its folder."""
        return f"{self.over.removeprefix('target_')}-{self.target:g}-{self.iepo}-seed-{self.seed}"

    def settings(self, config: WorkflowConfig) -> WorkflowConfig:
        """Return the run's settings with this trial's in their place.

        Raises:
            ValueError: training refuses the target.
        """
        # Without what is measured: reports are at fixed trajectories, and targets are in MACs.
        train = dataclasses.replace(config.train, iepo=self.iepo, budget=0.0, speed="macs")
        train = train.for_target(**{self.over: self.target})
        return dataclasses.replace(config, train=train, seed=self.seed)


def trials_of(config: WorkflowConfig) -> list[Trial]:
    """Return a trial for every combination of the sweep's settings."""
    chosen = config.sweep
    kinds, seeds = chosen.iepo or (config.train.iepo,), chosen.seeds or (config.seed,)
    return [Trial(chosen.over, *rest) for rest in itertools.product(chosen.all_targets, kinds, seeds)]


def place(storage: RunStorage, trial: Trial) -> str:
    """Return the trial's folder."""
    return f"{work_folder('sweep', storage)}/{trial.name}"


def evaluation_seed(config: WorkflowConfig) -> int:
    """Return a seed for evaluation whose rows no trial is trained on.

    Those of the seed after it, which measures the noise floor, are of no trial either.
    """
    return max(trial.seed for trial in trials_of(config)) + 1


class _Probe:
    """Measure a router's PSNR on a few fixed samples while it trains."""

    def __init__(self, config: WorkflowConfig, run: MultiTargetTrainer, model: BranchedTransformer) -> None:
        self.config, self.run = config, run
        spec = sample_spec(config, model, evaluation_seed(config))
        rows = make_samples(np.arange(config.sweep.report_samples), spec)
        self.batch = spec.to_batch(rows, run.device)
        self.full_NCHW = self._sample(None)

    def _sample(self, artifact: RouterArtifact | None) -> torch.Tensor:
        plan = artifact.plan if artifact else None
        reuse: Reuse = artifact.reuse if artifact else "hold"
        noise, condition = self.batch.noise_NCHW, self.batch.condition_N
        images = sample(self.run.sampler, noise, condition, plan, reuse=reuse, keys=self.batch.keys)
        check_finite(images, f"the {'router' if artifact else 'full sampler'}'s images are")
        return images

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics reported to Tune, as plain numbers."""
        artifact = self.run.artifact()
        psnr_db = float(psnr(self._sample(artifact).cpu(), self.full_NCHW.cpu()).clamp(max=100).mean())
        worth = score(psnr_db, artifact.ideal_speedup, self.config.promotion.db_per_doubling)
        reported = {TRAJECTORY: float(self.run.trajectory), CUR: artifact.plan.cur, PSNR_TO_FULL: psnr_db}
        if "loss" in metrics:
            reported["loss"] = float(metrics["loss"])
        return reported | {IDEAL_SPEEDUP: artifact.ideal_speedup, SCORE: worth}


def run_trial(chosen: dict[str, Any], *, config: WorkflowConfig) -> None:
    """Run one trial; this is Ray Tune's trainable.

    Args:
        chosen: a `Trial`, by field.
        config: the run's settings, with an absolute storage path.
    """
    from ..training.jobs import start_run

    quiet_libraries()
    trial = Trial(**chosen["trial"])
    storage = RunStorage(config.storage_path, config.run_id, patient=True)
    folder = place(storage, trial)
    checkpoints = Checkpoints(storage, f"{folder}/checkpoints")
    found = checkpoints.last()
    state: dict[str, Any] = checkpoints.load(found) if found else {_REPORTS: []}
    reports: list[dict[str, float]] = state[_REPORTS]
    is_done = storage.exists(f"{folder}/{ROUTER}/config.json")
    for before in reports:
        # ASHA ends a trial at its last report, so the router has to be there before that.
        if is_done or before[TRAJECTORY] < trial.settings(config).train.all_trajectories:
            tune.report(before)
    if is_done:
        return
    ours = trial.settings(config)
    run, spec = start_run(ours, device_of(config.train.use_gpu))
    if found:
        run.load_state(checkpoints.load(found, run.device))
    probe = _Probe(config, run, run.sampler.model)
    for metrics in trained(run, spec, Shard(run.config.batch_size)):
        is_last = run.trajectory == run.config.all_trajectories
        if is_last or run.trajectory % config.sweep.report_every == 0:
            reports.append(probe.report(metrics))
            checkpoints.save(run.trajectory, run.state() | {_REPORTS: reports})
            if not is_last:
                tune.report(reports[-1])
    with tempfile.TemporaryDirectory() as local:
        artifact = run.artifact(run_id=config.run_id, **ours.to_dict()["train"])
        storage.upload_folder(artifact.save(local), f"{folder}/{ROUTER}")
    tune.report(reports[-1])


def reports_of(storage: RunStorage, trial: Trial) -> list[dict[str, float]]:
    """Return the reports of a trial so far."""
    checkpoints = Checkpoints(storage, f"{place(storage, trial)}/checkpoints")
    found = checkpoints.last()
    return checkpoints.load(found)[_REPORTS] if found else []
