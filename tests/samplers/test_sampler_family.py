"""IDDPM, DPM-Solver++, SA-Solver and schedulers from folders: against diffusers, and row by row."""

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from diffusers.schedulers import scheduling_sasolver
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from tiny_dit import write_model
from tiny_pipeline import LINEAR, write_pipeline
from tolerances import CLOSE, PASS, close, rounding

from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.loading import ModelConfig, load_model
from harmonica.models.vae import decode_latents
from harmonica.samplers import SamplerConfig, make_sampler, with_scheduler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.iepo import KINDS, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig

NAMES = ("ddim", "iddpm", "dpm-solver++", "sa-solver")
KEYS = SampleKeys((7, 7, 8, 2**40), (0, 1, 0, 3))


def config(name: str, **settings) -> SamplerConfig:
    defaults = {"num_inference_steps": 6, "guidance_scale": 1.5, "clip_sample": False}
    return SamplerConfig(name=name, **defaults | settings)


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("i", [1, 3, 7, 9])
def test_iddpm_is_the_learned_variance_step_of_diffusers(tiny_dit, batch, clip_sample, i, monkeypatch):
    sampler = make_sampler(
        tiny_dit, config("iddpm", num_inference_steps=10, guidance_scale=1.0, clip_sample=clip_sample)
    )
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=clip_sample, **LINEAR)
    scheduler.set_timesteps(timesteps=sampler.timesteps[::-1])
    x, output = 0.4 * batch[0], torch.cat([batch[0].flip(0), 0.3 * batch[0]], dim=1)
    drawn = torch.from_numpy(KEYS.step_noise(i, (4, 8, 8))).double()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: drawn)
    ours = sampler.advance(i, sampler.start(x, batch[1], KEYS), output).x_MCHW
    theirs = scheduler.step(output, sampler.timesteps[i], x).prev_sample
    # diffusers makes alpha-bar in float32, a product of up to 1000.
    near = rounding(torch.float32, 1000, amplification=10, is_random=True)
    assert (ours - theirs).norm() / theirs.norm() < near


def test_iddpms_last_step_is_the_mean(tiny_dit, batch):
    sampler = make_sampler(tiny_dit, config("iddpm", guidance_scale=1.0))
    output = torch.cat([batch[0], batch[0]], dim=1)
    states = [sampler.start(*batch, SampleKeys.of(seed, range(4))) for seed in (1, 2)]
    one, other = (sampler.advance(0, state, output).x_MCHW for state in states)
    assert torch.equal(one, other)
    clean = (batch[0] - 1e-4**0.5 * batch[0]) / (1 - 1e-4) ** 0.5
    torch.testing.assert_close(one, clean, **close(torch.float32, 4, amplification=10))


def test_iddpm_without_a_learned_variance_takes_the_posteriors(tmp_path):
    model = load_model(write_model(tmp_path)).model  # one channel in, one out
    sampler = make_sampler(model, config("iddpm", guidance_scale=1.0, clip_sample=False))
    x, z = torch.zeros(4, 1, 28, 28), torch.from_numpy(KEYS.step_noise(3, (1, 28, 28)))
    moved = sampler.advance(3, sampler.start(x, torch.arange(4), KEYS), torch.zeros_like(x)).x_MCHW
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[sampler.timesteps]
    variance = (1 - alpha_bar[3] / alpha_bar[2]) * (1 - alpha_bar[2]) / (1 - alpha_bar[3])
    near = close(torch.float32, 4, amplification=10)
    torch.testing.assert_close(moved, float(variance**0.5) * z, **near)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_in_any_batch(tiny_dit, batch, name):
    sampler = make_sampler(tiny_dit, config(name))
    noise, labels = batch
    whole = sample(sampler, noise, labels, keys=KEYS)
    order = [2, 0]
    keys = SampleKeys([KEYS.seeds[i] for i in order], [KEYS.indices[i] for i in order])
    torch.testing.assert_close(sample(sampler, noise[order], labels[order], keys=keys), whole[order])
    other = sample(sampler, noise, labels, keys=SampleKeys.of(99, range(4)))
    assert torch.equal(other, whole) != sampler.is_stochastic, "another seed matters where noise is drawn"


@pytest.mark.parametrize("name", ["iddpm", "sa-solver"])
def test_a_stochastic_sampler_wants_to_know_its_rows(tiny_dit, batch, name):
    before = torch.get_rng_state()
    sampler = make_sampler(tiny_dit, config(name))
    with pytest.raises(ValueError, match=f"sampler.name is {name}, which draws noise .* give `keys`"):
        sample(sampler, *batch)
    sample(sampler, *batch, keys=KEYS)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_trains_a_router(tiny_dit, batch, name):
    """SDT advances the sampler once a step, on the student; lambda's generations don't disturb each other."""
    sampler = make_sampler(tiny_dit, config(name))
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    ended, batches = {}, [Batch(*batch, KEYS)]
    for still in (True, False):
        settings = SdtConfig(threshold=0.3, learning_rate=1e-300 if still else 0.05)
        router = Router.from_logits(logits.clamp(-4, 4))
        lambda_T = image_error_proxy(sampler, router, batches, kind="leave_one_out", config=settings)
        again = image_error_proxy(sampler, router, batches, kind="leave_one_out", config=settings)
        assert torch.equal(lambda_T, again) and (lambda_T > 0).all()
        _, ended[still] = SdtTrainer(sampler, router, settings).train_trajectory(batches, lambda_T)
        moved = (router.logits() != logits.clamp(-4, 4)).any(dim=1)
        assert still or moved[:-1].all()
    everything = Router(6, 6, 40.0).double()
    _, final = SdtTrainer(sampler, everything, SdtConfig(clamp=50.0)).train_trajectory(
        batches, torch.ones(5, dtype=torch.float64)
    )
    torch.testing.assert_close(final, sample(sampler, *batch, keys=KEYS), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_router_that_computes_everything_has_no_lambda(tiny_dit, batch, name, kind):
    everything = Router(6, 6, 40.0).double()
    lambda_T = image_error_proxy(
        make_sampler(tiny_dit, config(name)),
        everything,
        [Batch(*batch, KEYS)],
        kind=kind,
        config=SdtConfig(threshold=0.3),
    )
    assert lambda_T.abs().max() < 1e-12


# Pipelines of diffusers


SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False, **LINEAR),
    "ddim, trailing": DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **LINEAR),
    "dpm-solver++": DPMSolverMultistepScheduler(**LINEAR),
    "dpm-solver++, third order": DPMSolverMultistepScheduler(
        solver_order=3, use_karras_sigmas=True, **LINEAR
    ),
    "unipc": UniPCMultistepScheduler(**LINEAR),
    "sa-solver": SASolverScheduler(**LINEAR),
}


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_folder_samples_as_its_pipeline(pipeline_folder, scheduler, guidance_scale, monkeypatch):
    pipe = DiTPipeline.from_pretrained(pipeline_folder)
    pipe.scheduler = SCHEDULERS[scheduler]
    pipe.scheduler.save_pretrained(pipeline_folder / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    labels, steps, drawn = [207, 360, 0], 7, iter(range(6, -1, -1))
    keys = SampleKeys.of(5, range(3))

    def draw(shape, **_):
        noise = torch.from_numpy(keys.step_noise(next(drawn), (4, 8, 8)))
        return torch.cat([noise, noise]) if guidance_scale > 1 else noise

    monkeypatch.setattr(scheduling_sasolver, "randn_tensor", draw)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        labels,
        guidance_scale=guidance_scale,
        generator=generator,
        num_inference_steps=steps,
        output_type="np",
    ).images

    loaded = load_model(ModelConfig(path=str(pipeline_folder)))
    wanted = SamplerConfig(name="diffusers", num_inference_steps=steps, guidance_scale=guidance_scale)
    sampler = make_sampler(loaded.model, with_scheduler(wanted, loaded.scheduler))
    monkeypatch.undo()
    latents = sample(sampler, noise, torch.tensor(labels), keys=keys)
    images = decode_latents(loaded.load_vae(), latents) / 2 + 0.5
    ours = images.permute(0, 2, 3, 1).numpy()
    assert theirs.std() > 0.05, "not a flat picture"
    # A third of half a grey level.
    assert np.abs(ours - theirs).max() < rounding(
        torch.float32, 7 * 2 * PASS, amplification=30, is_random=True
    )


def test_schedulers_that_are_not_supported_are_refused_by_name(tiny_dit):
    for scheduler, words in (
        ({"_class_name": "PNDMScheduler"}, "sampler.scheduler is a PNDMScheduler: give one of DDIMScheduler"),
        ({}, "is a config without _class_name"),
        (
            {"_class_name": "DDIMScheduler", "prediction_type": "sample"},
            "prediction_type sample: only epsilon",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make_sampler(tiny_dit, config("diffusers", scheduler=scheduler))
    with pytest.raises(ValueError, match=r"there is no scheduler: give a model.path whose folder has a"):
        make_sampler(tiny_dit, with_scheduler(config("diffusers"), None))
    with pytest.raises(ValueError, match=r"give sampler.name diffusers"):
        config("ddim", scheduler={})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"sampler.name is 'euler': give one of ddim, iddpm, dpm-solver\+\+"):
        config("euler")
    with pytest.raises(ValueError, match=r"sampler.guidance_channels is 'some': give first_three"):
        config("ddim", guidance_channels="some")
