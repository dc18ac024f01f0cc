"""What a diffusers pipeline is called with for a request: negative prompts, guidance and pictures."""

import contextlib
import dataclasses

import pytest
import torch
from tiny_recorded_pipelines import make_case

from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.models.loading import ModelConfig
from pipelines.serving.api_requests import GenerateRequest
from pipelines.serving.generation import check
from pipelines.serving.http_errors import ApiError
from pipelines.serving.image_request import ImageRequest, SettingRejected
from pipelines.serving.image_sizes import SizeBounds
from pipelines.serving.pictures import plain_picture
from pipelines.serving.pipeline_sampler import PipelineSampler
from pipelines.serving.requests import ModelCard
from pipelines.serving.servable_pipeline import servable_pipeline
from tests.serving.test_servable_pipelines import rewritten


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
    pictures = tuple(plain_picture(32, 16, shade) for shade in (0, 255))
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
