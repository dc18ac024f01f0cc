"""Targets of quality and of several speeds, and micro-batches, of a training in a pipeline's own loop."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from all_phases import ALL_PHASES
from tiny_pipeline_folder import SIZE, make_pipeline
from tolerances import of_training
from torch import Tensor

import harmonica
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import stepwise_plan
from harmonica.integrations.recorded.kinds import KINDS as MODULES
from harmonica.pipeline_training.sampling import sample_pipeline
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.validation.settings import SettingError

STEPS = 7
PROMPTS = ["a red cat", "the moon"]
CALL = {
    "num_inference_steps": STEPS,
    "height": SIZE,
    "width": SIZE,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}
UNMEASURED: dict[str, Any] = {
    "initial": "even",
    "start_trajectories": 0,
    "choice_trajectories": 0,
    "forecast": ForecastConfig(),
}
QUALITY = dataclasses.replace(ALL_PHASES, target_speedup=0.0, target_psnr=30.0, iepo="none")


def make_trainer(config: TrainingConfig, **changes: Any) -> PipelineTrainer:
    """A small Chroma with a VAE, guided."""
    return PipelineTrainer(make_pipeline(), PROMPTS, config, call=CALL, cacheable=MODULES, **changes)


def train(trainer: PipelineTrainer) -> list[dict[str, float]]:
    return [trainer.train_one(lambda tensor: None) for _ in trainer.next_trajectories]


def pictures(plan: Plan | None, trainer: PipelineTrainer) -> Tensor:
    """What the pipeline itself draws in [-1, 1], in full or under a plan that holds or forecasts."""
    pipe, artifact = make_pipeline(), trainer.artifact()
    if plan is not None:
        logits_TB = torch.where(plan.to_tensor(), 1.0, -1.0)
        applied = dataclasses.replace(artifact, logits_TB=logits_TB, threshold=0.5, forecast_TBK=None)
        harmonica.apply(pipe, applied)
    return 2 * sample_pipeline(pipe, CALL, PROMPTS, range(2), seed=0, output_type="pt") - 1


def test_a_quality_is_met_in_decoded_pictures_by_the_fastest_start_that_has_it():
    with make_trainer(QUALITY) as trainer:
        search, phase = trainer.run.current.phases[0].search, trainer.run.current.phase
        assert phase.name == "start"
        phase.step(trainer._batch(0), lambda tensor: None)
        branches = len(trainer.calls.view.branches)
        plans = {count: stepwise_plan(STEPS, branches, search.best(count)) for count in (1, 2)}
        full = pictures(None, trainer)
        found = {
            count: float(
                10 * torch.log10(4 / (pictures(plan, trainer) - full).square().flatten(1).mean(1)).mean()
            )
            for count, plan in plans.items()
        }
        macs = trainer.calls.view.macs()
    assert found[1] > found[2], "fewer decibels, or there is nothing to tell apart"
    config = dataclasses.replace(QUALITY, target_psnr=(found[1] + found[2]) / 2)
    with make_trainer(config) as trainer:
        first = trainer.train_one(lambda tensor: None)
        assert first["psnr"] == pytest.approx(found[1], abs=1e-2)
        assert first["target_speedup"] == pytest.approx(plans[1].ideal_speedup(macs), rel=1e-6)
        with make_trainer(config) as again:
            again.load_state(trainer.state())
            rest = train(trainer)
            assert len(rest) == config.all_trajectories - 1
            assert train(again)[1]["beta"] == rest[1]["beta"] > 0
        artifact = trainer.artifact()
    assert artifact.ideal_speedup == pytest.approx(plans[1].ideal_speedup(macs), rel=0.02)


def test_a_quality_of_latents_is_refused():
    pipe = make_pipeline()
    pipe.vae = None
    with (
        pytest.raises(SettingError, match=r"train.target_psnr is 30.0: the model draws latents, .* give 0"),
        PipelineTrainer(pipe, PROMPTS, QUALITY, call=CALL),
    ):
        pass


@pytest.mark.parametrize("student", ["soft", "hard"])
def test_parts_of_a_batch_train_the_router_of_the_whole(student):
    sdt = dataclasses.replace(ALL_PHASES.sdt, student=student, clamp=1.5)
    config = dataclasses.replace(ALL_PHASES, **UNMEASURED, batch_size=3, sdt=sdt)
    found = []
    for size in (0, 2):
        with make_trainer(dataclasses.replace(config, micro_batch_size=size)) as trainer:
            metrics, drawn = train(trainer), trainer.artifact()
        found.append((metrics, drawn))
    (expected, whole), (metrics, drawn) = found
    near = of_training(sdt.learning_rate, config.trajectories)
    assert (whole.logits_TB[:-1].abs() <= 1.5).all(), "the start of 2 is clamped"
    torch.testing.assert_close(drawn.logits_TB, whole.logits_TB, **near)
    for ours, theirs in zip(metrics, expected, strict=True):
        names = [name for name in theirs if name.startswith(("loss", "mse", "lambda", "beta"))]
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-3)


def test_no_more_than_a_part_is_drawn_at_a_time():
    config = dataclasses.replace(ALL_PHASES, batch_size=3, micro_batch_size=2, iepo="none")
    with make_trainer(config) as trainer:
        own, sizes = trainer.calls.run, set()

        def run(policy, prompts, rows, **how):
            sizes.add(len(rows))
            return own(policy, prompts, rows, **how)

        trainer.calls.run = run
        train(trainer)
    assert sizes == {1, 2}


FAMILY = dataclasses.replace(
    ALL_PHASES,
    target_speedup=1.2,
    targets=(1.4,),
    trajectories=1,
    iepo="none",
    forecast=ForecastConfig(),
)


def test_each_speed_s_router_is_that_of_a_training_of_its_own():
    with make_trainer(FAMILY) as trainer:
        metrics = train(trainer)
        found = {1.2: trainer.artifact(), 1.4: trainer.extra_artifacts(run_id="r")["1.4x"]}
    assert len(metrics) == FAMILY.all_trajectories == 1 + 2 * (1 + 1), "the start counts once"
    assert [each["target_speedup"] for each in metrics] == [1.2] * 3 + [1.4] * 2
    assert found[1.4].training["target_speedup"] == 1.4 and found[1.4].training["run_id"] == "r"
    for target, artifact in found.items():
        assert artifact.ideal_speedup == pytest.approx(target, rel=0.02)
        with make_trainer(dataclasses.replace(FAMILY, target_speedup=target, targets=())) as alone:
            train(alone)
            assert torch.equal(artifact.logits_TB, alone.artifact().logits_TB)


def test_several_speeds_go_on_from_any_trajectory():
    config = dataclasses.replace(FAMILY, **UNMEASURED)
    with make_trainer(config) as whole:
        train(whole)
        wanted = [whole.artifact(), *whole.extra_artifacts().values()]
    state: dict[str, Any] | None = None
    for trajectory in range(config.all_trajectories):
        with make_trainer(config) as trainer:
            if state is not None:
                trainer.load_state(state)
            assert trainer.trajectory == trajectory
            trainer.train_one(lambda tensor: None)
            state = copy.deepcopy(trainer.state())
            found = [trainer.artifact(), *trainer.extra_artifacts().values()]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.logits_TB, theirs.logits_TB)


def test_a_checkpoint_from_before_there_were_several_speeds_is_taken():
    config = dataclasses.replace(ALL_PHASES, **UNMEASURED, iepo="none")
    with make_trainer(config) as trainer:
        trainer.train_one(lambda tensor: None)
        old = copy.deepcopy(trainer.run.current.state() | {"fixed_steps": []})
        train(trainer)
        with make_trainer(config) as again:
            again.load_state(old)
            assert again.trajectory == 1
            train(again)
            assert torch.equal(again.artifact().logits_TB, trainer.artifact().logits_TB)
