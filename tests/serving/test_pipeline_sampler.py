"""A diffusers pipeline behind the endpoint's engine, without Ray: the images that it makes."""

import copy
import dataclasses
import functools
import logging

import pytest
import tiny_served_pipeline as tiny
import torch
from diffusers import FluxPipeline

import harmonica
from harmonica.integrations.compiled_modules import any_compiled
from harmonica.integrations.exchanged_plans import ExchangedPlans
from harmonica.models.loading import ModelConfig
from pipelines.config.serve import ServeConfig
from pipelines.serving.engine_loader import make_sampler
from pipelines.serving.image_request import ImageRequest, Picture, SettingRejected
from pipelines.serving.pipeline_sampler import PipelineSampler


@pytest.fixture(scope="module")
def images(folder, artifact):
    sampler = make_sampler(ModelConfig(path=str(folder)), ServeConfig(max_steps=30, max_pixels=2**15))
    assert isinstance(sampler, PipelineSampler)
    champion = sampler.make_plan(artifact, "3")
    sampler.try_out(artifact, champion)
    sampler.use(champion)
    return sampler


def drawn(folder, artifact, seed, prompt, **call):
    """What diffusers itself makes, (C, H, W) in [-1, 1]."""
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if artifact is not None:
        harmonica.apply(pipe, artifact)
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="pt", **call)[0][0] * 2 - 1


CALL = {"num_inference_steps": tiny.STEPS, "guidance_scale": 3.0, "height": tiny.HEIGHT, "width": tiny.WIDTH}


@pytest.mark.parametrize("quality", ["medium", "high"])
def test_an_image_is_that_of_the_pipeline_alone_or_in_company(images, folder, artifact, quality):
    served = images.plan_for(quality)
    rows = [ImageRequest("a red cat", 7, 0), ImageRequest("the moon", 7, 1), ImageRequest("a dog", 3, 0)]
    together = images.generate(rows, served)
    assert together.shape == (3, 3, tiny.HEIGHT, tiny.WIDTH)
    plan = artifact if quality == "medium" else None
    for row, image in zip(rows, together):
        (alone,) = images.generate([row], served)
        assert torch.allclose(alone, image, atol=1e-5)
        theirs = drawn(folder, plan, row.seed + row.index, row.subject, **CALL)
        assert torch.allclose(alone, theirs, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    other = images.generate(rows[:1], images.plan_for("high" if quality == "medium" else "medium"))
    assert not torch.allclose(other[0], together[0], atol=1e-4), "the plan changes something"


def test_a_router_that_was_not_trained_is_served_too(folder):
    pipe, even = FluxPipeline.from_pretrained(folder), harmonica.EvenSteps(speedup=1.5)
    untrained = harmonica.train_pipeline(pipe, ["the moon"], even, call=CALL)
    images = make_sampler(ModelConfig(path=str(folder)), ServeConfig(max_steps=30, max_pixels=2**15))
    served = images.make_plan(untrained, "even")
    images.try_out(untrained, served)
    images.use(served)
    (image,) = images.generate([ImageRequest("a red cat", 7, 0)])
    assert torch.allclose(image, drawn(folder, even, 7, "a red cat", **CALL), atol=1e-5)
    assert not torch.allclose(image, drawn(folder, None, 7, "a red cat", **CALL), atol=1e-4)


def test_even_steps_need_no_router_and_leave_steps_and_guidance_free(folder):
    images = make_sampler(ModelConfig(path=str(folder)), ServeConfig(max_steps=30, max_pixels=2**15))
    even, own = harmonica.EvenSteps(speedup=1.5), images.own_sampler("")
    images.use(images.make_even(own, even, "even-1.5x"))
    row = ImageRequest("a red cat", 7, 0, guidance_scale=3.0, size=(tiny.WIDTH, tiny.HEIGHT))
    for steps in (tiny.STEPS, 9):
        served, call = images.plan_for("medium", steps, 3.0), CALL | {"num_inference_steps": steps}
        assert images.plan_for("low", steps) is served and served.config.num_inference_steps == steps
        assert served.version == "even-1.5x" and served.ideal_speedup > 1.3 and served.plan.num_steps == steps
        (image,) = images.generate([row], served)
        assert torch.allclose(image, drawn(folder, even, 7, "a red cat", **call), atol=1e-5)
        full = images.plan_for("high", steps)
        assert full.version == "uncached" and full.plan.cur == 0
        (whole,) = images.generate([row], full)
        assert torch.allclose(whole, drawn(folder, None, 7, "a red cat", **call), atol=1e-5)
        assert not torch.allclose(image, whole, atol=1e-4)
    with pytest.raises(SettingRejected, match="num_inference_steps is 31: give 2 to 30"):
        images.plan_for("medium", 31)
    with pytest.raises(SettingRejected, match="guidance_scale is 51"):
        images.plan_for("medium", None, 51.0)


def test_size_steps_and_guidance_are_free_with_high(images, folder):
    served = images.plan_for("high", 6, 2.0)
    assert (served.version, served.config.num_inference_steps) == ("uncached", 6)
    row = ImageRequest("a red cat", 7, 0, guidance_scale=2.0, size=(64, 128))
    (image,) = images.generate([row], served)
    asked = {"num_inference_steps": 6, "guidance_scale": 2.0, "height": 128, "width": 64}
    assert torch.allclose(image, drawn(folder, None, 7, "a red cat", **asked), atol=1e-5)
    with pytest.raises(SettingRejected, match="is 5 and router 3 of quality medium was made for 4"):
        images.plan_for("medium", 5)
    with pytest.raises(SettingRejected, match="num_inference_steps is 31: give 2 to 30"):
        images.plan_for("high", 31)
    (image,) = images.generate([ImageRequest("a red cat", 7, 0, size=(64, 64))], images.champion)
    assert image.shape == (3, 64, 64), "a plan is for any size"


def test_requests_that_one_call_cannot_make_are_kept_apart(images):
    served, row = images.champion, ImageRequest("a red cat", 7, 0)
    together = images.shared_with(row, served)
    for other in (
        dataclasses.replace(row, subject="the moon", seed=8, index=2),
        dataclasses.replace(row, size=(tiny.WIDTH, tiny.HEIGHT)),
    ):
        assert images.shared_with(other, served) == together
    picture = Picture(1, 1, b"abc")
    for other in (
        {"size": (64, 64)},
        {"guidance_scale": 2.0},
        {"negative_prompt": "x"},
        {"pictures": (picture,)},
    ):
        assert images.shared_with(dataclasses.replace(row, **other), served) != together


def test_a_fixed_batch_is_filled_up(folder, artifact):
    images = make_sampler(ModelConfig(path=str(folder)), ServeConfig())
    images.use(images.make_plan(artifact, "3"))
    images.fixed_batch_size = 3
    assert images.generate([ImageRequest("a red cat", 7, 0)]).shape[0] == 1


def test_prompts_that_are_cut_are_not_logged(images, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to `caplog`
    prompt = f"{'a very long text and then ' * 3} my secret"
    images.generate([ImageRequest(prompt, 7, 0, size=(64, 64))])
    assert "input was truncated because CLIP can only handle sequences up to 16 tokens\n" in caplog.text
    assert "secret" not in caplog.text


def test_what_the_pipeline_does_not_take_is_refused(images):
    with pytest.raises(SettingRejected, match="a FluxPipeline is not guided by one: leave it out"):
        images.check(ImageRequest("a cat", 1, 0, negative_prompt="a dog"))
    images.check(ImageRequest("a cat", 1, 0))


@pytest.mark.parametrize(
    ("size", "cure"),
    [
        ("big", "give WIDTHxHEIGHT, such as 128x64, or 'auto'"),
        ("0x64", "give WIDTHxHEIGHT"),
        ("100x64", "give multiples of 64, such as 128x64"),
        ("256x192", "give width times height up to 32768"),
        ("8192x64", "give sides up to 4096"),
    ],
)
def test_sizes_out_of_bounds_are_refused(images, size, cure):
    assert images.sizes.parse("128x128") == (128, 128)
    with pytest.raises(SettingRejected, match=f"^size is '{size}': {cure}"):
        images.sizes.parse(size)


def test_a_picture_keeps_its_shape(images):
    area = tiny.WIDTH * tiny.HEIGHT
    for width, height in ((640, 320), (320, 640), (500, 500), (1, 9000)):
        found = images.sizes.like(width, height)
        assert all(side % tiny.MULTIPLE == 0 for side in found)
        assert (found[0] >= found[1]) == (width >= height) or found[0] == found[1]
        assert found[0] * found[1] <= 4 * area or 1 in (width, height)


def test_routers_of_others_are_refused(images, artifact):
    with pytest.raises(ValueError, match=r"model\.weights is .* and the router was made for 0000"):
        images.make_plan(dataclasses.replace(artifact, model={**artifact.model, "weights": "0000"}), "4")
    with pytest.raises(ValueError, match="was made for a DiT outside of any pipeline"):
        images.make_plan(dataclasses.replace(artifact, model={"architecture": "DiT"}), "4")


# Compiled execution


@pytest.fixture
def traced(monkeypatch, no_codegen):
    """The operations of what was compiled, graph by graph."""
    graphs = []

    def backend(module, inputs):
        graphs.append({str(node.target) for node in module.graph.nodes if node.op.startswith("call")})
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.parametrize("router", ["trained", "uncached"])
def test_compiled_execution_makes_the_same_images(images, folder, artifact, router, traced):
    config = ModelConfig(path=str(folder), execution="compiled")
    compiled = make_sampler(config, ServeConfig(max_steps=30, max_pixels=2**15))
    if router == "trained":
        champion = compiled.make_plan(artifact, "3")
    else:
        made = compiled.make_uncached(images.champion.config)
        champion = dataclasses.replace(made, arguments=images.champion.arguments)
    compiled.warm_up(champion, 2)
    compiled.use(champion)
    assert any("scaled_dot_product_attention" in name for graph in traced for name in graph)
    assert any("gelu" in name for graph in traced for name in graph)
    rows = [ImageRequest("a red cat", 7, 0, size=(128, 64)), ImageRequest("the moon", 7, 1, size=(128, 64))]
    for quality in ("medium", "high"):
        served = images.plan_for("high" if router == "uncached" else quality)
        wanted = images.generate(rows, served)
        found = compiled.generate(rows, compiled.plan_for(quality))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    before = len(traced)
    compiled.generate(rows)
    assert len(traced) == before, "warmed up"


def test_blocks_that_diffusers_does_not_name_are_compiled_too(images, monkeypatch):
    monkeypatch.setattr(type(images.pipe.transformer), "_repeated_blocks", [])
    pipe = copy.deepcopy(images.pipe)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    ExchangedPlans(pipe, is_compiled=False).compile_blocks()
    assert not any_compiled(blocks)
    ExchangedPlans(pipe, is_compiled=True).compile_blocks()
    assert all(any_compiled([block]) for block in blocks)
