"""Rows that share trajectories: who waits for whom, and that company does not change an image."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dit import SHAPE, make_artifact, write_model
from tiny_pipeline import write_pipeline

from harmonica.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler, with_scheduler
from pipelines.drawing import ImageSampler, Row


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampler(model):
    images = ImageSampler(load_model(model))
    images.use(make_artifact(model), "7")
    return images


def pixels(drawing):
    return np.asarray(Image.open(io.BytesIO(drawing.png))).astype(int)


def test_an_image_depends_on_its_row_alone(sampler):
    row = Row(3, 11, 1)
    (alone,) = sampler.draw([row])
    company = sampler.draw([Row(0, 5, 0), Row(9, 11, 1), row, Row(3, 11, 0)])
    assert (alone.batch_size, company[2].batch_size) == (1, 4)
    # Kernels may sum in another order for another batch size, which can tip a rounded grey level.
    assert np.abs(pixels(alone) - pixels(company[2])).max() <= 1
    for other in (company[1], company[3]):  # another label, another index
        assert np.abs(pixels(alone) - pixels(other)).max() > 1


def test_the_router_is_the_one_in_use(model, sampler):
    rows = [Row(1, 1, 0)]
    images = ImageSampler(load_model(model))
    images.use(make_artifact(model, seed=1), "1")
    first = images.draw(rows)[0]
    images.use(make_artifact(model, seed=2), "2")
    second = images.draw(rows)[0]
    assert (first.router_version, second.router_version) == ("1", "2")
    assert first.png != second.png
    assert second.cur == make_artifact(model, seed=2).plan.cur


def test_a_router_of_another_model_is_refused(tmp_path, sampler):
    other = write_model(tmp_path, shape=dataclasses.replace(SHAPE, num_layers=2))
    with pytest.raises(ValueError, match=r"model.num_layers is 3 and the router was made for 2"):
        sampler.use(make_artifact(other), "8")
    assert sampler.version == "7"


def test_latents_without_a_decoder_are_refused(tmp_path):
    latent = write_model(tmp_path, shape=dataclasses.replace(SHAPE, in_channels=4, out_channels=8))
    with pytest.raises(ValueError, match=r"model.in_channels is 4, .* without a decoder: give model.vae"):
        ImageSampler(load_model(latent))


@pytest.mark.parametrize("name", ["diffusers", "iddpm", "dpm-solver++", "sa-solver"])
def test_every_sampler_draws_the_pictures_of_a_latent_model(tmp_path, name):
    loaded = load_model(ModelConfig(path=str(write_pipeline(tmp_path))))
    config = SamplerConfig(name=name, num_inference_steps=5, guidance_scale=4.0, clip_sample=False)
    denoiser = make_sampler(loaded.model, with_scheduler(config, loaded.scheduler))
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    images = ImageSampler(loaded)
    images.use(
        RouterArtifact.build(logits, denoiser, threshold=0.5, reuse="forecast", training={}), version="1"
    )
    row = Row(1, 5, 2)
    (alone,), company = images.draw([row]), images.draw([Row(1, 6, 2), row])
    assert images.image_size == 16 and pixels(alone).shape == (16, 16, 3)
    assert np.abs(pixels(alone) - pixels(company[1])).max() <= 1
    assert np.abs(pixels(alone) - pixels(company[0])).max() > 1
