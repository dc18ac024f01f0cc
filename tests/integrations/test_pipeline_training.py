"""`harmonica.train_pipeline`: SDT and lambda in a pipeline's own loop, and what it refuses."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from all_phases import ALL_PHASES
from diffusers import PixArtSigmaPipeline
from pixart_views import PixartViews, tiny_views
from tiny_recorded_pipelines import KINDS, STEPS, Case, make_case
from tiny_text_pipeline import write_text_pipeline
from torch import Tensor

import harmonica
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_plan
from harmonica.core.router import Router
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.integrations.recorded.kinds import KINDS as MODULES
from harmonica.integrations.recorded.planned_trajectory import PlannedTrajectory
from harmonica.pipeline_training.sampling import batched
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training.config import TrainingConfig
from harmonica.training.iepo import image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig
from harmonica.validation.settings import SettingError


def prompts_of(case: Case) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What was embedded, a prompt at a time, and the call's other arguments."""
    names = [name for name in case.call if "embeds" in name]
    rows = [{name: case.call[name][row : row + 1] for name in names} for row in range(2)]
    rest = {name: value for name, value in case.call.items() if name not in names}
    return rows, rest | {"num_inference_steps": STEPS}


ALL_STEPS = 6


def all_phases_trainer(case: Case, **how: Any) -> PipelineTrainer:
    """A training of every phase, of six steps."""
    prompts, call = prompts_of(case)
    config = dataclasses.replace(ALL_PHASES, target_speedup=0.0, target_cur=1 / 3)
    how = {"cacheable": MODULES} | how
    return PipelineTrainer(case.pipe, prompts, config, call=call | {"num_inference_steps": ALL_STEPS}, **how)


def drawn_by(case: Case, num_steps: int = ALL_STEPS) -> Tensor:
    """What the pipeline itself draws of that training's prompts."""
    prompts, call = prompts_of(case)
    generator = [torch.Generator().manual_seed(row) for row in range(2)]
    how = {"output_type": "latent", "return_dict": False, "generator": generator}
    latents = case.pipe(**call | {"num_inference_steps": num_steps}, **batched(prompts), **how)[0]
    return (latents if isinstance(latents, Tensor) else torch.stack(list(latents))).float()


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"trajectories": 2, "batch_size": 2, "iepo": "none"} | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_is_trained_and_the_pipeline_left_as_it_was(kind):
    case = make_case(kind)
    transformer = case.pipe.transformer.requires_grad_(True).train()
    before = case.run()  # with gradients wanted already, since some processors take other kernels then
    attributes, seen = dict(vars(transformer)), []
    prompts, call = prompts_of(case)
    artifact = harmonica.train_pipeline(
        case.pipe,
        prompts,
        settings(sdt=SdtConfig(beta=1.0)),
        call=call,
        cacheable=MODULES,
        on_trajectory=lambda k, metrics: seen.append((k, metrics)),
    )
    assert [k for k, _ in seen] == [0, 1] and all(metrics["mse"] > 0 for _, metrics in seen)
    fixed = 2 if kind in ("wan 2.2", "z-image truncated") else 1
    assert ((artifact.logits_TB == 5).all(1)).sum() == fixed, "what has nothing to reuse is computed"
    assert (artifact.logits_TB < 5).all(1).sum() == STEPS - fixed
    assert dict(vars(transformer)) == attributes and transformer.training
    assert all(parameter.requires_grad for parameter in transformer.parameters())
    assert torch.equal(case.run(), before)
    harmonica.apply(case.pipe, artifact)
    assert torch.equal(case.run(), before), "nothing is below tau yet"


@pytest.mark.parametrize(("kind", "calls"), [("flux", 1), ("flux guided", 2), ("krea2", 2), ("sd3", 1)])
def test_an_update_is_made_of_all_calls_of_its_step(kind, calls, monkeypatch):
    case, seen = make_case(kind), []
    update = SdtTrainer.update

    def counting(self: SdtTrainer, i: int, scores_B: Tensor, measured: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((i, len(measured)))
        return update(self, i, scores_B, measured, *args, **kwargs)

    monkeypatch.setattr(SdtTrainer, "update", counting)
    prompts, call = prompts_of(case)
    harmonica.train_pipeline(case.pipe, prompts, settings(trajectories=1), cacheable=MODULES, call=call)
    assert seen == [(i, calls) for i in reversed(range(STEPS - 1))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reuse", ["hold", "forecast"])
def test_the_artifact_says_what_an_image_keeps_between_steps(kind, reuse, monkeypatch):
    case, seen = make_case(kind), []
    prompts, call = prompts_of(case)
    config = settings(trajectories=1, sdt=SdtConfig(reuse=reuse))
    artifact = harmonica.train_pipeline(case.pipe, prompts, config, cacheable=MODULES, call=call)
    harmonica.apply(case.pipe, artifact)
    compute = PlannedTrajectory.compute

    def counting(self: PlannedTrajectory, *args: Any) -> Any:
        output = compute(self, *args)
        seen.append(sum(kept.nbytes for kept in self._kept.values()))
        return output

    monkeypatch.setattr(PlannedTrajectory, "compute", counting)
    images = len(case.run())
    assert artifact.cache_bytes * images == max(seen)


def test_a_target_of_speed_is_met_and_the_artifact_travels(tmp_path):
    case = make_case("flux")
    prompts, call = prompts_of(case)
    config = settings(target_speedup=1.3, initial="even", iepo="sensitivity")
    artifact = harmonica.train_pipeline(case.pipe, prompts, config, cacheable=MODULES, call=call)
    assert artifact.ideal_speedup == pytest.approx(1.3, rel=0.02)
    assert artifact.sampler.scheduler["_class_name"] == type(case.pipe.scheduler).__name__
    plain = {"height": 64, "width": 96, "num_inference_steps": STEPS}
    named = {"arguments": plain, "prompt_arguments": ["pooled_prompt_embeds", "prompt_embeds"]}
    assert artifact.training["call"] == named
    before = case.run()
    harmonica.apply(case.pipe, artifact.save(tmp_path / "router"))
    assert 1e-5 < float((case.run() - before).norm() / before.norm()) < 0.2


def test_a_seed_that_has_no_room_for_rows_is_refused_before_any_call():
    case = make_case("flux")
    prompts, call = prompts_of(case)
    for given in (settings(), EvenSteps()):
        with pytest.raises(SettingError, match=r"^seed is 4294967296: give a whole number from 0, below"):
            harmonica.train_pipeline(case.pipe, prompts, given, call=call, seed=2**32)


def test_even_steps_are_those_of_flow_matching_where_the_scheduler_is():
    case = make_case("flux")
    prompts, call = prompts_of(case)
    config = settings(target_speedup=2.5, initial="even")
    with PipelineTrainer(case.pipe, prompts, config, call=call | {"num_inference_steps": 20}) as trainer:
        macs = trainer.calls.view.macs()
        flow, other = (even_plan(20, macs, 2.5, is_flow_matching=each) for each in (True, False))
        assert trainer.plan.compute == flow.compute != other.compute


def test_prompts_may_be_texts(tmp_path):
    """Through a PixArt's own tokenizer and text encoder, from a folder."""
    pipe = PixArtSigmaPipeline.from_pretrained(write_text_pipeline(tmp_path / "pipeline"))
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": 16, "width": 16}
    artifact = harmonica.train_pipeline(
        pipe,
        ["a red cat", "the moon", "a dog"],
        settings(target_speedup=1.4, initial="even"),
        call=call | {"use_resolution_binning": False},
        cacheable=MODULES,
    )
    assert artifact.training["prompts"] == 3 and artifact.ideal_speedup == pytest.approx(1.4, rel=0.03)
    harmonica.apply(pipe, artifact)
    pipe("a red dog", **call, use_resolution_binning=False, output_type="latent")
    with pytest.raises(ValueError, match=r"is to make 6 steps and the router was made for 4"):
        pipe("a red dog", **call | {"num_inference_steps": 6}, use_resolution_binning=False)


def test_the_documented_example_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/pages/guides/diffusers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = [block for block in blocks if "train_pipeline(" in block]
    smaller = {
        ": 28": ": 4",
        ": 1024}": ': 16, "use_resolution_binning": False}',
        ": 1024": ": 16",
    }
    for as_written, here in smaller.items():
        assert as_written in code
        code = code.replace(as_written, here)
    pipe = PixArtSigmaPipeline.from_pretrained(write_text_pipeline(tmp_path / "pipeline"))
    folder = str(tmp_path / "router")
    monkeypatch.setattr("harmonica.pipeline_training.train.learned_steps", lambda: ALL_PHASES)
    exec(code.replace('"router"', repr(folder)), {"harmonica": harmonica, "pipe": pipe})
    harmonica.apply(pipe, folder)


def test_hard_students_and_forecasts_are_trained():
    case = make_case("sd3")
    prompts, call = prompts_of(case)
    sdt = SdtConfig(student="hard", reuse="forecast", threshold=0.5)
    config = settings(target_cur=0.3, initial="even", iepo="leave_one_out", sdt=sdt)
    artifact = harmonica.train_pipeline(case.pipe, prompts, config, cacheable=MODULES, call=call)
    assert artifact.reuse == "forecast" and 0 < artifact.plan.cur < 0.6


TRAINED_QUICKLY = ("flux guided", "sd3", "wan 2.2", "z-image truncated")
"""One or two calls a step, two streams, two transformers, and a batch that shrinks."""


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in TRAINED_QUICKLY else [pytest.mark.slow], id=kind)
        for kind in KINDS
    ],
)
def test_all_phases_reach_the_pipeline_that_a_router_is_applied_to(kind):
    """What the last plan and forecasts draw in training is what the pipeline draws under the router."""
    case = make_case(kind)
    with all_phases_trainer(case) as trainer:
        metrics = [trainer.train_one() for _ in trainer.next_trajectories]
        artifact = trainer.artifact()
        linear = Plan(artifact.plan.compute)
        # So far from linear that they are seen, whatever was fitted.
        learned = {"forecast_TBK": artifact.forecast_TBK + 0.1, "correction_TJ": artifact.correction_TJ + 0.1}
        artifact = dataclasses.replace(artifact, **learned)
        images = trainer.backend.images
        drawn, others = images(trainer._batch(0), artifact.plan, "forecast"), [images(trainer._batch(0))]
        if kind != "z-image truncated":  # where the batch shrinks a reused step may have one value before it
            others.append(images(trainer._batch(0), linear, "forecast"))
    fixed = trainer.state()["fixed_steps"]
    assert len(fixed) == (kind in ("wan 2.2", "z-image truncated"))
    assert all(all(artifact.plan.compute[i]) for i in fixed)
    found = ("measured", *(f"measured_no{k}" for k in (2, 3, 4)))
    starts = (*found, "measured_0.1", "measured_3", "measured_linear", "even")
    assert artifact.training["chosen"] in (*starts, "trained") and artifact.plan.cur > 0
    assert "choice.measured_db" in metrics[3] and "forecast.ridge" in metrics[-1]
    harmonica.apply(case.pipe, artifact)
    assert torch.equal(drawn_by(case), drawn)
    assert not any(torch.allclose(drawn, other, rtol=1e-4) for other in others)


# The trainer of the branch files


def train(views: PixartViews, config: TrainingConfig) -> tuple[Any, dict[str, float]]:
    """The artifact, and the metrics of the last trajectory."""
    metrics: dict[str, float] = {}
    artifact = harmonica.train_pipeline(
        views.pipe,
        views.prompts,
        config,
        call=views.call,
        cacheable=MODULES,
        on_trajectory=lambda _, found: metrics.update(found),
    )
    return artifact, metrics


@pytest.mark.parametrize("reuse", ["hold", "forecast"])
@pytest.mark.parametrize("student", ["soft", "hard"])
def test_an_update_is_that_of_the_trainer_of_branch_files(student, reuse):
    views, limits = tiny_views(), {"clamp": 0.9}  # which clamps the start of 1
    sdt = SdtConfig(beta=0.01, student=student, learning_rate=0.5, reuse=reuse, **limits)
    router = Router(STEPS, len(views.sampler.model.branches), 1.0)
    trainer = SdtTrainer(views.sampler, router, sdt)
    records, _ = trainer.train_trajectory([views.batch(0, 2)], torch.ones(STEPS - 1))
    config = settings(trajectories=1, initial_logit=1.0, sdt=sdt)
    artifact, metrics = train(views, config)
    assert torch.allclose(artifact.logits_TB, router.logits(), atol=1e-4)
    assert metrics["mse"] == pytest.approx(sum(r.mse for r in records) / len(records), rel=1e-5)


@pytest.mark.parametrize("kind", ["leave_one_out", "cumulative", "sensitivity"])
def test_lambda_is_that_of_the_branch_files(kind):
    views = tiny_views()
    router = Router(STEPS, len(views.sampler.model.branches), 0.5)
    wanted_T = image_error_proxy(views.sampler, router, [views.batch(0, 2)], kind=kind, config=SdtConfig())
    _, metrics = train(views, settings(trajectories=1, initial_logit=0.5, iepo=kind))
    found_T = [metrics[f"lambda.step_{i:03d}"] for i in range(STEPS - 1)]
    assert found_T == pytest.approx(wanted_T.tolist(), rel=1e-3)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sdt": SdtConfig(activation_checkpointing=True)}, "train.sdt.activation_checkpointing is True"),
    ],
)
def test_settings_without_a_counterpart_are_refused(changes, message):
    with pytest.raises(SettingError, match=f"{message}, which training in a pipeline does not do: give"):
        harmonica.train_pipeline(None, ["a"], settings(**changes))


def test_several_speeds_are_not_returned_as_one_router():
    config = settings(target_speedup=1.3, targets=(1.5,))
    with pytest.raises(SettingError, match=r"train.targets is \(1.5,\): give none, since one router is ret"):
        harmonica.train_pipeline(None, ["a"], config)


def test_pipelines_and_prompts_that_do_not_fit_are_refused():
    class Unet:
        unet = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="pipe is a Unet, which has no transformer: its denoiser is a UNet"):
        harmonica.train_pipeline(Unet(), ["a"], settings())
    case = make_case("flux")
    prompts, call = prompts_of(case)
    with pytest.raises(ValueError, match="prompts is empty"):
        harmonica.train_pipeline(case.pipe, [], settings(), call=call)
    with pytest.raises(ValueError, match="makes 1 steps: give num_inference_steps 2 or more"):
        harmonica.train_pipeline(
            case.pipe, prompts, settings(), cacheable=MODULES, call=call | {"num_inference_steps": 1}
        )
    with pytest.raises(SettingError, match=r"train.target_speedup is 9.*reach .* at most"):
        harmonica.train_pipeline(
            case.pipe, prompts, settings(target_speedup=9.0), cacheable=MODULES, call=call
        )
    harmonica.apply(case.pipe, case.artifact())
    with pytest.raises(ValueError, match=r"transformer.forward is not the class's own: harmonica.remove"):
        harmonica.train_pipeline(case.pipe, prompts, settings(), cacheable=MODULES, call=call)


def test_prompts_are_put_together():
    rows = [{"prompt_embeds": torch.ones(1, 3, 2), "names": ["a"]}, {"prompt_embeds": torch.zeros(1, 3, 2)}]
    rows[1]["names"] = ["b"]
    made = batched(rows)
    assert isinstance(made["prompt_embeds"], Tensor) and made["prompt_embeds"].shape == (2, 3, 2)
    assert made["names"] == ["a", "b"] and batched(["a", "b"]) == {"prompt": ["a", "b"]}
    with pytest.raises(ValueError, match="texts and embeddings"):
        batched(["a", rows[0]])
    with pytest.raises(ValueError, match="under different names"):
        batched([rows[0], {"prompt_embeds": torch.ones(1, 3, 2)}])
    with pytest.raises(ValueError, match="prompt_embeds of different shapes: embed all with one max_seq"):
        batched([rows[0], rows[1] | {"prompt_embeds": torch.ones(1, 4, 2)}])
