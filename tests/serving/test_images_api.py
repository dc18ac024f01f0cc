"""The endpoint as clients see it, over the real sampler in this process; Serve itself is in test_serve."""

import base64
import dataclasses
import io

import numpy as np
import openai
import pytest
from images_endpoint import PATH, refused
from PIL import Image

from harmonica.evaluation.fashion_mnist import CLASS_NAMES
from harmonica.evaluation.plots import encode_picture
from pipelines.serving.image_request import ImageRequest


def picture(entry):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


def test_answer_holds_images_and_how_they_were_made(client, source):
    answer = client.post(PATH, json={"prompt": "ankle BOOT", "n": 3, "seed": 5})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["seed"] == 5 and body["size"] == "28x28" and body["output_format"] == "png"
    assert body["router_version"] == "3" and body["batch_size"] == 3
    assert (body["quality"], body["num_inference_steps"], body["guidance_scale"]) == ("medium", 8, 2.0)
    assert body["cur"] == pytest.approx(source.images.champion.plan.cur)
    assert body["inference_time_s"] > 0 and body["created"] > 1.7e9
    assert [entry["revised_prompt"] for entry in body["data"]] == ["Ankle boot"] * 3
    assert [entry["router_version"] for entry in body["data"]] == ["3"] * 3
    images = [picture(entry) for entry in body["data"]]
    assert {image.shape for image in images} == {(28, 28)}
    expected = source.images.generate([ImageRequest(9, 5, index) for index in range(3)])
    pictures = [base64.b64decode(entry["b64_json"]) for entry in body["data"]]
    assert pictures == [encode_picture(image) for image in expected]


def test_each_image_names_the_router_that_it_is_of(client, source, monkeypatch):
    """While another one is promoted, replicas differ for some seconds."""
    own, versions = source.generate, iter(["3", "4"])

    async def mixed(request):
        return dataclasses.replace(await own(request), router_version=next(versions))

    monkeypatch.setattr(source, "generate", mixed)
    body = client.post(PATH, json={"prompt": "Bag", "seed": 5, "n": 2}).json()
    assert sorted(entry["router_version"] for entry in body["data"]) == ["3", "4"]


def test_without_a_seed_images_differ_and_the_seed_drawn_gives_them_again(client):
    first, second = (client.post(PATH, json={"prompt": "Bag"}).json() for _ in range(2))
    assert first["seed"] != second["seed"] and first["data"] != second["data"]
    again = client.post(PATH, json={"prompt": "8", "seed": first["seed"]}).json()
    assert again["data"] == first["data"]
    assert first["seed"] < 2**53, "a JSON number that JavaScript reads exactly"


def test_what_openai_has_and_this_model_has_not_is_ignored(client):
    extras = {"user": "me", "style": "vivid", "background": "auto", "moderation": "low", "complexity": "low"}
    names = ("model", "n", "size", "response_format", "stream", "quality", "output_format", "partial_images")
    nothing = dict.fromkeys(names)
    answer = client.post(PATH, json={"prompt": "Coat", "seed": 2**62, **extras, **nothing})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 1


@pytest.mark.parametrize("size", ["auto", "28x28"])
def test_its_own_size_and_name_are_accepted(client, size):
    assert client.post(PATH, json={"prompt": "Coat", "size": size, "model": "tiny"}).status_code == 200


FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_come_in_the_format_asked_for(client, kind):
    asked = {"prompt": "Bag", "seed": 3, "output_format": kind}
    body = client.post(PATH, json=asked).json()
    data = base64.b64decode(body["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).format == FORMATS[kind] and body["output_format"] == kind
    if kind != "png":
        smaller = client.post(PATH, json=asked | {"output_compression": 20}).json()
        assert len(base64.b64decode(smaller["data"][0]["b64_json"])) < len(data)


def test_quality_picks_the_router(client, source):
    def ask(**settings):
        body = client.post(PATH, json={"prompt": "Bag", "seed": 3} | settings).json()
        return body["quality"], body["router_version"], body["cur"] > 0, body["num_inference_steps"]

    assert ask() == ask(quality="auto") == ask(quality="standard") == ("medium", "3", True, 8)
    assert ask(quality="low") == ("low", "fast", True, 8)
    assert ask(quality="high") == ask(quality="hd") == ("high", "uncached", False, 8)
    assert ask(quality="high", num_inference_steps=12, guidance_scale=3) == ("high", "uncached", False, 12)
    assert ask(num_inference_steps=8, guidance_scale=2) == ("medium", "3", True, 8), "its own are no others"


def test_routers(client, source):
    routers = {entry["id"]: entry for entry in client.get("/v1/routers").json()["data"]}
    assert {name: entry["quality"] for name, entry in routers.items()} == {
        "uncached": ["high"],
        "3": ["medium"],
        "fast": ["low"],
    }
    champion = routers["3"]
    assert champion["plan"] == source.images.champion.plan.to_strings()
    assert len(champion["scores"]) == 8 and len(champion["scores"][0]) == len(champion["plan"][0]) == 6
    assert champion["ideal_speedup"] > 1 and routers["uncached"]["scores"] == []


def test_models(client):
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "tiny" and entry["object"] == "model" and entry["size"] == "28x28"
    assert entry["class_names"] == list(CLASS_NAMES)
    assert client.get("/v1/models/tiny").json() == entry
    refused(client.get("/v1/models/huge"), 404, "model", "model_not_found")


def test_documentation_is_on(client):
    assert client.get("/docs").status_code == 200
    schema = client.get("/openapi.json").json()
    assert {PATH, "/v1/models", "/healthz"} <= schema["paths"].keys()


def test_the_official_client(client):
    api = openai.OpenAI(api_key="unused", base_url="http://testserver/v1", http_client=client)
    answer = api.images.generate(prompt="Sneaker", n=2, extra_body={"seed": 4})
    assert len(answer.data) == 2 and answer.size == "28x28" and answer.seed == 4
    assert [model.id for model in api.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError) as refusal:
        api.images.generate(prompt="cat")
    assert (refusal.value.param, refusal.value.code) == ("prompt", "unknown_class")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("huge")
