"""Quality of plans on the built-in flow-matching model, in the loop of diffusers' own pipeline.

    python -m tests.benchmarks.flow FOLDER [--seed 0] [--num-inference-steps 28] [--learning-rate 0.3]
        [--cacheable blocks]

Plans that need no training, and a whole training of `PipelineTrainer` by the recipe of the built-in models:
a measured start, SDT, the choice of a plan, and fitted forecasts. Each is judged by the PSNR of its latents
to the full ones, on captions that training did not see. FOLDER keeps checkpoints and results: the same
command goes on where it was ended.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import harmonica
import pipelines.pretrain
from harmonica.builtin import CAPTIONS, FASHION_PIXART
from harmonica.core.artifact import RouterArtifact
from harmonica.data.text_encoder import TextEncoder
from harmonica.integrations.recorded.kinds import KINDS
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training.config import TrainingConfig
from harmonica.training.presets import learned_steps
from harmonica.training.sdt_config import SdtConfig
from pipelines.pretrain.evaluate_flow_model import load_flow_pipeline
from pipelines.pretrain.flow_model import embed_captions

MODEL = Path(pipelines.pretrain.__file__).with_name("fashion-sd3")
GUIDANCE, TRAINED_CAPTIONS, BATCH = 4.5, 256, 16
_FIRST_TEST_SEED = 10**6

Prompts = list[dict[str, Tensor]]


def split_captions(count: int) -> tuple[Prompts, Prompts]:
    """The captions to train on and `count` others, as the arguments of one row each."""
    texts = [line for line in CAPTIONS.read_text().split("\n") if line]
    order = np.random.default_rng(0).permutation(len(texts))
    encoder = TextEncoder.load(FASHION_PIXART, dtype="float32")

    def embedded(rows: Sequence[int]) -> Prompts:
        given = embed_captions(encoder, [texts[row] for row in rows])
        nothing = {f"negative_{name}": value for name, value in embed_captions(encoder, [""]).items()}
        return [{name: value[i : i + 1] for name, value in given.items()} | nothing for i in range(len(rows))]

    return embedded(order[:TRAINED_CAPTIONS]), embedded(order[TRAINED_CAPTIONS : TRAINED_CAPTIONS + count])


class Study:
    """A pipeline, the full latents of its test captions, and what was measured so far."""

    def __init__(self, folder: Path, *, num_steps: int, count: int, cacheable: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.num_steps, self.cacheable = folder, num_steps, cacheable
        self.pipe = load_flow_pipeline(MODEL)
        self.train, self.test = split_captions(count)
        side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
        self.call = {"guidance_scale": GUIDANCE, "height": side, "width": side, "output_type": "latent"}
        self.results: dict[str, Any] = {}
        if self._results.exists():
            self.results = json.loads(self._results.read_text())
        kept = folder / "full.pt"
        if not kept.exists():
            torch.save(self.latents(num_steps), kept)
        self.full = torch.load(kept)

    @property
    def _results(self) -> Path:
        return self.folder / "results.json"

    def latents(self, num_steps: int) -> Tensor:
        """Of all test captions, under whatever plan the pipeline has (N, C, H, W)."""
        found = []
        for first in range(0, len(self.test), BATCH):
            rows = self.test[first : first + BATCH]
            prompts = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            seeds = range(_FIRST_TEST_SEED + first, _FIRST_TEST_SEED + first + len(rows))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            call = self.call | prompts | {"num_inference_steps": num_steps, "generator": generators}
            found.append(self.pipe(**call).images)
        return torch.cat(found)

    def judge(self, name: str, draw: Callable[[], Tensor], **more: Any) -> None:
        """Measure and print an arm, unless it has been."""
        if name not in self.results:
            error_N = (draw().clamp(-1, 1) - self.full.clamp(-1, 1)).square().flatten(1).mean(1)
            psnr_N = 10 * torch.log10(4 / error_N)
            self.results[name] = more | {
                "mean": float(psnr_N.mean()),
                "half_interval": float(1.96 * psnr_N.std() / len(psnr_N) ** 0.5),
                "worst_tenth": float(psnr_N.quantile(0.1)),
            }
            self._results.write_text(json.dumps(self.results, indent=1))
        result = self.results[name]
        rest = ", ".join(f"{key} {value:.2f}" for key, value in result.items() if isinstance(value, float))
        print(f"{name}: {rest}", flush=True)

    def latents_under(self, plan: RouterArtifact | harmonica.EvenSteps) -> Tensor:
        """Of all test captions, under a plan (N, C, H, W)."""
        harmonica.apply(self.pipe, plan)
        try:
            return self.latents(self.num_steps)
        finally:
            harmonica.remove(self.pipe)

    def judge_artifact(self, name: str, artifact: RouterArtifact) -> None:
        """Measure an artifact's plan."""
        found = {"speedup": artifact.ideal_speedup, "cur": artifact.plan.cur}
        self.judge(name, lambda: self.latents_under(artifact), **found)

    def trainer(self, config: TrainingConfig, seed: int) -> PipelineTrainer:
        """A training on the captions that are for it."""
        call = self.call | {"num_inference_steps": self.num_steps}
        how = {"call": call, "seed": seed, "cacheable": self.cacheable}
        return PipelineTrainer(self.pipe, self.train, config, **how)

    def go_on(
        self, name: str, trainer: PipelineTrainer, see: Mapping[int, Callable[[], None]] | None = None
    ) -> None:
        """Train to the end from the last checkpoint; `see` is called after so many trajectories."""
        checkpoint = self.folder / f"{name}.pt"
        if checkpoint.exists():
            trainer.load_state(torch.load(checkpoint))
        for trajectory in trainer.next_trajectories:
            begun = time.time()
            metrics = trainer.train_one()
            torch.save(trainer.state(), checkpoint)
            told = {key: round(value, 4) for key, value in metrics.items() if key in ("loss", "mse", "cur")}
            print(f"{name}: trajectory {trajectory}, {time.time() - begun:.0f} s, {told}", flush=True)
            if see and trajectory + 1 in see:
                see[trajectory + 1]()


def judge_untrained(study: Study, config: TrainingConfig, seed: int) -> RouterArtifact:
    """Fewer steps, and even steps, held, forecast and corrected; the forecast ones are returned."""
    fewer = round(study.num_steps / config.target_speedup)
    study.judge(f"{fewer} steps", lambda: study.latents(fewer))
    for reuse in ("hold", "forecast"):
        sdt = SdtConfig(threshold=0.5, reuse=reuse)
        even = TrainingConfig(target_speedup=config.target_speedup, initial="even", sdt=sdt)
        with study.trainer(even, seed) as trainer:
            artifact = trainer.artifact()
        study.judge_artifact(f"even steps, {reuse}", artifact)
    untrained = harmonica.EvenSteps(speedup=config.target_speedup, cacheable=study.cacheable)
    study.judge("even steps, forecast, fixed correction", lambda: study.latents_under(untrained))
    return artifact


def judge_trained(study: Study, config: TrainingConfig, even: RouterArtifact, seed: int) -> PipelineTrainer:
    """The start, the trained router, what the whole training makes, and even steps after the same fit."""
    artifacts: dict[str, Any] = {}
    trainer = study.trainer(config, seed)

    def keep(name: str) -> Callable[[], None]:
        return lambda: trainer.artifact().save(study.folder / f"{name}-{seed}.json")

    ends = (config.start_trajectories, config.start_trajectories + config.trajectories)
    with trainer:
        see = dict(zip(ends, map(keep, ("measured", "trained")), strict=True))
        study.go_on(f"whole-{seed}", trainer, see)
        chosen = trainer.run.current.context.chosen
        artifacts["fitted"] = trainer.artifact()
    for name in ("measured", "trained"):
        artifacts[name] = RouterArtifact.load(study.folder / f"{name}-{seed}.json")
        study.judge_artifact(f"{name}, linear, seed {seed}", artifacts[name])
    study.judge_artifact(f"{chosen}, fitted (chosen), seed {seed}", artifacts["fitted"])
    if even.plan.compute != artifacts["fitted"].plan.compute:
        second = study.trainer(config, seed)
        with second:
            run = second.run.current
            run.start_as(trainer.run.current)
            for phase in run.phases[:-1]:  # the forecasts alone are fitted
                phase.done = phase.trajectories
            run.context.set_router(even.logits_TB)
            run.phase.begin()
            study.go_on(f"even-fitted-{seed}", second)
            artifact = second.artifact()
        study.judge_artifact(f"even, fitted, seed {seed}", artifact)
    return trainer


def judge_learning_rate(
    study: Study, config: TrainingConfig, seed: int, rate: float, measured: PipelineTrainer
) -> None:
    """The router trained from the same start at another learning rate, without a choice."""
    sdt, name = dataclasses.replace(config.sdt, learning_rate=rate), f"rate-{rate:g}-{seed}"
    alone, kept = dataclasses.replace(config, sdt=sdt, choice_trajectories=0), study.folder / f"{name}.json"
    trainer = study.trainer(alone, seed)
    with trainer:
        trainer.run.current.start_as(measured.run.current)
        end = config.start_trajectories + config.trajectories
        study.go_on(name, trainer, {end: lambda: trainer.artifact().save(kept)})
        artifact = trainer.artifact()
    study.judge_artifact(f"trained at {rate:g}, linear, seed {seed}", RouterArtifact.load(kept))
    study.judge_artifact(f"trained at {rate:g}, fitted, seed {seed}", artifact)


def main() -> None:
    """Print the PSNR of every arm, as soon as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-inference-steps", type=int, default=28)
    parser.add_argument("--speedup", type=float, default=1.8)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8, help="images of a trajectory of training")
    parser.add_argument("--cacheable", nargs="+", default=KINDS, help="kinds of branches, or blocks")
    parser.add_argument("--learning-rate", type=float, help="train once more at this rate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(
        arguments.folder,
        num_steps=arguments.num_inference_steps,
        count=arguments.images,
        cacheable=arguments.cacheable,
    )
    config = learned_steps(is_large=False, target_speedup=arguments.speedup, batch_size=arguments.batch_size)
    even = judge_untrained(study, config, arguments.seed)
    measured = judge_trained(study, config, even, arguments.seed)
    if rate := arguments.learning_rate:
        judge_learning_rate(study, config, arguments.seed, rate, measured)


if __name__ == "__main__":
    main()
