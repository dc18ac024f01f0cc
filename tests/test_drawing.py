"""Rows that share trajectories: who waits for whom, and that company does not change an image."""

import asyncio
import dataclasses
import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dit import SHAPE, make_artifact, write_model

from harmonica.models.loading import load_model
from pipelines.drawing import Batcher, ImageSampler, Row


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than free cores make a model this small slower by a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampler(model):
    images = ImageSampler(load_model(model))
    images.use(make_artifact(model), "7")
    return images


def pixels(drawing):
    return np.asarray(Image.open(io.BytesIO(drawing.png))).astype(int)


def test_an_image_depends_on_its_row_alone(sampler):
    row = Row(3, 11, 1)
    (alone,) = sampler.draw([row])
    company = sampler.draw([Row(0, 5, 0), Row(9, 11, 1), row, Row(3, 11, 0)])
    assert (alone.batch_size, company[2].batch_size) == (1, 4)
    # Kernels may sum in another order for another batch size, which can tip a rounded grey level.
    assert np.abs(pixels(alone) - pixels(company[2])).max() <= 1
    for other in (company[1], company[3]):  # another label, another index
        assert np.abs(pixels(alone) - pixels(other)).max() > 1


def test_the_router_is_the_one_in_use(model, sampler):
    rows = [Row(1, 1, 0)]
    images = ImageSampler(load_model(model))
    images.use(make_artifact(model, seed=1), "1")
    first = images.draw(rows)[0]
    images.use(make_artifact(model, seed=2), "2")
    second = images.draw(rows)[0]
    assert (first.router_version, second.router_version) == ("1", "2")
    assert first.png != second.png
    assert second.cur == make_artifact(model, seed=2).plan.cur


def test_a_router_of_another_model_is_refused(tmp_path, sampler):
    other = write_model(tmp_path, shape=dataclasses.replace(SHAPE, num_layers=2))
    with pytest.raises(ValueError, match=r"model.num_layers is 3 and the router was made for 2"):
        sampler.use(make_artifact(other), "8")
    assert sampler.version == "7"


def test_a_latent_model_is_refused(tmp_path):
    latent = write_model(tmp_path, shape=dataclasses.replace(SHAPE, in_channels=4, out_channels=8))
    with pytest.raises(ValueError, match=r"model.in_channels is 4: .*pixel"):
        ImageSampler(load_model(latent))


def submit(batcher, rows):
    return [asyncio.create_task(batcher.submit(row)) for row in rows]


def test_rows_share_trajectories_up_to_the_limit(sampler):
    async def scenario():
        batcher = Batcher(sampler.draw, max_batch_size=4, wait_s=0.2)
        return await asyncio.gather(*submit(batcher, [Row(i, 1, i) for i in range(6)]))

    drawings = asyncio.run(scenario())
    assert [drawing.batch_size for drawing in drawings] == [4, 4, 4, 4, 2, 2]
    for i, drawing in enumerate(drawings):
        assert np.abs(pixels(drawing) - pixels(sampler.draw([Row(i, 1, i)])[0])).max() <= 1


def test_what_arrives_during_a_trajectory_shares_the_next(sampler):
    """However long apart: `@serve.batch` would make one trajectory of each."""
    release = threading.Event()

    def draw(rows):
        release.wait(30)
        return sampler.draw(rows)

    async def scenario():
        batcher = Batcher(draw, max_batch_size=8, wait_s=0.01)
        tasks = submit(batcher, [Row(0, 1, 0)])
        await asyncio.sleep(0.1)
        for i in range(1, 4):
            tasks += submit(batcher, [Row(i, 1, 0)])
            await asyncio.sleep(0.05)
        release.set()
        return await asyncio.gather(*tasks)

    assert [drawing.batch_size for drawing in asyncio.run(scenario())] == [1, 3, 3, 3]


def test_a_lone_row_waits_no_longer_than_told(sampler):
    async def scenario():
        batcher = Batcher(sampler.draw, max_batch_size=8, wait_s=0.3)
        started = time.perf_counter()
        drawing = await batcher.submit(Row(0, 1, 0))
        return time.perf_counter() - started - drawing.seconds

    assert 0.25 < asyncio.run(scenario()) < 2


def test_cancelled_rows_are_not_drawn(sampler):
    drawn = []

    def draw(rows):
        drawn.extend(rows)
        return sampler.draw(rows)

    async def scenario():
        batcher = Batcher(draw, max_batch_size=8, wait_s=0.1)
        gone, kept = submit(batcher, [Row(0, 1, 0), Row(1, 1, 0)])
        await asyncio.sleep(0)
        gone.cancel()
        await kept
        only = asyncio.create_task(batcher.submit(Row(2, 1, 0)))
        await asyncio.sleep(0)
        only.cancel()
        await asyncio.sleep(0.2)
        return await batcher.submit(Row(3, 1, 0))

    assert asyncio.run(scenario()).batch_size == 1
    assert drawn == [Row(1, 1, 0), Row(3, 1, 0)]


def test_a_failing_trajectory_fails_its_rows_and_no_others(sampler):
    def draw(rows):
        if rows[0].label == 0:
            raise RuntimeError("out of memory")
        return sampler.draw(rows)

    async def scenario():
        batcher = Batcher(draw, max_batch_size=2, wait_s=0.05)
        return await asyncio.gather(
            *submit(batcher, [Row(i, 1, 0) for i in (0, 1, 2)]), return_exceptions=True
        )

    first, second, third = asyncio.run(scenario())
    assert isinstance(first, RuntimeError) and isinstance(second, RuntimeError)
    assert third.batch_size == 1
