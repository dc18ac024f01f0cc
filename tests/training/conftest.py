"""What tests of training share, unless a module has its own."""

import pytest
from forecast_fits import STEPS

from harmonica.models.dit.model import DiT
from harmonica.samplers import Sampler, SamplerConfig, make_sampler


@pytest.fixture
def sampler(tiny_dit: DiT) -> Sampler:
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5, clip_sample=False)
    return make_sampler(tiny_dit, config)
