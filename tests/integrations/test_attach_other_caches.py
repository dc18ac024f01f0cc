"""A plan beside another library's cache or forward: refused or told, never passed over in silence."""

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_layer_skip,
    apply_pyramid_attention_broadcast,
)
from tiny_attached import planned
from torch import nn

import harmonica


def test_a_forward_that_something_wraps_is_left_alone(dit):
    transformer = dit.transformer
    own = transformer.forward
    transformer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match=r"transformer.forward is not the class's own, something wraps it"):
        harmonica.apply(transformer, dit.artifact())
    del transformer.forward
    harmonica.apply(transformer, dit.artifact())
    plan = transformer.forward
    transformer.forward = lambda *args, **kwargs: plan(*args, **kwargs)
    with pytest.raises(ValueError, match=r"transformer.forward is not the plan's, something wraps it"):
        harmonica.remove(transformer)


CACHES = {
    "pyramid_attention_broadcast": lambda transformer: apply_pyramid_attention_broadcast(
        transformer,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        ),
    ),
    "faster_cache_denoiser": lambda transformer: apply_faster_cache(
        transformer,
        FasterCacheConfig(
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("transformer_blocks",),
            is_guidance_distilled=True,
        ),
    ),
    "fbc_leader_block_hook": lambda transformer: apply_first_block_cache(
        transformer, FirstBlockCacheConfig(threshold=0.1)
    ),
    "layer_skip_hook": lambda transformer: apply_layer_skip(
        transformer, LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    ),
}


@pytest.mark.parametrize("is_applied_first", [True, False])
@pytest.mark.parametrize("hook", CACHES)
def test_diffusers_own_caches_are_refused(case, hook, is_applied_first):
    artifact, put_on = case.artifact(), CACHES[hook]
    if is_applied_first:
        harmonica.apply(case.transformer, artifact)
        put_on(case.transformer)
    with pytest.raises(ValueError, match=rf"has the hook {hook}, .*: use that or a plan, not both. Take it"):
        if is_applied_first:
            case.run()
        else:
            put_on(case.transformer)
            harmonica.apply(case.transformer, artifact)


def test_blocks_that_another_cache_replaces_are_refused_and_put_back(case):
    """As cache-dit does it: its forward puts other blocks in, and it binds the old one when it goes."""
    _, wanted = planned(case)
    transformer = case.transformer
    harmonica.apply(transformer, case.artifact())
    own, blocks = transformer.forward, transformer.transformer_blocks

    def forward(*args, **kwargs):
        transformer.transformer_blocks = nn.ModuleList([blocks])
        try:
            return own(*args, **kwargs)
        finally:
            transformer.transformer_blocks = blocks

    transformer.forward = forward
    with pytest.raises(
        ValueError, match=r"transformer_blocks are not those that the plan was put on: .*cach"
    ):
        case.run()
    transformer.forward = own.__get__(transformer)
    assert torch.equal(case.run(), wanted)
    harmonica.remove(transformer)


def test_a_forward_that_replaces_the_plans_is_not_passed_over_in_silence(case, caplog):
    without, wanted = planned(case)
    harmonica.apply(case.transformer, case.artifact())
    plan = case.transformer.forward
    case.transformer.forward = type(case.transformer).forward.__get__(case.transformer)
    assert torch.equal(case.run(), without)
    assert "the pipeline's images were made without the plan: something, such as another" in caplog.text
    case.transformer.forward = plan
    caplog.clear()
    assert torch.equal(case.run(), wanted)
    case.pipe.maybe_free_model_hooks()  # by hand: no images, no word
    assert not caplog.records
