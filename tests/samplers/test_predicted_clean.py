"""The x_0 that a step points at: what previews show. Flow matching's is in `test_flow_matching`."""

import pytest
import torch
from tolerances import close

from harmonica.core.sampling import sample
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys

KEYS = SampleKeys.of(3, range(4))


def previews(sampler, batch):
    """The finished rows, and the x_0 after each step by the step's number."""
    seen = {}
    images = sample(sampler, *batch, keys=KEYS, on_step=lambda i, predict: seen.update({i: predict()}))
    return images, seen


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("name", ["ddim", "iddpm", "dpm-solver++", "sa-solver"])
def test_previews_come_nearer_and_the_last_is_the_image(tiny_dit, batch, name, scale):
    settings = {"num_inference_steps": 8, "guidance_scale": scale, "clip_sample": False}
    images, seen = previews(make_sampler(tiny_dit, SamplerConfig(name=name, **settings)), batch)
    assert list(seen) == list(reversed(range(8)))
    assert all(preview.shape == images.shape for preview in seen.values())
    distances = [float((preview - images).norm() / images.norm()) for preview in seen.values()]
    assert distances[-1] < 0.02, "no noise is left, but for the first of 1000 timesteps"
    assert distances[-1] < distances[5] < distances[0]


def test_a_noised_image_is_found_again(tiny_dit, batch):
    """By DDIM's step, which is `(x - noise * epsilon) / signal`, and by a folder's scheduler."""
    noise, labels = batch
    clean = noise.flip(0)
    for name in ("ddim", "iddpm", "dpm-solver++", "sa-solver"):
        config = SamplerConfig(name=name, num_inference_steps=5, guidance_scale=1.0, clip_sample=False)
        sampler = make_sampler(tiny_dit, config)
        share = float(
            torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)[int(sampler.timesteps[2])]
        )
        noised = share**0.5 * clean + (1 - share) ** 0.5 * noise
        state = sampler._moved(sampler.start(noise, labels, KEYS), noised)
        predicted = sampler.predict_clean(2, state, torch.cat([noise, noise], dim=1))
        near = close(
            torch.float32, 40, amplification=10
        )  # coefficients in float32, 1 / sqrt(alpha-bar) at 500
        torch.testing.assert_close(predicted, clean, **near)
