"""Folders of diffusers pipelines that are served or refused, and the router that a replica tries out."""

import asyncio
import dataclasses
import json

import pytest
import tiny_served_pipeline as tiny

from harmonica.builtin import CHAMPION
from harmonica.models.loading import ModelConfig
from harmonica.validation.settings import SettingError
from pipelines.config.serve import ServeConfig
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.engine_loader import make_sampler
from pipelines.serving.registry_watcher import RegistryWatcher
from pipelines.serving.router_choice import choose_router
from pipelines.serving.servable_pipeline import ServablePipeline, servable_pipeline
from pipelines.serving.serve_args import ServeArgs


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


@pytest.mark.parametrize("router", ["trained", "uncached", "even-1.5x"])
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
    assert by_quality["low"] == by_quality["medium"]
    if router == "even-1.5x":
        assert by_quality["medium"].ideal_speedup == pytest.approx(1.5, abs=0.06)
        assert by_quality["medium"].plan.count("0") > 7


def test_a_replica_refuses_a_router_whose_branches_are_others(folder, artifact, tmp_path):
    fewer = {**artifact.model, "branches": artifact.model["branches"][1:]}
    path = str(dataclasses.replace(artifact, model=fewer).save(tmp_path / "router"))
    args = ServeArgs(model=ModelConfig(path=str(folder)), router=path).resolved()
    engine = GenerationEngine(make_sampler(args.model, args.serve), "tiny", args.serve)
    with pytest.raises(ValueError, match="they differ in"):
        asyncio.run(RegistryWatcher(engine, args).poll())
