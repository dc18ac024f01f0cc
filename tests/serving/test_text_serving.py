"""Prompts at the endpoint: the built-in PixArt in this process, its text encoder with it."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from images_endpoint import PATH
from PIL import Image
from tiny_engine import CONFIG, make_engine

from harmonica.core.artifact import RouterArtifact
from harmonica.data.conditions import Prompts, make_conditions
from harmonica.data.text_encoder import PromptTooLong, TextEncoder
from harmonica.models.loading import BUILTIN_TEXT, ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler
from pipelines.serving.images_api import create_app

LONG = "a photo of a dark sneaker " * 4
"""21 tokens of the 16 that the model reads."""


@pytest.fixture(scope="module")
def loaded():
    return load_model(ModelConfig(path=BUILTIN_TEXT, text_tokens=16))


@pytest.fixture(scope="module")
def artifact(loaded):
    sampler = make_sampler(
        loaded.model, SamplerConfig(name="dpm-solver++", num_inference_steps=4, guidance_scale=3.0)
    )
    logits = torch.randn(4, len(loaded.model.branches), generator=torch.Generator().manual_seed(0))
    return RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={})


@pytest.fixture(scope="module")
def clients(loaded, artifact):
    """One endpoint for each way with prompts that are too long."""
    made = {}
    for over_limit in ("truncate", "refuse"):
        engine = make_engine(loaded, artifact, config=replace(CONFIG, over_limit=over_limit))
        made[over_limit] = TestClient(create_app(engine), raise_server_exceptions=False)
    with made["truncate"], made["refuse"]:
        yield made


def draw(client, **body):
    answer = client.post(PATH, json={"seed": 1} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pixels(answer, index=0):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][index]["b64_json"])))).astype(int)


def far(first, second):
    return np.abs(first - second).max() > 1


def test_a_prompt_and_a_negative_prompt_are_drawn(clients):
    client = clients["truncate"]
    boot = draw(client, prompt="a photo of an ankle boot")
    assert boot["data"][0]["revised_prompt"] == "a photo of an ankle boot" and boot["size"] == "28x28"
    again = draw(client, prompt="a photo of an ankle boot", n=2, negative_prompt="")
    assert not far(pixels(boot), pixels(again)) and far(pixels(boot), pixels(again, 1))
    for other in (
        {"prompt": "a photo of a dress"},
        {"prompt": "a photo of an ankle boot", "negative_prompt": "a dark ankle boot"},
    ):
        assert far(pixels(boot), pixels(draw(client, **other)))


@pytest.mark.parametrize("size", ["56x56", "28x56", "1024x1024"])
def test_another_size_is_refused(clients, size):
    answer = clients["truncate"].post(PATH, json={"prompt": "a dress", "size": size})
    assert answer.status_code == 400
    assert (
        answer.json()["error"]["message"]
        == f"size is '{size}': this model generates 28x28, give that or 'auto'"
    )


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_over_the_limit_loses_its_end_or_is_refused(clients, field):
    body = {"prompt": "a dress"} | {field: LONG}
    longer = body | {field: LONG + "dress"}
    assert not far(pixels(draw(clients["truncate"], **body)), pixels(draw(clients["truncate"], **longer)))
    answer = clients["refuse"].post(PATH, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (field, "string_above_max_length")
    assert error["message"].startswith(f"{field} has ") and error["message"].endswith(
        "the model reads 16: shorten it"
    )
    draw(clients["refuse"], prompt="a dress", negative_prompt="dark")


@pytest.mark.parametrize("prompt", [" ", "\n\t", "\u3000", "\u200b\ufeff", "\x00\x07"])
def test_a_blank_prompt_is_refused_and_a_negative_one_may_be(clients, prompt):
    answer = clients["truncate"].post(PATH, json={"prompt": prompt})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "invalid_value") and "is blank" in error["message"]
    draw(clients["truncate"], prompt=f"{prompt}a dress{prompt}", negative_prompt=prompt)


class Counting(TextEncoder):
    """Counts what it embeds."""

    embedded = 0

    def encode(self, prompts, max_tokens, over_limit="truncate"):
        self.embedded += len(prompts)
        return super().encode(prompts, max_tokens, over_limit)


def test_the_last_prompts_are_kept(loaded):
    encoder = Counting.load(loaded.text_folder)
    prompts = Prompts(encoder, loaded.model, cached=3)
    first = prompts.of(["a dress"], [""])
    for _ in range(2):
        prompts.check("a dress", "")
        company = prompts.of(["a bag", "a dress"], ["", ""])
    assert encoder.embedded == 3, "each once"
    assert torch.equal(company.embeddings[1], first.embeddings[0])
    prompts.of(["a coat"], [""])  # drops the one asked for longest ago: the bag
    prompts.of(["a dress"], [""])
    assert encoder.embedded == 4
    prompts.of(["a bag"], [""])
    assert encoder.embedded == 5


def test_a_refused_prompt_is_told_by_its_name(loaded):
    conditions = make_conditions(loaded, "cpu", over_limit="refuse")
    with pytest.raises(
        PromptTooLong, match=r"^negative_prompt has \d+ tokens, the model reads 16: shorten it$"
    ):
        conditions.check("a dress", LONG)
