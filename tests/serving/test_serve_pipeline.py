"""A diffusers pipeline on Ray Serve: one real deployment, asked by OpenAI's own client."""

import base64
import io
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import tiny_served_pipeline as tiny
from PIL import Image

from harmonica.models.loading import ModelConfig
from pipelines.config.serve import ServeConfig
from pipelines.serving import lifecycle


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """FLUX Kontext, and a router that was trained for its transformer."""
    folder = tmp_path_factory.mktemp("serve")
    tiny.train_router(tiny.write_flux(folder / "flux")).save(folder / "router")
    tiny.write_flux(folder / "kontext", kontext=True)
    return folder


@pytest.fixture(scope="module")
def client(folders, private_cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        # The long wait is for this machine: requests that come together must meet however busy it is.
        config = ServeConfig(port=free_port(), batch_wait_s=0.3, max_pixels=2**15)
        model = ModelConfig(path=str(folders / "kontext"))
        router = str(folders / "router")
        url = lifecycle.deploy(config, model, registered_model="tiny", router=router)
        with openai.OpenAI(api_key="unused", base_url=f"{url}/v1", max_retries=0) as client:
            yield client
        lifecycle.shutdown()


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json)))).astype(int)


def same(first, second):
    """Kernels may sum in another order for another batch size, which can tip a rounded grey level."""
    return first.shape == second.shape and np.abs(first - second).max() <= 1


@pytest.mark.cluster
def test_requests_of_one_size_share_a_batch_and_a_seed_keeps_its_image(client):
    def ask(seed, size="auto"):
        return client.images.generate(prompt="a red cat", size=size, extra_body={"seed": seed})

    alone = ask(3)
    assert (alone.router_version, alone.size, alone.batch_size) == ("router", "128x64", 1)
    assert pixels(alone.data[0]).shape == (64, 128, 3)
    sizes = ["auto"] * 4 + ["64x64"] * 4
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8), sizes))
    assert max(answer.batch_size for answer in answers) in (2, 3, 4), "two sizes never share"
    assert same(pixels(answers[3].data[0]), pixels(alone.data[0]))
    assert [answer.size for answer in answers] == ["128x64"] * 4 + ["64x64"] * 4


@pytest.mark.cluster
def test_steps_and_guidance_are_free_with_high(client):
    free = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 2.0}
    answer = client.images.generate(prompt="a red cat", quality="high", extra_body=free)
    assert (answer.router_version, answer.num_inference_steps, answer.guidance_scale) == ("uncached", 6, 2.0)
    with pytest.raises(openai.BadRequestError, match="router router of quality medium was made for 4"):
        client.images.generate(prompt="a red cat", extra_body={"num_inference_steps": 6})
    with pytest.raises(openai.BadRequestError, match="give multiples of 64") as refusal:
        client.images.generate(prompt="a red cat", size="100x64")
    assert refusal.value.param == "size"


@pytest.mark.cluster
def test_previews_are_streamed(client):
    asked = {"prompt": "a red cat", "extra_body": {"seed": 3}}
    events = list(client.images.generate(**asked, stream=True, partial_images=2))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"]
    assert [event.size for event in events] == ["128x64"] * 3
    assert same(pixels(events[-1]), pixels(client.images.generate(**asked).data[0]))
    assert not same(pixels(events[0]), pixels(events[-1]))


@pytest.mark.cluster
def test_a_picture_is_edited(client):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 128)).convert("RGB").save(file, "PNG")
    asked = {"image": ("in.png", file.getvalue()), "prompt": "a red cat", "extra_body": {"seed": 3}}
    answer = client.images.edit(**asked, n=2)
    assert (answer.size, len(answer.data), answer.router_version) == ("64x128", 2, "router")
    assert same(pixels(client.images.edit(**asked).data[0]), pixels(answer.data[0]))
    with pytest.raises(openai.BadRequestError, match="image cannot be decoded"):
        client.images.edit(image=b"no picture", prompt="a red cat")


@pytest.mark.cluster
def test_a_pipeline_of_another_class_is_refused_at_start(client, folders):
    """The last test on the deployment, since it breaks it."""
    (folders / "video").mkdir()
    (folders / "video/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(RuntimeError, match="a WanPipeline, which generates videos"):
        lifecycle.deploy(
            ServeConfig(port=free_port()),
            ModelConfig(path=str(folders / "video")),
            registered_model="tiny",
            router="uncached",
        )
