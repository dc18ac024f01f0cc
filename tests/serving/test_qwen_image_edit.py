"""Qwen-Image-Edit on a tiny whole pipeline: a plan is trained, applied, and served by `/v1/images/edits`."""

import base64
import dataclasses
import io

import numpy as np
import pytest
import tiny_qwen_edit
import torch
from diffusers import QwenImageEditPipeline
from fastapi.testclient import TestClient
from PIL import Image

import harmonica
from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.recorded.kinds import KINDS as MODULES
from harmonica.models.loading import ModelConfig
from harmonica.training.config import TrainingConfig
from pipelines.config.serve import ServeConfig
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.engine_loader import make_sampler
from pipelines.serving.images_api import create_app

STEPS, WIDTH, HEIGHT = 4, 128, 64
CALL = {"num_inference_steps": STEPS, "true_cfg_scale": 3.0, "height": HEIGHT, "width": WIDTH}
SETTINGS = TrainingConfig(trajectories=1, batch_size=1, target_speedup=1.4, initial="even", iepo="none")


def picture() -> Image.Image:
    colours = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((WIDTH, HEIGHT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen_edit.write_qwen_edit(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = QwenImageEditPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def artifact(pipe) -> RouterArtifact:
    call = CALL | {"image": picture(), "negative_prompt": " "}
    return harmonica.train_pipeline(pipe, ["a red cat", "the moon"], SETTINGS, call=call, cacheable=MODULES)


def edited(pipe, seed: int, kind: str = "latent") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    call = CALL | {"image": picture(), "negative_prompt": " ", "generator": generator, "output_type": kind}
    return pipe(prompt="a red cat", **call).images[0]


def test_a_plan_is_trained_and_applied(pipe, artifact):
    assert artifact.ideal_speedup == pytest.approx(1.4, rel=0.05)
    assert {branch["kind"] for branch in artifact.model["branches"]} == {"attn", "mlp"}
    before = edited(pipe, 7)
    everything = dataclasses.replace(
        artifact, logits_TB=torch.full_like(artifact.logits_TB, 5.0), threshold=0.1
    )
    harmonica.apply(pipe, everything)
    assert torch.equal(edited(pipe, 7), before)
    harmonica.remove(pipe)
    harmonica.apply(pipe, artifact)
    planned = edited(pipe, 7)
    assert 1e-4 < float((planned - before).norm() / before.norm()) < 0.5, "the plan reuses something"
    harmonica.remove(pipe)
    assert torch.equal(edited(pipe, 7), before)


def test_the_endpoint_edits_as_the_pipeline_does_under_the_plan(folder, pipe, artifact):
    config = ServeConfig(batch_wait_s=2.0, max_images_per_request=2, max_pixels=2**15)
    sampler = make_sampler(ModelConfig(path=str(folder)), config)
    sampler.use(sampler.make_plan(artifact, "3"))
    file = io.BytesIO()
    picture().save(file, "png")
    with TestClient(create_app(GenerationEngine(sampler, "tiny", config))) as client:
        form = {"prompt": "a red cat", "seed": "7", "size": f"{WIDTH}x{HEIGHT}", "n": "2"}
        answer = client.post("/v1/images/edits", data=form, files={"image": file.getvalue()}).json()
        assert answer["router_version"] == "3" and answer["batch_size"] == 2
        refused = client.post("/v1/images/generations", json={"prompt": "a red cat"})
        assert "edits pictures" in refused.json()["error"]["message"]
    harmonica.apply(pipe, artifact)
    for index, each in enumerate(answer["data"]):
        made = np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))).astype(int)
        theirs = np.round(edited(pipe, 7 + index, "pt").permute(1, 2, 0).numpy() * 255).astype(int)
        assert made.shape == theirs.shape and np.abs(made - theirs).max() <= 1
    harmonica.remove(pipe)
