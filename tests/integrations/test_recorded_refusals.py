"""What a plan on a pipeline without branch files refuses, and says instead."""

import copy

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from tiny_recorded_pipelines import STEPS, make_case

import harmonica


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1])
def test_another_number_of_steps_is_refused(some, steps):
    harmonica.apply(some.pipe, some.artifact())
    wanted = some.run()
    with pytest.raises(ValueError, match=f"is to make {steps} steps and .* made for {STEPS}: give"):
        some.run(num_inference_steps=steps)
    assert torch.equal(some.run(), wanted)


def test_another_scheduler_is_refused(flux):
    harmonica.apply(flux.pipe, flux.artifact())

    class Other(FlowMatchEulerDiscreteScheduler):
        pass

    flux.pipe.scheduler = Other()
    with pytest.raises(ValueError, match=r"pipe.scheduler is a Other and .* made for a FlowMatchEuler"):
        flux.run()
    harmonica.remove(flux.pipe)
    harmonica.apply(flux.pipe, flux.artifact(), allow_other_sampler=True)
    flux.run()


def test_other_transformers_weights_and_versions_are_refused(flux):
    artifact = flux.artifact()
    with pytest.raises(ValueError, match=r"is a SD3Transformer2DModel and .* made for a FluxTransformer2D"):
        harmonica.apply(make_case("sd3").pipe, artifact)
    older = copy.deepcopy(artifact)
    older.model["branches"][0]["name"] = "transformer_blocks.0.attention"
    older.model["diffusers"] = "0.99.0"
    harmonica.apply(flux.pipe, older)
    with pytest.raises(ValueError, match=r"8 under 0.99.0; they differ in transformer_blocks.0.attn: use"):
        flux.run()
    harmonica.remove(flux.pipe)
    flux.pipe.transformer.x_embedder.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"model.weights is .* these are other weights"):
        harmonica.apply(flux.pipe, artifact)
    harmonica.apply(flux.pipe, artifact, check_weights=False)


def test_one_of_two_transformers_is_refused():
    case = make_case("wan 2.2")
    with pytest.raises(ValueError, match=r"made for 2 transformers that .* and is given 1: apply it to"):
        harmonica.apply(case.pipe.transformer, case.artifact())


def test_a_pipeline_without_a_transformer_is_refused(flux):
    class Unet:
        unet = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"pipe is a Unet, which has no transformer: its denoiser is a UNet"):
        harmonica.apply(Unet(), flux.artifact())


def test_diffusers_own_caches_are_refused(flux):
    apply_first_block_cache(flux.pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"has the hook .*, which changes what is computed"):
        harmonica.apply(flux.pipe, flux.artifact())


def test_applied_twice_and_removed_twice_raise(flux):
    harmonica.apply(flux.pipe, flux.artifact())
    with pytest.raises(ValueError, match=r"has a plan already: harmonica.remove\(transformer\) first"):
        harmonica.apply(flux.pipe.transformer, flux.artifact())
    harmonica.remove(flux.pipe.transformer)
    with pytest.raises(ValueError, match=r"has no plan"):
        harmonica.remove(flux.pipe)
