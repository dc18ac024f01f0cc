"""What the rest of a batch may change of an image: by rounding alone, and with `reproducible` nothing."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch
from fastapi.testclient import TestClient
from kernels import by_batch, by_slot, rounding_bound, summing
from tiny_dit import make_artifact, write_model
from tiny_engine import CONFIG, make_engine

from harmonica.builtin import CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.evaluation.plots import to_uint8
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers.noise import SampleKeys
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.images_api import create_app
from pipelines.serving.requests import EngineRequest

PATH = "/v1/images/generations"
QUALITIES = pytest.mark.parametrize("quality", ["medium", "high"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return load_model(model), make_artifact(model)


def make_images(loaded, artifact):
    images = ImageSampler(loaded, max_steps=30)
    images.use(images.make_plan(artifact, "7"))
    return images


@pytest.fixture(scope="module")
def builtin():
    return load_model(ModelConfig()), RouterArtifact.load(CHAMPION)


def rows_of(quality, count):
    """Some with a guidance scale of their own where that is free, 1 among them."""
    scales = [None, 1.0, 3.5, 7.25]
    return [
        ImageRequest(i % 10, 11 + i, i, guidance_scale=scales[i % 4] if quality == "high" else None)
        for i in range(count)
    ]


def growth(images, router, row):
    """How many times as large a small change of a row's noise is in its image, and 1 at least: what is
    rounded in one step goes on through the steps after it, weighed by guidance in each."""
    sampler, model = router.sampler, images.model
    if row.guidance_scale is not None:
        sampler = sampler.with_guidance([row.guidance_scale])
    keys = SampleKeys([row.seed], [row.index])
    noise = torch.from_numpy(keys.start_noise((model.in_channels, model.sample_size, model.sample_size)))
    change = 1e-3 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    condition = images.conditions.of([row.subject], [row.negative_prompt])
    first, second = (
        sample(sampler, x, condition, router.plan, reuse=router.reuse, keys=keys)
        for x in (noise, noise + change)
    )
    return max(1.0, float((second - first).abs().max() / change.abs().max()))


def assert_near(images, router, row, first_CHW, second_CHW):
    """Equal up to rounding; and so are the pictures, but where a value is so near to a boundary that rounding
    moves it over."""
    bound = rounding_bound(images.model, router.sampler.num_steps, 1) * growth(images, router, row)
    assert bound < 1 / 255, "less than half a grey level, or this says nothing of pictures"
    assert float((first_CHW - second_CHW).abs().max()) <= bound
    levels = [to_uint8(image[None])[0].astype(int) for image in (first_CHW, second_CHW)]
    distance = abs(levels[0] - levels[1])
    assert distance.max() <= 1
    grey_CHW = (first_CHW.clamp(-1, 1) + 1) * 127.5
    from_boundary_CHW = (grey_CHW - grey_CHW.floor() - 0.5).abs() / 127.5
    assert not distance[(from_boundary_CHW > bound).permute(1, 2, 0).numpy()].any()


@QUALITIES
def test_company_changes_an_image_by_rounding_alone(builtin, quality):
    """The built-in model on this machine's kernels, since its are the shapes that are served."""
    images = make_images(*builtin)
    router, rows = images.plan_for(quality), rows_of(quality, 4)
    alone = [images.generate([row], router)[0] for row in rows]
    for size in (2, 4, 16):
        others = [ImageRequest(3, i, 0) for i in range(size - len(rows))]
        together = images.generate([*rows[:size], *others], router)
        for row, first, second in zip(rows, alone, together):
            assert_near(images, router, row, first, second)


@QUALITIES
@pytest.mark.parametrize("order", [by_batch, by_slot])
def test_company_changes_an_image_by_rounding_alone_whatever_order_kernels_sum_in(tiny, quality, order):
    images = make_images(*tiny)
    router, rows = images.plan_for(quality), rows_of(quality, 4)
    with summing(order):
        alone = [images.generate([row], router)[0] for row in rows]
        together = images.generate(rows, router)
    assert any(not torch.equal(first, second) for first, second in zip(alone, together)), "as on such a CPU"
    for row, first, second in zip(rows, alone, together):
        assert_near(images, router, row, first, second)


def generate_with_previews(images, router, rows, slot):
    """A row's image, and its previews after the first step and the last but one."""
    seen = {}
    drawn = images.generate(rows, router, lambda step, predict: seen.update({step: predict([slot])[0]}))
    return torch.stack([drawn[slot], seen[1], seen[max(seen) - 1]])


def assert_reproducible(images, quality):
    """The same bits alone and in every slot beside rows of other subjects and scales."""
    router, size = images.plan_for(quality), images.fixed_batch_size
    row = rows_of(quality, 2)[1]
    alone = generate_with_previews(images, router, [row], 0)
    for slot in range(size):
        own = router.sampler.config.guidance_scale
        scales = [1.0 + i if quality == "high" else (None, own)[i % 2] for i in range(size)]
        rows = [ImageRequest(i, i, i, guidance_scale=scale) for i, scale in enumerate(scales)]
        rows[slot] = row
        assert torch.equal(generate_with_previews(images, router, rows, slot), alone), slot


@QUALITIES
def test_in_one_shape_company_and_slot_change_no_bit(builtin, quality):
    images = make_images(*builtin)
    assert images.fix_batch_size(3) in (3, 1)
    assert_reproducible(images, quality)


@QUALITIES
def test_in_one_shape_kernels_that_are_picked_by_shape_change_no_bit(tiny, quality):
    images = make_images(*tiny)
    with summing(by_batch):
        assert images.fix_batch_size(4) in (4, 1), "1 where the CPU's own kernels know a row's place"
        assert_reproducible(images, quality)


def test_where_the_slot_matters_each_image_is_drawn_by_itself(tiny):
    images = make_images(*tiny)
    with summing(by_slot):
        assert images.fix_batch_size(4) == images.fixed_batch_size == 1
        assert_reproducible(images, "medium")
        assert make_images(*tiny).fix_batch_size(1) == 1


def test_what_fills_a_batch_up_is_not_answered(tiny):
    images = make_images(*tiny)
    images.fixed_batch_size = 4  # on any CPU
    seen, rows = [], rows_of("medium", 3)
    drawn = images.generate(rows, on_preview=lambda step, predict: seen.append(predict([0, 2])))
    assert len(drawn) == 3 and {len(preview) for preview in seen} == {2}
    plain = make_images(*tiny)
    sampler = plain.champion.sampler
    bound = rounding_bound(plain.model, sampler.num_steps, sampler.config.guidance_scale)
    assert (drawn - plain.generate(rows)).abs().max() < bound


@pytest.mark.parametrize(
    ("order", "use_gpu", "rows_at_once"), [(by_batch, True, 4), (by_slot, True, 1), (by_slot, False, 1)]
)
def test_a_reproducible_endpoint_answers_the_same_file_alone_and_in_company(
    tiny, order, use_gpu, rows_at_once
):
    """`use_gpu` says how trajectories are shaped; the model itself is on the CPU here."""
    config = replace(CONFIG, reproducible=True, use_gpu=use_gpu, max_batch_size=4, batch_wait_s=0.2)
    engine = make_engine(*tiny, config=config)
    asked = {"prompt": "Bag", "seed": 5, "quality": "high", "guidance_scale": 1.0}
    with summing(order):
        asyncio.run(engine.fix_batch_size())
        at_once = engine.batcher.max_batch_size
        assert at_once in (rows_at_once, 1), "1 where the CPU's own kernels know a row's place"
        with TestClient(create_app(engine)) as client:
            alone = client.post(PATH, json=asked).json()
            together = client.post(PATH, json=asked | {"n": 3}).json()
            stream = client.post(PATH, json=asked | {"n": 3, "stream": True, "partial_images": 1}).text
            preview = client.post(PATH, json=asked | {"stream": True, "partial_images": 1}).text
    assert (alone["batch_size"], together["batch_size"]) == (1, min(3, at_once))
    picture = alone["data"][0]["b64_json"]
    assert together["data"][0]["b64_json"] == picture and picture in stream and picture in preview
    shown = json.loads(preview.split("\n")[1].removeprefix("data: "))
    assert shown["type"] == "image_generation.partial_image" and shown["b64_json"] in stream


def test_a_router_is_warmed_up_in_the_shape_that_is_drawn(tiny, monkeypatch):
    engine = make_engine(*tiny, config=replace(CONFIG, reproducible=True, use_gpu=True, max_batch_size=4))
    sizes = []
    monkeypatch.setattr(engine.images, "warm_up", lambda _, size: sizes.append(size))
    with summing(by_batch):
        asyncio.run(engine.fix_batch_size())
        asyncio.run(engine.warm_up(engine.images.champion))
    assert sizes == [engine.batcher.max_batch_size]


def test_without_it_nothing_is_fixed(tiny):
    engine = make_engine(*tiny)
    asyncio.run(engine.fix_batch_size())
    assert engine.batcher.max_batch_size == CONFIG.max_batch_size and engine.images.fixed_batch_size == 0
    assert asyncio.run(engine.generate(EngineRequest(ImageRequest(1, 1, 0)))).batch_size == 1
