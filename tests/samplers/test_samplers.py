"""DDIM against diffusers and against the formula written out; guidance in both conventions."""

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tolerances import close, of_trajectory

from harmonica.core.sampling import sample
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.samplers import Ddim, SamplerConfig, guide
from harmonica.samplers.noise_schedule import respaced_timesteps


def test_known_timesteps():
    assert respaced_timesteps(10) == list(range(0, 1000, 111))
    # 999/19 = 52.58 and 999/49 = 20.39: none is half way, 999/2 is and goes to the even side.
    assert respaced_timesteps(20)[:8] == [0, 53, 105, 158, 210, 263, 315, 368]
    assert respaced_timesteps(20)[-3:] == [894, 946, 999]
    assert respaced_timesteps(50)[:6] == [0, 20, 41, 61, 82, 102]
    assert respaced_timesteps(50)[-3:] == [958, 979, 999]
    assert respaced_timesteps(3) == [0, 500, 999]
    assert [len(set(respaced_timesteps(t))) for t in (2, 20, 50, 1000)] == [2, 20, 50, 1000]


@pytest.mark.parametrize("num_steps", [1, 0, 1001])
def test_impossible_step_counts_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {num_steps}: give 2 to 1000"):
        SamplerConfig(num_inference_steps=num_steps)


@pytest.mark.parametrize("scale", [0.5, 51.0, float("nan")])
def test_impossible_guidance_is_refused(scale):
    with pytest.raises(ValueError, match=r"sampler.guidance_scale is .*: give 1 to 50"):
        SamplerConfig(guidance_scale=scale)


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("i", [0, 1, 250, 640, 999])
def test_a_step_is_that_of_diffusers(tiny_dit, batch, clip_sample, i):
    # With 1000 steps both space them alike; with fewer, diffusers leaves out the noisiest.
    config = SamplerConfig(num_inference_steps=1000, guidance_scale=1.0, clip_sample=clip_sample)
    scheduler = DDIMScheduler(clip_sample=clip_sample, beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(1000)
    x, output = 0.4 * batch[0], torch.cat([batch[0].flip(0), batch[0]], dim=1)
    sampler = Ddim(tiny_dit, config)
    ours = sampler.advance(i, sampler.start(x, batch[1]), output).x_MCHW
    theirs = scheduler.step(output[:, :4], i, x, use_clipped_model_output=True).prev_sample
    # diffusers makes alpha-bar in float32, a product of up to 1000; it has the root of what is left.
    near = close(torch.float32, 1000, amplification=10, is_random=True)
    torch.testing.assert_close(ours, theirs, **near)


def test_a_trajectory_is_the_formula_written_out(tiny_dit, batch):
    x, labels = batch
    config = SamplerConfig(num_inference_steps=10, guidance_scale=1.0, clip_sample=False)
    ours = sample(Ddim(tiny_dit, config), x, labels)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t in range(999, -1, -111):
        now, before = alpha_bar[t], alpha_bar[t - 111] if t else 1.0
        epsilon = tiny_dit(x, torch.full_like(labels, t), labels)[:, :4]
        clean = (x - (1 - now) ** 0.5 * epsilon) / now**0.5
        x = before**0.5 * clean + (1 - before) ** 0.5 * epsilon
    assert (ours - x).norm() / x.norm() < of_trajectory(10)


def test_no_guidance_runs_the_conditional_half_alone(tiny_dit, batch):
    rows = []
    tiny_dit.x_embedder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    sampler = Ddim(tiny_dit, SamplerConfig(num_inference_steps=3, guidance_scale=1.0, clip_sample=False))
    alone = sample(sampler, *batch)
    assert rows == [4, 4, 4]
    output = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(output, 1.0, "all", 4)[:4], output[:4])
    rows.clear()
    guided = Ddim(tiny_dit, SamplerConfig(num_inference_steps=3, guidance_scale=1.0001, clip_sample=False))
    torch.testing.assert_close(sample(guided, *batch), alone, rtol=1e-2, atol=1e-3)
    assert rows == [8, 8, 8]


def test_the_unconditional_half_has_the_null_class(tiny_sampler, batch):
    noise, labels = batch
    state = tiny_sampler.start(noise, labels)
    assert torch.equal(state.x_MCHW, torch.cat([noise, noise]))
    model, expected = tiny_sampler.model, torch.cat([labels, torch.full_like(labels, 10)])
    for i, timestep in enumerate(tiny_sampler.timesteps):
        _, wanted = model.embed(state.x_MCHW, torch.full_like(expected, timestep), expected)
        torch.testing.assert_close(state.conditions_T[i].blocks, wanted.blocks)
    assert torch.equal(tiny_sampler.finish(state), noise)


@pytest.mark.parametrize(("channels", "guided"), [("first_three", 3), ("all", 4)])
def test_guidance_conventions(channels, guided):
    output = torch.cat([torch.full((2, 8, 1, 1), 2.0), torch.full((2, 8, 1, 1), 1.0)])
    result = guide(output, 3.0, channels, noise_channels=4)
    assert torch.equal(result[:, :guided], torch.full((4, guided, 1, 1), 1 + 3 * (2 - 1.0)))
    assert torch.equal(result[:, guided:], output[:, guided:])


def test_first_three_counts_output_channels_as_the_public_code_does():
    output = torch.tensor([[5.0, 7.0], [1.0, 3.0]])[:, :, None, None]  # noise and variance
    guided = guide(output, 2.0, "first_three", noise_channels=1)
    assert guided.flatten(1).tolist() == [[9.0, 11.0], [9.0, 11.0]]
    assert guide(output, 2.0, "all", noise_channels=1).flatten(1).tolist() == [[9.0, 7.0], [9.0, 3.0]]


def test_both_halves_see_the_conditional_latents(tiny_sampler, batch):
    state = tiny_sampler.start(*batch)
    state.x_MCHW[4:] += 1
    hidden, _ = tiny_sampler.embed(3, state)
    torch.testing.assert_close(hidden[:4], hidden[4:])


def test_clipped_samples_stay_in_bounds():
    shape = DiTConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
    )
    model = DiT(shape)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    generator = torch.Generator().manual_seed(1)
    noise, labels = torch.randn(3, 1, 8, 8, generator=generator), torch.arange(3)
    largest = {}
    for clip in (True, False):
        sampler = Ddim(model, SamplerConfig(num_inference_steps=5, clip_sample=clip))
        largest[clip] = sample(sampler, noise, labels).abs().max().item()
    assert largest[True] <= 1.0 < largest[False]
