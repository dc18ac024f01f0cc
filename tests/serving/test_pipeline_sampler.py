"""A diffusers pipeline behind the endpoint's engine, without Ray."""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import json

import pytest
import tiny_served_pipeline as tiny
import torch
from diffusers import FluxPipeline
from tiny_recorded_pipelines import make_case

import harmonica
from harmonica.builtin import CHAMPION
from harmonica.integrations.compiled_modules import any_compiled
from harmonica.integrations.exchanged_plans import ExchangedPlans
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.models.loading import ModelConfig
from harmonica.validation.settings import SettingError
from pipelines.config.serve import ServeConfig
from pipelines.serving.api_requests import GenerateRequest
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.engine_loader import make_sampler
from pipelines.serving.generation import check
from pipelines.serving.http_errors import ApiError
from pipelines.serving.image_request import ImageRequest, Picture, SettingRejected
from pipelines.serving.image_sizes import SizeBounds
from pipelines.serving.pipeline_sampler import PipelineSampler
from pipelines.serving.registry_watcher import RegistryWatcher
from pipelines.serving.requests import ModelCard
from pipelines.serving.router_choice import choose_router
from pipelines.serving.servable_pipeline import ServablePipeline, servable_pipeline
from pipelines.serving.serve_args import ServeArgs


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


# Folders


def rewritten(folder, index=None, transformer=None):
    """The folder's files alone that are read before weights."""
    (folder / "transformer").mkdir(parents=True)
    kinds = {"transformer": transformer, "vae": "AutoencoderKL"} if transformer else {}
    parts = {name: ["diffusers", kind] for name, kind in kinds.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": index, **parts}))
    if transformer:
        (folder / "transformer/config.json").write_text(json.dumps({"_class_name": transformer}))
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    ("index", "transformer", "message"),
    [
        ("WanPipeline", "WanTransformer3DModel", "which generates videos: this endpoint serves images"),
        ("LattePipeline", "LatteTransformer3DModel", "which generates videos"),
        ("WanAnimatePipeline", "WanAnimateTransformer3DModel", "which generates videos"),
        ("StableDiffusionXLPipeline", None, r"without a transformer \(transformer/ is missing\)"),
        ("FluxFillPipeline", "FluxTransformer2DModel", "whose call takes mask_image, which no request has"),
        ("NoSuchPipeline", "FluxTransformer2DModel", "does not have: install the version that wrote it"),
    ],
)
def test_pipelines_that_are_not_served_are_refused_before_weights_are_read(
    tmp_path, index, transformer, message
):
    config = rewritten(tmp_path, index, transformer)
    with pytest.raises(ValueError, match=message):
        servable_pipeline(config)
    with pytest.raises(ValueError, match=message):
        make_sampler(config, ServeConfig())


def test_models_with_branch_files_are_no_pipelines_of_this_kind(tmp_path):
    assert servable_pipeline(rewritten(tmp_path, "PixArtSigmaPipeline", "PixArtTransformer2DModel")) is None
    assert servable_pipeline(ModelConfig()) is None


def test_settings_without_a_meaning_are_refused(folder):
    with pytest.raises(SettingError, match=r"model\.execution is 'graphed': give eager or compiled"):
        servable_pipeline(ModelConfig(path=str(folder), execution="graphed"))
    with pytest.raises(SettingError, match=r"serve\.over_limit is 'refuse': give truncate"):
        make_sampler(ModelConfig(path=str(folder)), ServeConfig(over_limit="refuse"))


@pytest.mark.parametrize(
    ("name", "transformer", "guidance", "pictures", "needs", "negative"),
    [
        ("FluxKontextPipeline", "FluxTransformer2DModel", "guidance_scale", 1, False, False),
        ("QwenImagePipeline", "QwenImageTransformer2DModel", "true_cfg_scale", 0, False, True),
        ("QwenImageEditPipeline", "QwenImageTransformer2DModel", "true_cfg_scale", 1, True, True),
        ("QwenImageEditPlusPipeline", "QwenImageTransformer2DModel", "true_cfg_scale", 4, True, True),
        ("StableDiffusion3Pipeline", "SD3Transformer2DModel", "guidance_scale", 0, False, True),
        ("Flux2Pipeline", "Flux2Transformer2DModel", "guidance_scale", 4, False, False),
        ("ZImagePipeline", "ZImageTransformer2DModel", "guidance_scale", 0, False, True),
    ],
)
def test_a_class_says_what_it_takes(tmp_path, name, transformer, guidance, pictures, needs, negative):
    found = servable_pipeline(rewritten(tmp_path, name, transformer))
    assert isinstance(found, ServablePipeline)
    assert (found.guidance, found.max_pictures, found.needs_pictures) == (guidance, pictures, needs)
    assert found.takes_negative_prompts == negative


def test_a_router_is_chosen_by_its_class_before_weights_are_read(folder, artifact, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = ModelConfig(path=str(folder))
    found = choose_router(model, "", "tiny", str(tmp_path))
    assert (found.router, found.tracking_uri) == ("uncached", "")
    assert "every branch computed, since there is no router" in found.summary
    router = artifact.save(tmp_path / "router")
    assert choose_router(model, str(router), "tiny", str(tmp_path)).router == str(router)
    with pytest.raises(ValueError, match=r"fit model\.path .*: it was made for a DiT outside of any"):
        choose_router(model, str(CHAMPION), "tiny", str(tmp_path))
    other = dataclasses.replace(
        artifact, model={**artifact.model, "diffusers_class": "SD3Transformer2DModel"}
    )
    with pytest.raises(ValueError, match="made for a SD3Transformer2DModel, and FluxPipeline has a Flux"):
        choose_router(model, str(other.save(tmp_path / "other")), "tiny", str(tmp_path))


# Guidance by a negative prompt, as Qwen-Image has it: the arguments of the pipeline's call


class _Recording:
    """Stands for a pipeline, and keeps what it is called with."""

    vae_scale_factor = 8

    def __init__(self, case):
        self.transformer, self.scheduler, self.calls = case.pipe.transformer, case.pipe.scheduler, []

    def __call__(self, **call):
        self.calls.append(call)
        return (torch.zeros(len(call["generator"]), 3, call["height"], call["width"]),)


@pytest.fixture(scope="module")
def case():
    return make_case("qwen")


def qwen(case, tmp_path, monkeypatch, name="QwenImagePipeline"):
    found = servable_pipeline(rewritten(tmp_path, name, "QwenImageTransformer2DModel"))
    monkeypatch.setattr(PipelineFolder, "load", lambda self, **_: _Recording(case))
    return PipelineSampler(found, ModelConfig())


def called(images, *requests, served=None):
    images.generate(requests, served)
    (call,) = images.pipe.calls
    images.pipe.calls.clear()
    return {name: call.get(name) for name in ("prompt", "negative_prompt", "true_cfg_scale", "image")}


def test_guidance_by_a_negative_prompt_is_on_by_default(case, tmp_path, monkeypatch):
    images = qwen(case, tmp_path, monkeypatch)
    own = images.own_sampler("")
    assert (own.guidance_scale, own.num_inference_steps) == (4.0, 50)
    images.use(images.make_uncached(own))
    rows = [ImageRequest("a", 1, 0), ImageRequest("b", 1, 1, "c")]
    assert images.shared_with(rows[0], images.champion) != images.shared_with(rows[1], images.champion)
    expected = {"prompt": ["a"], "negative_prompt": [""], "true_cfg_scale": None, "image": None}
    assert called(images, rows[0]) == expected
    guided = dataclasses.replace(rows[1], guidance_scale=2.0)
    asked = {"prompt": ["b"], "negative_prompt": ["c"], "true_cfg_scale": 2.0}
    assert called(images, guided) == expected | asked


def test_a_router_that_was_trained_unguided_is_served_unguided(case, tmp_path, monkeypatch):
    images, artifact = qwen(case, tmp_path, monkeypatch), case.artifact()
    call = {
        "arguments": {"height": 64, "width": 96, "max_sequence_length": 32},
        "prompt_arguments": ["prompt"],
    }
    images.use(images.make_plan(dataclasses.replace(artifact, training={"call": call}), "3"))
    assert images.champion.config.guidance_scale == 1.0 and images.sizes.default == (96, 64)
    row = ImageRequest("a", 1, 0)
    monkeypatch.setattr(images._exchanged, "under", lambda plan: contextlib.nullcontext())
    expected = {"prompt": ["a"], "negative_prompt": None, "true_cfg_scale": None, "image": None}
    assert called(images, row) == expected
    with pytest.raises(SettingRejected, match="negative_prompt is set and router 3 was trained without"):
        images.check(dataclasses.replace(row, negative_prompt="b"))
    free = images.plan_for("high", None, 3.0)
    images.check(dataclasses.replace(row, negative_prompt="b"), free)
    guided = dataclasses.replace(row, guidance_scale=3.0)
    asked = {"negative_prompt": [""], "true_cfg_scale": 3.0}
    assert called(images, guided, served=free) == expected | asked
    call = {"arguments": {"negative_prompt": " ", "true_cfg_scale": 2.5}, "prompt_arguments": ["prompt"]}
    images.use(images.make_plan(dataclasses.replace(artifact, training={"call": call}), "4"))
    assert images.champion.config.guidance_scale == 2.5
    assert called(images, row) == expected | {"negative_prompt": [" "], "true_cfg_scale": 2.5}


def test_images_of_one_picture_and_prompt_are_one_prompt(case, tmp_path, monkeypatch):
    images = qwen(case, tmp_path, monkeypatch, "QwenImageEditPlusPipeline")
    images.use(images.make_uncached(images.own_sampler("")))
    pictures = tuple(Picture(32, 16, bytes([shade]) * 1536) for shade in (0, 255))
    call = called(images, *(ImageRequest("a", 1, i, pictures=pictures) for i in range(2)))
    assert (call["prompt"], call["negative_prompt"]) == ("a", "")
    assert [each.size for each in call["image"]] == [(32, 16)] * 2
    assert images.probe().pictures, "nothing is generated without one"


def test_a_pipeline_that_only_edits_says_so():
    bounds = SizeBounds((64, 64), 16, 2**20, 4096)
    card = ModelCard(
        model="tiny",
        router_version="",
        cur=0.0,
        class_names=(),
        image_size=64,
        max_images=4,
        sizes=bounds,
        max_pictures=1,
        needs_pictures=True,
    )
    body = GenerateRequest(prompt="a")
    with pytest.raises(ApiError, match="'tiny' edits pictures: POST one to /v1/images/edits"):
        check(body, card)
    assert check(body, card, num_pictures=1) == ("a", [])
    with pytest.raises(ApiError, match="'tiny' takes 0: leave it out, and POST to /v1/images/generations"):
        check(body, dataclasses.replace(card, max_pictures=0, needs_pictures=False), num_pictures=1)


@pytest.mark.parametrize("router", ["trained", "uncached"])
def test_a_replica_tries_its_router_out(folder, artifact, tmp_path, router):
    path = str(artifact.save(tmp_path / "trained")) if router == "trained" else router
    args = ServeArgs(model=ModelConfig(path=str(folder)), router=path, registered_model="tiny").resolved()
    images = make_sampler(args.model, args.serve)
    engine = GenerationEngine(images, "tiny", args.serve)

    async def start():
        await RegistryWatcher(engine, args).poll()
        return await engine.describe()

    card = asyncio.run(start())
    assert (card.router_version, card.class_names, card.has_previews) == (router, (), True)
    by_quality = {quality: each for each in card.routers for quality in each.quality}
    assert by_quality["high"].version == "uncached" and by_quality["medium"].version == router
    assert by_quality["high"].num_inference_steps == (tiny.STEPS if router == "trained" else 28)
    assert by_quality["medium"].guidance_scale == (3.0 if router == "trained" else 3.5)


def test_a_replica_refuses_a_router_whose_branches_are_others(folder, artifact, tmp_path):
    fewer = {**artifact.model, "branches": artifact.model["branches"][1:]}
    path = str(dataclasses.replace(artifact, model=fewer).save(tmp_path / "router"))
    args = ServeArgs(model=ModelConfig(path=str(folder)), router=path).resolved()
    engine = GenerationEngine(make_sampler(args.model, args.serve), "tiny", args.serve)
    with pytest.raises(ValueError, match="they differ in"):
        asyncio.run(RegistryWatcher(engine, args).poll())


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
