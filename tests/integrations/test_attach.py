"""`harmonica.apply`: our sampler's images, with the model that a router was made for."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from tiny_attached import KINDS, STEPS, Case, apart, config, make_case
from tiny_pipeline import LINEAR
from tolerances import of_pass, of_trajectory

import harmonica
from harmonica.core.sampling import sample
from harmonica.models.dit.diffusers_view import DiffusersDiT
from harmonica.samplers import make_sampler

DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, **LINEAR}


@pytest.fixture(params=KINDS)
def case(request, tmp_path) -> Case:
    return make_case(request.param, tmp_path)


# Images


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("reuse", "is_corrected", "has_segments"),
    [("hold", False, False), ("forecast", False, False), ("forecast", True, False), ("forecast", True, True)],
)
def test_a_pipeline_with_a_plan_makes_our_samplers_latents(
    case, reuse, is_corrected, has_segments, guidance_scale
):
    sampler = config(guidance_scale=guidance_scale)
    how = {"reuse": reuse, "sampler": sampler, "has_segments": has_segments}
    artifact = case.artifact(**how, is_corrected=is_corrected)
    if has_segments:
        assert len(artifact.segments) < artifact.plan.num_branches
    wanted, full = case.ours(artifact), case.run(guidance_scale=guidance_scale)
    harmonica.apply(case.transformer, artifact)
    found = case.run(guidance_scale=guidance_scale)
    assert 0.2 < artifact.plan.cur < 0.8
    assert apart(found, wanted) < of_trajectory(STEPS)
    assert apart(full, wanted) > 1e-3, "caching is seen"
    if is_corrected:
        assert apart(case.ours(case.artifact(**how)), wanted) > 1e-3


def test_the_scheduler_of_a_folder_is_followed_from_the_artifacts_folder(case, tmp_path):
    artifact = case.artifact(sampler=config("diffusers", scheduler=DDIM))
    case.pipe.scheduler = DDIMScheduler.from_config(DDIM)
    wanted = case.ours(artifact)
    harmonica.apply(case.transformer, str(artifact.save(tmp_path / "router")))
    assert apart(case.run(), wanted) < of_trajectory(STEPS)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("dpm-solver++", DPMSolverMultistepScheduler(**LINEAR)),
        ("sa-solver", SASolverScheduler(**LINEAR)),
        ("diffusers", DDIMScheduler.from_config(DDIM)),
    ],
)
@pytest.mark.parametrize("steps", [2, 7, 20, 50])
def test_our_samplers_visit_the_schedulers_timesteps(dit, name, scheduler, steps):
    settings = {"scheduler": DDIM} if name == "diffusers" else {}
    scheduler.set_timesteps(steps)
    ours = make_sampler(dit.model, config(name, num_inference_steps=steps, **settings)).timesteps
    assert ours == scheduler.timesteps.flip(0).tolist()


def test_the_first_step_is_diffusers_own_forward(case):
    wanted = case.call(999)
    harmonica.apply(case.transformer, case.artifact())
    assert apart(case.call(999), wanted) < of_pass(torch.float64)


def test_diffusers_dit_seen_as_branches_is_our_own(dit):
    view = DiffusersDiT(dit.transformer)
    assert view.identity() == dit.model.identity() and view.macs() == dit.model.macs()
    for ours, theirs in zip(dit.model.branches, view.branches, strict=True):
        assert (ours.name, ours.macs) == (theirs.name, theirs.macs)
    latents = [sample(make_sampler(model, config()), dit.noise, dit.condition) for model in (view, dit.model)]
    assert apart(*latents) < of_pass(torch.float64, 2 * STEPS)
    embedder = dit.transformer.transformer_blocks[1].norm1.emb.timestep_embedder
    embedder.linear_1.weight.data[3, 3] += 1
    with pytest.raises(ValueError, match=r"transformer: .*blocks.1.norm1.emb.* is not that of block 0"):
        view.identity()


# What the router was made for


def test_a_model_it_was_not_made_for_is_refused(dit, pixart):
    for case, other in ((dit, pixart), (pixart, dit)):
        with pytest.raises(ValueError, match=r"model.architecture is .* and the router was made for"):
            harmonica.apply(case.transformer, other.artifact())
    with pytest.raises(ValueError, match=r"transformer is a AutoencoderKL: give pipe.transformer, a DiTTran"):
        harmonica.apply(dit.pipe.vae, dit.artifact())
    for case in (dit, pixart):
        artifact = case.artifact()
        weight = case.transformer.transformer_blocks[1].attn1.to_k.bias
        weight.data[0] += 1
        with pytest.raises(ValueError, match=r"model.weights is sha256:\w+ and the router was made for sha"):
            harmonica.apply(case.transformer, artifact)
        assert not hasattr(case.transformer, "_harmonica") and "forward" not in vars(case.transformer)
        harmonica.apply(case.transformer, artifact, check_weights=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_half_precision_are_recognised(case, dtype):
    artifact = case.artifact()
    case.pipe.to(dtype)
    harmonica.apply(case.transformer, artifact)
    times = make_sampler(case.model, config()).timesteps
    noise, case.noise = case.noise, case.noise.to(dtype)
    case.one_call = {
        name: value.to(dtype) if name == "encoder_hidden_states" else value
        for name, value in case.one_call.items()
    }
    assert [case.call(t).dtype for t in reversed(times)] == [dtype] * STEPS
    harmonica.remove(case.transformer)
    case.noise = noise
    bias = case.transformer.transformer_blocks[0].attn1.to_k.bias
    before = bias.data.clone()
    bias.data[0] += 1
    with pytest.raises(ValueError, match=r"model.weights is sha256:\w+ and the router was made for sha"):
        harmonica.apply(case.transformer, artifact)
    bias.data = before
    harmonica.apply(case.transformer, artifact)


def test_parts_kept_in_full_precision_are_recognised(case):
    artifact = case.artifact()
    full = copy.deepcopy(case.transformer.pos_embed)
    case.transformer.to(torch.bfloat16)
    case.transformer.pos_embed = full
    harmonica.apply(case.transformer, artifact)


def test_a_sampler_that_no_pipeline_follows_is_refused(dit):
    for sampler, words in (
        (config("ddim"), "sampler.name is ddim, whose steps no scheduler of diffusers takes: .* dpm-solver"),
        (config("iddpm"), "sampler.name is iddpm"),
        (config(guidance_channels="first_three"), "sampler.guidance_channels is first_three .* guide all: "),
    ):
        artifact = dit.artifact(sampler=sampler)
        with pytest.raises(ValueError, match=words):
            harmonica.apply(dit.transformer, artifact)
        harmonica.apply(dit.transformer, artifact, allow_other_sampler=True)
        harmonica.remove(dit.transformer)


# Import


def test_apply_is_offered_without_importing_torch():
    code = "import sys, harmonica; assert 'torch' not in sys.modules; harmonica.put"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'harmonica' has no attribute 'put'" in result.stderr, result.stderr
    assert (
        harmonica.apply.__module__
        == harmonica.remove.__module__
        == "harmonica.integrations.diffusers_pipeline"
    )
