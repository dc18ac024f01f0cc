"""A diffusers folder whose transformer has a branch file: its router decides what samples it."""

import asyncio

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from tiny_engine import CONFIG
from tiny_text_pipeline import write_text_pipeline

import harmonica
from harmonica.builtin import FASHION_PIXART
from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from pipelines.config.serve import ServeConfig
from pipelines.serving import engine_loader, first_router
from pipelines.serving.batching import Worker
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.pipeline_sampler import PipelineSampler
from pipelines.serving.registry_watcher import RegistryWatcher
from pipelines.serving.router_choice import choose_router
from pipelines.serving.servable_pipeline import servable_pipeline
from pipelines.serving.serve_args import ServeArgs

SIZE, STEPS = 16, 4
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": SIZE, "width": SIZE}
SAMPLERS = {"in_pipeline": PipelineSampler, "branch_file": ImageSampler}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_pipeline(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def routers(folder, tmp_path_factory):
    """Folders of two routers of one PixArt, by what made them."""
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    config = TrainingConfig(trajectories=1, batch_size=1, target_speedup=1.4, initial="even", iepo="none")
    call = CALL | {"use_resolution_binning": False}
    made = {"in_pipeline": harmonica.train_pipeline(pipe, ["a red cat"], config, call=call)}
    loaded = load_model(ModelConfig(path=str(folder), text_tokens=7))
    sampler = make_sampler(
        loaded.model, SamplerConfig(name="dpm-solver++", num_inference_steps=STEPS, guidance_scale=3.0)
    )
    logits = torch.randn(STEPS, len(loaded.model.branches), generator=torch.Generator().manual_seed(0))
    made["branch_file"] = RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={})
    place = tmp_path_factory.mktemp("routers")
    return {name: artifact.save(place / name) for name, artifact in made.items()}


def replica(folder, router):
    """A replica's engine with its first router, as the deployment makes it; what it polls afterwards."""
    tokens = 0 if "in_pipeline" in str(router) else 7
    model = ModelConfig(path=str(folder), text_tokens=tokens)
    args = ServeArgs(model=model, router=str(router), registered_model="tiny", serve=CONFIG).resolved()

    async def start():
        loaded = await engine_loader.EngineLoader(args, "tiny", None, Worker()).load()
        return loaded.engine

    return asyncio.run(start())


@pytest.mark.parametrize("made_by", SAMPLERS)
def test_a_router_is_served_by_what_trained_it(folder, routers, made_by, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    router = routers[made_by]
    model = ModelConfig(path=str(folder), text_tokens=7 if made_by == "branch_file" else 0)
    assert choose_router(model, str(router), "tiny", str(tmp_path)).router == str(router)
    engine = replica(folder, router)
    assert type(engine.images) is SAMPLERS[made_by] and engine.images.version == made_by
    (image,) = engine.images.generate([ImageRequest("a red cat", 3, 0)])
    assert image.shape == (3, SIZE, SIZE)
    if made_by == "in_pipeline":
        pipe = PixArtSigmaPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        harmonica.apply(pipe, router)
        theirs = pipe(
            "a red cat",
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
            use_resolution_binning=False,
            **CALL,
        ).images
        torch.testing.assert_close(image, theirs[0] * 2 - 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "then", "why"),
    [
        ("in_pipeline", "branch_file", "made for a PixArt outside of any pipeline"),
        ("branch_file", "in_pipeline", "the router was made for PixArtTransformer2DModel"),
    ],
)
def test_a_later_champion_of_the_other_view_is_refused(folder, routers, first, then, why):
    engine = replica(folder, routers[first])
    champion = engine.images.version
    args = ServeArgs(model=ModelConfig(path=str(folder)), router=str(routers[then])).resolved()
    asyncio.run(RegistryWatcher(engine, args).poll())
    assert engine.images.version == champion
    assert engine.rejected.version == then and why in engine.rejected.reason


def test_without_a_router_the_branch_file_samples(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = ModelConfig(path=str(folder), text_tokens=7)
    assert type(engine_loader.make_sampler(model, ServeConfig())) is ImageSampler
    assert choose_router(model, "", "tiny", str(tmp_path)).router == "uncached"
    args = ServeArgs(model=model, router="uncached").resolved()
    assert asyncio.run(first_router.deciding_router(args)) is None


def test_a_pipeline_without_a_decoder_is_refused(routers, tmp_path):
    model = ModelConfig(path=str(FASHION_PIXART))
    artifact = RouterArtifact.load(routers["in_pipeline"])
    with pytest.raises(ValueError, match="a PixArtAlphaPipeline without a VAE, which decodes its latents"):
        servable_pipeline(model, artifact)
    with pytest.raises(ValueError, match=r"does not fit model\.path .* without a VAE"):
        choose_router(model, str(routers["in_pipeline"]), "tiny", str(tmp_path))


def test_a_replica_waits_for_a_registry_that_is_down(folder, routers, monkeypatch):
    asked, artifact = [], RouterArtifact.load(routers["in_pipeline"])

    def current_version(args):
        asked.append(args.tracking_uri)
        if len(asked) < 3:
            raise OSError("nobody answers")
        return "1"

    async def no_pause(seconds):
        pass

    monkeypatch.setattr(ServeArgs, "current_version", current_version)
    monkeypatch.setattr(ServeArgs, "load", lambda args, version: artifact)
    monkeypatch.setattr(first_router.asyncio, "sleep", no_pause)
    args = ServeArgs(model=ModelConfig(path=str(folder)), tracking_uri="http://mlflow:5000")
    assert asyncio.run(first_router.deciding_router(args)) is artifact and len(asked) == 3
