"""Previews of pipelines: the clean image of a step, decoded as the pipeline itself would."""

import asyncio

import pytest
import tiny_served_pipeline as tiny
import torch
from diffusers import FluxPipeline
from tiny_pipeline_folder import write_pipeline_folder
from tiny_text_pipeline import write_text_pipeline

import harmonica
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.models.loading import ModelConfig
from pipelines.config.serve import ServeConfig
from pipelines.serving.api_requests import GenerateRequest
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.engine_loader import make_sampler
from pipelines.serving.generation import check
from pipelines.serving.http_errors import ApiError
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.pipeline_previews import LatentDecoder
from pipelines.serving.pipeline_sampler import PipelineSampler
from pipelines.serving.requests import EngineRequest, GeneratedImage, Preview
from pipelines.serving.servable_pipeline import ServablePipeline

CALL = {"num_inference_steps": tiny.STEPS, "guidance_scale": 3.0, "height": tiny.HEIGHT, "width": tiny.WIDTH}
ROWS = [ImageRequest("the moon", 5, 0), ImageRequest("a red cat", 7, 0)]


@pytest.fixture(scope="module")
def images(folder, artifact):
    sampler = make_sampler(ModelConfig(path=str(folder)), ServeConfig(max_pixels=2**15))
    champion = sampler.make_plan(artifact, "3")
    sampler.try_out(artifact, champion)
    sampler.use(champion)
    return sampler


def predicted(folder, artifact, row):
    """By Euler's rule from what diffusers tells of its steps, and by its own decoding: of steps 2, 3, ..."""
    pipe, latents = FluxPipeline.from_pretrained(folder), []
    pipe.set_progress_bar_config(disable=True)
    if artifact is not None:
        harmonica.apply(pipe, artifact)

    def draw(callback):
        generator = torch.Generator().manual_seed(row.seed)
        return pipe(
            row.subject, generator=generator, output_type="pt", callback_on_step_end=callback, **CALL
        ).images

    def keep(_, i, t, tensors):
        latents.append(tensors["latents"])
        return tensors

    draw(keep)
    sigmas = pipe.scheduler.sigmas
    for i in range(1, tiny.STEPS):
        velocity = (latents[i] - latents[i - 1]) / (sigmas[i + 1] - sigmas[i])
        clean = latents[i] - sigmas[i + 1] * velocity

        def give(_, step, t, tensors, clean=clean):
            return {"latents": clean} if step == tiny.STEPS - 1 else tensors

        yield draw(give)[0] * 2 - 1


@pytest.mark.parametrize("quality", ["medium", "high"])
def test_a_preview_is_the_clean_image_that_a_step_points_to(images, folder, artifact, quality):
    found = {}

    def keep(step, predict):
        (found[step],) = predict([1])

    made = images.generate(ROWS, images.plan_for(quality), keep)
    assert list(found) == list(range(1, tiny.STEPS + 1))
    torch.testing.assert_close(found[tiny.STEPS], made[1], rtol=0, atol=1e-4)
    wanted = list(predicted(folder, artifact if quality == "medium" else None, ROWS[1]))
    for step, theirs in enumerate(wanted, 2):
        torch.testing.assert_close(found[step], theirs, rtol=0, atol=1e-4)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


@pytest.mark.parametrize("write", [write_text_pipeline, write_pipeline_folder])
def test_pipelines_of_other_schedulers_and_decoders_have_previews(write, tmp_path):
    """PixArt by DPM-Solver++, whose call has no callback, and Chroma."""
    read = PipelineFolder.read(str(write(tmp_path / "p")))
    sampler = PipelineSampler(ServablePipeline(read), ModelConfig())
    assert not sampler.has_previews, "nobody knows yet"
    sampler.use(sampler.make_uncached(sampler.own_sampler("")))
    served = sampler.plan_for("high", 5)
    sampler.warm_up(served, 1)
    assert sampler.has_previews
    found = {}
    rows = [ImageRequest("a cat", 1, 0, size=(32, 32))]
    made = sampler.generate(rows, served, lambda step, predict: found.update({step: predict([0])}))
    assert list(found) == [1, 2, 3, 4, 5]
    torch.testing.assert_close(found[5], made, rtol=0, atol=1e-3)
    errors = [float((found[step] - made).abs().mean()) for step in found]
    assert errors[0] > errors[3]


def test_a_stream_has_previews(images):
    engine = GenerationEngine(images, "tiny", ServeConfig())

    async def streamed():
        request = EngineRequest(ROWS[1], partial_images=2)
        return [event async for event in engine.generate_stream(request)], await engine.describe()

    events, card = asyncio.run(streamed())
    assert [type(event) for event in events] == [Preview, Preview, GeneratedImage] and card.has_previews
    assert [event.step for event in events[:2]] == [1, 3]
    assert len({event.picture for event in events}) == 3
    assert {event.size for event in events} == {"128x64"}


def test_a_pipeline_that_decodes_in_another_way_has_none(folder, monkeypatch):
    own = LatentDecoder.decode
    monkeypatch.setattr(LatentDecoder, "decode", lambda self, *inputs: own(self, *inputs) + 0.1)
    sampler = make_sampler(ModelConfig(path=str(folder)), ServeConfig(max_pixels=2**15))
    sampler.use(sampler.make_uncached(sampler.own_sampler("")))
    sampler.generate([ImageRequest("a cat", 1, 0, size=(64, 64))], sampler.plan_for("high", 2))
    assert not sampler.has_previews
    card = asyncio.run(GenerationEngine(sampler, "tiny", ServeConfig()).describe())
    body = GenerateRequest(prompt="a", stream=True, partial_images=2)
    with pytest.raises(ApiError, match="partial_images is 2 and 'tiny' has no previews: leave it out"):
        check(body, card)
