"""What a capture on CUDA refuses is found before it; here the device is torch's one without values (meta)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny_pixart
import tiny_sana
import torch
from execution_cases import SHAPE, STEPS, ddim, random_plan, ways
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harmonica.core.trajectory import Trajectory
from harmonica.execution.capture_check import CaptureCheck, NotCapturableError
from harmonica.models.dit.model import DiT
from harmonica.models.pixart.model import PixArt
from harmonica.models.sana.model import Sana
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import Sampler, SamplerConfig, make_sampler


@pytest.fixture
def device() -> Iterator[torch.device]:
    with torch.inference_mode():
        yield torch.device("meta")


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "reads a value back"),
    "tolist": (lambda x: x.tolist(), "reads a value back"),
    "to the host": (lambda x: x.cpu(), "reads a value back"),
    "a mask": (lambda x: x[x > 0], "reads a value back"),
    "a copy": (lambda x: x + torch.from_numpy(np.ones(2, np.float32)).to(x.device), "copies a tensor from"),
    "a copy into": (lambda x: x.copy_(torch.ones(2)), "copies a tensor from the host"),
    "one number": (lambda x: torch.full((), 3.0).to(x.device), "copies a tensor from the host"),
    "places": (lambda x: x[torch.arange(2)], "copies a tensor from the host"),
    "draws": (lambda x: x + torch.randn(2, device=x.device), "draws numbers"),
    "draws alike": (torch.rand_like, "draws numbers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_capture_refuses_is_refused(what, device):
    step, why = REFUSED[what]
    x = torch.ones(2, device=device)
    with CaptureCheck(), pytest.raises(NotCapturableError, match=why):
        step(x)


def test_a_tensor_of_the_hosts_numbers_is_refused():
    """Which torch makes without a copy where there are no values."""
    with FakeTensorMode(), CaptureCheck(), pytest.raises(NotCapturableError, match="from the host"):
        torch.tensor([1.0, 2.0], device="cuda")


def test_the_hosts_own_numbers_fills_and_attention_are_allowed(device):
    x, host = torch.ones(2, 4, 8, 16, device=device), torch.arange(4.0)
    with CaptureCheck():
        y = x * host[2] + torch.full((), 3.0, device=device) + float(host[1])
        y = y + torch.arange(16, device=device)
        torch.nn.functional.scaled_dot_product_attention(y, y, y)
        torch.randn(3), host.tolist(), host.double(), torch.tensor([1.0])


def check(sampler: Sampler, noise: Tensor, condition: Any, **how: Any) -> None:
    """Run a trajectory as it is run before it is recorded."""
    given = {"plan": None, "reuse": "hold", "accumulate": None} | how
    step_noise = [torch.zeros_like(noise)] * STEPS if sampler.is_stochastic else []
    trajectory = Trajectory(sampler, **given)
    with CaptureCheck():
        trajectory.start(noise, condition, step_noise=step_noise)
        for i in reversed(range(STEPS)):
            trajectory.step(i)


def make_fake_dit(device: torch.device) -> tuple[DiT, Tensor, Tensor]:
    with device:
        return DiT(SHAPE).eval(), torch.randn(3, 4, 8, 8), torch.arange(3)


@pytest.mark.parametrize("way", ways(4))
def test_every_pass_can_be_captured(way, device):
    model, *batch = make_fake_dit(device)
    check(ddim(model), *batch, **ways(4)[way])
    scales = torch.ones(3, 1, 1, 1, device=device)
    check(ddim(model, 1.0).with_scale_buffer(scales), *batch, **ways(4)[way])


@pytest.mark.parametrize("kinds", [(), ("mlp",), ("attn", "cross", "mlp")])
@pytest.mark.parametrize("kind", ["alpha", "sigma", "sana"])
def test_text_to_image_models_can_be_captured(kind, kinds, device):
    with torch.inference_mode(False):
        real = tiny_sana.make_sana("1.5", *kinds) if kind == "sana" else tiny_pixart.make_pixart(kind, *kinds)
        noise, condition = tiny_sana.make_batch("1.5") if kind == "sana" else tiny_pixart.make_batch(kind)
    with device:
        config = dict(real.transformer.config)
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        transformer = type(real.transformer)(**config).eval()
        make: Any = Sana if kind == "sana" else PixArt
        model = make(transformer, text_tokens=real.text_tokens, cacheable=real.cacheable)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty(
            value.shape, dtype=value.dtype if value.dtype != torch.float64 else None, device=device
        )

    condition = TextCondition(**{name: move(getattr(condition, name)) for name in condition.__slots__})
    if kind == "sana":
        sampler = make_sampler(model, tiny_sana.config(num_inference_steps=STEPS, guidance_scale=3.0))
    else:
        sampler = ddim(model, 3.0)
    check(sampler, move(noise), condition, plan=random_plan(len(model.branches)))


BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCHEDULERS = ("DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "SASolverScheduler")


@pytest.mark.parametrize("name", ["ddim", "iddpm", "dpm-solver++", "sa-solver", *SCHEDULERS])
def test_samplers_can_be_captured(name, device):
    model, *batch = make_fake_dit(device)
    settings: dict[str, Any] = {"name": name}
    if name in SCHEDULERS:
        settings = {"name": "diffusers", "scheduler": {"_class_name": name, **BETAS}}
    sampler = make_sampler(model, SamplerConfig(num_inference_steps=STEPS, clip_sample=False, **settings))
    check(sampler, *batch)


def test_a_sampler_that_cannot_is_found_before(device):
    model, *batch = make_fake_dit(device)
    unipc = {"_class_name": "UniPCMultistepScheduler", **BETAS}
    config = SamplerConfig(name="diffusers", scheduler=unipc, num_inference_steps=STEPS, clip_sample=False)
    with pytest.raises(NotCapturableError, match="from the host"):
        check(make_sampler(model, config), *batch)
