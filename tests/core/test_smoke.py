"""The sample that comes with a router: drawn again elsewhere, it is the same, or something is wrong."""

import dataclasses

import pytest
import torch
from tiny_dit import SAMPLER, make_artifact, write_model
from tiny_sana import config, make_sana

from harmonica.builtin import CHAMPION, EMOJI_CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import check_sample, record_sample
from harmonica.models.loading import BUILTIN, BUILTIN_COLOUR, ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampler(model):
    return make_sampler(load_model(model).model, SAMPLER)


@pytest.fixture(scope="module")
def artifact(model, sampler):
    return record_sample(make_artifact(model), sampler)


def test_a_sample_is_stored_with_its_router_and_drawn_again(artifact, sampler, tmp_path):
    loaded = RouterArtifact.load(artifact.save(tmp_path))
    assert loaded.sample_CHW.shape == (1, 28, 28) and torch.equal(loaded.sample_CHW, artifact.sample_CHW)
    check_sample(loaded, sampler)


def test_a_router_without_a_sample_is_only_drawn_with(model, sampler, tmp_path):
    loaded = RouterArtifact.load(make_artifact(model).save(tmp_path))
    assert loaded.sample_CHW is None
    check_sample(loaded, sampler)


@pytest.mark.parametrize("change", ["weights", "plan", "sample", "shape"])
def test_what_draws_something_else_is_refused(artifact, sampler, tmp_path, change):
    if change == "weights":
        sampler = make_sampler(load_model(write_model(tmp_path, seed=1)).model, SAMPLER)
    if change == "plan":
        artifact = dataclasses.replace(artifact, logits_TB=artifact.logits_TB.flip(1))
    if change == "sample":
        artifact = dataclasses.replace(artifact, sample_CHW=artifact.sample_CHW.flip(1))
    if change == "shape":
        artifact = dataclasses.replace(artifact, sample_CHW=artifact.sample_CHW[:, 1:])
    said = "has shape" if change == "shape" else r"differs by \d+.\d% from the one recorded with it, 0.3% is"
    with pytest.raises(ValueError, match=f"the router's sample {said}"):
        check_sample(artifact, sampler)


def test_what_is_not_finite_is_refused(model, artifact):
    damaged = load_model(model).model
    next(iter(damaged.parameters())).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="sample is not finite"):
        check_sample(artifact, make_sampler(damaged, SAMPLER))


def test_half_precision_may_differ_more(model, artifact):
    half = load_model(dataclasses.replace(model, dtype="bfloat16")).model
    sampler = make_sampler(half, SAMPLER)
    recorded = record_sample(artifact, sampler)
    assert recorded.sample_CHW.dtype == torch.bfloat16
    check_sample(recorded, sampler)
    check_sample(artifact, sampler)
    with pytest.raises(ValueError, match=r"20\.0% is what rounding may do"):
        check_sample(dataclasses.replace(recorded, sample_CHW=recorded.sample_CHW.flip(1)), sampler)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}])
def test_a_model_of_text_needs_no_text_encoder(settings):
    sampler = make_sampler(make_sana("1.0"), config(num_inference_steps=3, **settings))
    logits = torch.randn(3, len(sampler.model.branches), generator=torch.Generator().manual_seed(0))
    built = RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={})
    check_sample(record_sample(built, sampler), sampler)


def test_a_sampler_that_draws_noise_draws_the_samples_own(sampler):
    stochastic = make_sampler(sampler.model, SamplerConfig(name="iddpm", num_inference_steps=4))
    logits = torch.randn(4, len(sampler.model.branches), generator=torch.Generator().manual_seed(0))
    built = RouterArtifact.build(logits, stochastic, threshold=0.5, reuse="hold", training={})
    check_sample(record_sample(built, stochastic), stochastic)


@pytest.mark.parametrize(
    ("champion", "path"), [(CHAMPION, BUILTIN), (EMOJI_CHAMPION, BUILTIN_COLOUR)], ids=["fashion", "emoji"]
)
def test_a_built_in_champion_draws_what_it_drew(champion, path):
    artifact = RouterArtifact.load(champion)
    assert artifact.sample_CHW is not None, "make it again with harmonica.core.golden_sample.record_sample"
    check_sample(artifact, make_sampler(load_model(ModelConfig(path=path)).model, artifact.sampler))
