"""`POST /v1/images/edits`: forms, pictures, and FLUX Kontext behind the endpoint, without Ray."""

import asyncio
import base64
import io
import pickle
import re
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pytest
import tiny_served_pipeline as tiny
import torch
from diffusers import FluxKontextPipeline
from fastapi.testclient import TestClient
from live_app import running
from PIL import Image

from harmonica.models.loading import ModelConfig
from pipelines.config.serve import ServeConfig
from pipelines.serving import uploads
from pipelines.serving.batching import Overloaded
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.engine_loader import make_sampler
from pipelines.serving.http_errors import ApiError
from pipelines.serving.images_api import create_app
from pipelines.serving.multipart import Part, parse_parts
from pipelines.serving.pictures import decode

PATH = "/v1/images/edits"
CONFIG = ServeConfig(batch_wait_s=0.05, max_images_per_request=3, max_pixels=2**15)


def engine_of(folder, artifact):
    images = make_sampler(ModelConfig(path=str(folder)), CONFIG)
    images.use(images.make_plan(artifact, "3"))
    return GenerationEngine(images, "tiny", CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_flux(tmp_path_factory.mktemp("kontext"), kontext=True)


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    plain = tiny.write_flux(tmp_path_factory.mktemp("flux"))  # with the same transformer
    return engine_of(folder, tiny.train_router(plain))


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(create_app(engine, max_upload_bytes=100_000), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def lenient(engine):
    with TestClient(create_app(engine, lenient=True), raise_server_exceptions=False) as client:
        yield client


def picture(width=128, height=64, kind="png", mode="RGB"):
    colours = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, len(mode)), dtype=np.uint8)
    image = Image.fromarray(colours, mode).resize((width, height))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def pixels(b64_json):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json)))).astype(int)


def same(first, second):
    return first.shape == second.shape and np.abs(first - second).max() <= 1


def test_openais_client_edits_a_picture(engine, folder):
    with running(create_app(engine)) as url, openai.OpenAI(api_key="x", base_url=f"{url}v1") as api:
        answer = api.images.edit(
            image=("in.png", picture(), "image/png"),
            prompt="a red cat",
            n=2,
            size="128x64",
            quality="high",
            extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.5},
        )
        assert (answer.size, answer.batch_size, answer.router_version) == ("128x64", 2, "uncached")
        events = list(
            api.images.edit(
                image=[("in.png", picture(), "image/png")],
                prompt="a red cat",
                stream=True,
                size="128x64",
                quality="high",
                extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.5, "progress": True},
            )
        )
        assert [event.type.rpartition(".")[2] for event in events] == ["progress"] * 3 + ["completed"]
        assert same(pixels(events[-1].b64_json), pixels(answer.data[0].b64_json))
    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.5, "height": 64, "width": 128}
    for index in range(2):
        (theirs,) = pipe(
            image=Image.open(io.BytesIO(picture())),
            prompt="a red cat",
            generator=torch.Generator().manual_seed(7 + index),
            max_area=64 * 128,
            output_type="np",
            **settings,
        ).images
        assert same(pixels(answer.data[index].b64_json), np.round(theirs * 255).astype(int))


def test_the_documented_example_runs(engine, tmp_path):
    page = (Path(__file__).parents[2] / "docs/pages/guides/serve.md").read_text()
    (code,) = [each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "images.edit(" in each]
    assert '"in.png"' in code
    (tmp_path / "in.png").write_bytes(picture())
    with running(create_app(engine)) as url, openai.OpenAI(api_key="x", base_url=f"{url}v1") as client:
        names = {"client": client}
        exec(code.replace('"in.png"', repr(str(tmp_path / "in.png"))), names)
    assert names["edited"].size == "128x64" and names["edited"].data[0].b64_json


def test_a_plan_edits_and_generates_and_the_picture_counts(client):
    fields = {"prompt": "a red cat", "seed": "7"}
    edited = client.post(PATH, data=fields, files={"image": picture()}).json()
    assert edited["router_version"] == "3" and edited["cur"] > 0
    assert edited["size"] == "128x64", "the picture's shape in the pipeline's area"
    other = client.post(PATH, data=fields, files={"image": picture(64, 128, "webp")}).json()
    assert other["size"] == "64x128"
    generated = client.post("/v1/images/generations", json={"prompt": "a red cat", "seed": 7}).json()
    assert generated["size"] == "128x64"
    assert not same(*(pixels(each["data"][0]["b64_json"]) for each in (edited, generated)))
    clear = client.post(PATH, data=fields, files={"image[]": picture(mode="RGBA")})
    assert clear.status_code == 200, clear.text
    (model,) = client.get("/v1/models").json()["data"]
    assert model["max_pictures"] == 1 and model["sizes"]["default"] == [128, 64]


@pytest.mark.parametrize(
    ("fields", "files", "param", "message"),
    [
        ({}, {"image": picture()}, "prompt", "prompt is missing"),
        ({"prompt": "a"}, {"other": picture()}, "other", "unknown parameter other"),
        ({"prompt": "a"}, {"image": b"GIF89a"}, "image", "cannot be decoded: give a png, jpeg or webp file"),
        ({"prompt": "a"}, {"image": picture()[:90]}, "image", "image cannot be decoded"),
        ({"prompt": "a"}, {"image": picture(64, 32)}, "image", "image has a side of 32 pixels: give 64"),
        ({"prompt": "a"}, {"image": picture(), "mask": picture()}, "mask", "this endpoint edits whole"),
        ({"prompt": "a", "n": "0"}, {"image": picture()}, "n", "n is '0': it should be greater than or"),
        ({"prompt": "a", "n": "x"}, {"image": picture()}, "n", "n is 'x': it should be a valid integer"),
        ({"prompt": "a", "sed": "1"}, {"image": picture()}, "sed", "unknown parameter sed"),
        ({"prompt": "a", "size": "65x64"}, {"image": picture()}, "size", "size is '65x64': give multiples"),
        ({"prompt": ["a", "b"]}, {"image": picture()}, "prompt", "prompt is there twice: send it once"),
        (
            {"prompt": "a", "negative_prompt": "b"},
            {"image": picture()},
            "negative_prompt",
            "is not guided by one",
        ),
    ],
)
def test_forms_that_cannot_be_used_are_refused_by_their_field(client, fields, files, param, message):
    answer = client.post(PATH, data=fields, files=files)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_pictures_have_a_number_and_a_size(client, monkeypatch):
    two = [("image[]", ("a.png", picture())), ("image[]", ("b.png", picture()))]
    answer = client.post(PATH, data={"prompt": "a"}, files=two)
    assert answer.status_code == 400 and "image is there 2 times and 'tiny' takes 1" in answer.text
    answer = client.post(PATH, data={"prompt": "a"})
    assert answer.json()["error"]["code"] == "invalid_multipart", "a form without files is of another type"
    answer = client.post(PATH, data={"prompt": "a"}, files={"image": b"x" * 100_001})
    assert answer.status_code == 413 and "more than 100000 bytes" in answer.text
    large = io.BytesIO()
    Image.new("1", (20_000, 1_000)).save(large, "PNG")
    answer = client.post(PATH, data={"prompt": "a"}, files={"image": large.getvalue()})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "image_too_large"


def test_a_page_of_another_site_sends_no_form(engine):
    def status(origin, **settings):
        with TestClient(create_app(engine, **settings), raise_server_exceptions=False) as client:
            headers = {"origin": origin} | ({"authorization": "Bearer key"} if "keys" in settings else {})
            return client.post(PATH, data={"prompt": "a"}, files={"image": picture()}, headers=headers)

    for origin in ("https://evil.example", "null"):
        answer = status(origin)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "other_site"
    assert status("http://testserver").status_code == 200, "its own"
    for allowed in ("https://good.example", "*"):
        assert status("https://good.example", cors_origins=(allowed,)).status_code == 200
    assert status("https://any.example", keys=("key",)).status_code == 200, "no browser adds a key by itself"


def test_a_lenient_server_warns_of_what_it_does_not_follow(lenient):
    answer = lenient.post(
        PATH,
        data={"prompt": "a", "model": "gpt-image-2", "size": "100x100", "sed": "1"},
        files={"image": picture(), "mask": picture()},
    ).json()
    assert [each["param"] for each in answer["warnings"]] == ["model", "size", "sed", "mask"]
    assert answer["size"] == "128x64"


def test_a_picture_lies_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(file, "JPEG", exif=exif)
    assert decode(file.getvalue()).size == (8, 16)


def test_what_waits_is_as_large_as_the_file(client, engine, monkeypatch):
    small = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(small, "WEBP", lossless=True)
    assert len(small.getvalue()) < 1000
    sent = []

    async def refuse(request):
        sent.append(len(pickle.dumps(request)))
        raise Overloaded

    monkeypatch.setattr(engine, "generate", refuse)
    answer = client.post(PATH, data={"prompt": "a", "n": "3"}, files={"image": small.getvalue()})
    assert answer.status_code == 503
    assert sent and max(sent) < 10_000, "not 50 MB of pixels, for each image"


def test_few_pictures_are_decoded_at_once(monkeypatch):
    lock, now, most = threading.Lock(), 0, 0

    def slow(file):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return Image.new("RGB", (1, 1))

    async def all_at_once():
        await asyncio.gather(*(uploads.decode_pictures([part]) for _ in range(12)))

    monkeypatch.setattr(uploads, "decode", slow)
    part = Part("image", b"", is_file=True)
    asyncio.run(all_at_once())
    assert most == 2


# Forms

TYPE = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'


def test_parts_are_parsed():
    body = (
        b'before\r\n--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na \xc3\xa9\r\n\r\n'
        b'\r\n--b\r\ncontent-disposition: form-data; name="image"; filename="a b.png"\r\n'
        b"Content-Type: image/png\r\n\r\n\x00\r\n--c\n\r\n--b--\r\nafter"
    )
    first, second = parse_parts(TYPE, body)
    assert (first.name, first.text(), first.is_file) == ("prompt", "a é\r\n\r\n", False)
    assert (second.name, second.value, second.is_file) == ("image", b"\x00\r\n--c\n", True)
    assert parse_parts('multipart/form-data; boundary="b"', b"--b--\r\n") == []


def test_a_value_is_whole_wherever_the_decoder_is_given_its_end():
    for length in range(2**16 - 70, 2**16 + 10):
        value = b"\r\n--x" * (length // 5) + b"\r" * (length % 5)
        body = PART.replace(b"1", value) + PART.replace(b'"a"', b'"z"') + b"--b--"
        assert [(each.name, each.value) for each in parse_parts(TYPE, body)] == [("a", value), ("z", b"1")]


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("application/json", b"{}", "the body is no form"),
        ("", b"", "the body is no form"),
        ("multipart/form-data", b"--b--", "names no boundary"),
        ("multipart/form-data; boundary=" + "b" * 71, b"--b--", "names no boundary"),
        (TYPE, b"", "its last boundary is missing"),
        (TYPE, b"--b\r\nno headers\r\n--b--", "a part has no headers"),
        (TYPE, b"--b\r\nContent-Type: x\r\n\r\n1\r\n--b--", "a part has no name"),
        (TYPE, PART.replace(b"name", b"label"), "a part has no name"),
        (TYPE, PART.replace(b"form", b"x" * 4096 + b"form"), "a part has more than 4096 bytes of headers"),
        (TYPE, b"--b\r\n" + b"a:b\r\n" * 20_000, "a part has more than 4096 bytes of headers"),
        (TYPE, PART[:-2], "its last boundary is missing"),
        (
            TYPE,
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 70 + b"--b--",
            "more than 64 parts",
        ),
    ],
)
def test_bodies_that_are_no_forms_are_refused(content_type, body, message):
    with pytest.raises(ApiError, match=message) as refusal:
        parse_parts(content_type, body)
    assert refusal.value.status == 400


def test_a_field_that_is_not_text_is_named():
    (part,) = parse_parts(TYPE, b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\n\xff\r\n--b--')
    with pytest.raises(ApiError, match="n is not UTF-8"):
        part.text()
