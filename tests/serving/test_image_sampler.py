"""Rows that share trajectories: who waits for whom, and that batching does not change an image."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from tiny_dit import SHAPE, make_artifact, write_model
from tiny_pipeline import write_pipeline
from tolerances import NOISIEST, PASS, close

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan_builders import even_plan, with_fixed_correction
from harmonica.core.sampling import sample
from harmonica.evaluation.plots import to_uint8
from harmonica.execution.graphs import sizes_up_to
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler, with_scheduler
from harmonica.samplers.noise import SampleKeys
from pipelines.serving.image_request import ImageRequest, SettingRejected
from pipelines.serving.image_sampler import ImageSampler


@pytest.fixture(scope="module")
def sampler(model):
    images = ImageSampler(load_model(model), max_steps=30)
    use(images, make_artifact(model), "7")
    return images


def use(images, artifact, version):
    images.use(images.make_plan(artifact, version))


def far(first, second):
    """Kernels may sum in another order for another batch size, which can tip a rounded grey level."""
    return int((pixels(first) - pixels(second)).abs().max()) > 1


def pixels(image_CHW):
    return torch.from_numpy(to_uint8(image_CHW[None])[0]).int()


def test_an_image_depends_on_its_row_alone(sampler):
    row = ImageRequest(3, 11, 1)
    (alone,) = sampler.generate([row])
    together = sampler.generate([ImageRequest(0, 5, 0), ImageRequest(9, 11, 1), row, ImageRequest(3, 11, 0)])
    assert not far(alone, together[2])
    for other in (together[1], together[3]):  # another label, another index
        assert far(alone, other)


def test_the_router_is_the_one_in_use(model, sampler):
    rows = [ImageRequest(1, 1, 0)]
    images = ImageSampler(load_model(model))
    use(images, make_artifact(model, seed=1), "1")
    before = images.champion
    first = images.generate(rows)[0]
    use(images, make_artifact(model, seed=2), "2")
    second = images.generate(rows)[0]
    assert images.version == "2" and images.champion.plan == make_artifact(model, seed=2).plan
    assert far(first, second)
    assert not far(images.generate(rows, before)[0], first), "who was checked against it is drawn under it"


def test_qualities_are_the_champion_the_fastest_and_no_router(model):
    images = ImageSampler(load_model(model), max_steps=30)
    champion, fastest = (images.make_plan(make_artifact(model, seed=seed), str(seed)) for seed in (1, 2))
    images.use(champion)
    assert images.plan_for("medium") is images.plan_for("low") is champion
    images.use(champion, fastest)
    assert (images.plan_for("medium"), images.plan_for("low")) == (champion, fastest)
    high = images.plan_for("high")
    assert (high.version, high.plan.cur, high.sampler.config) == ("uncached", 0, champion.sampler.config)
    rows = [ImageRequest(1, 1, 0)]
    full = sample(champion.sampler, *start(images, rows))
    torch.testing.assert_close(images.generate(rows, high), full)
    assert far(images.generate(rows, champion)[0], full[0])


def start(images, rows):
    """What `sample` takes: noise and labels."""
    keys = SampleKeys([row.seed for row in rows], [row.index for row in rows])
    noise = torch.from_numpy(keys.start_noise((1, 28, 28)))
    return noise, images.conditions.of([row.subject for row in rows], ["" for _ in rows])


def test_only_high_leaves_a_choice_of_steps_and_guidance(sampler):
    for quality in ("low", "medium"):
        assert sampler.plan_for(quality, 8, 2.0) is sampler.champion
        for settings, words in (
            ((9, None), "num_inference_steps is 9 and router 7 of quality .* made for 8: .* quality high"),
            ((None, 3.0), "guidance_scale is 3.0 and router 7 of quality .* was made for 2.0"),
        ):
            with pytest.raises(SettingRejected, match=words):
                sampler.plan_for(quality, *settings)
    other = sampler.plan_for("high", 12, 3.0)
    assert other.sampler.num_steps == 12
    assert sampler.plan_for("high", 12, 4.0) is other, "such rows share trajectories"
    assert len(sampler.generate([ImageRequest(1, 1, 0)], other)) == 1
    for settings, words in (
        ((31, None), "^num_inference_steps is 31: give 2 to 30"),
        ((1, None), "^num_inference_steps is 1: give 2"),
        ((None, 51.0), "^guidance_scale is 51.0: give 1 to 50"),
    ):
        with pytest.raises(SettingRejected, match=words):
            sampler.plan_for("high", *settings)
    for steps in range(2, 31):
        sampler.plan_for("high", steps)
    assert len(sampler._uncached) <= 16


def test_even_steps_need_no_router_and_leave_steps_and_guidance_free(model):
    images = ImageSampler(load_model(model), max_steps=30)
    own, macs = SamplerConfig(num_inference_steps=8, guidance_scale=2.0), images.model.macs()
    images.use(images.make_even(own, EvenSteps(speedup=1.5), "even-1.5x"))
    rows = [ImageRequest(1, 1, 0, guidance_scale=3.0)]
    for steps in (8, 12):
        served = images.plan_for("medium", steps, 3.0)
        assert images.plan_for("low", steps, 4.0) is served
        expected = with_fixed_correction(even_plan(steps, macs, 1.5))
        assert served.plan == expected and served.ideal_speedup == expected.ideal_speedup(macs) > 1.3
        sampler = make_sampler(images.model, replace(own, num_inference_steps=steps, guidance_scale=3.0))
        drawn = sample(sampler, *start(images, rows), expected, reuse="forecast")
        torch.testing.assert_close(images.generate(rows, served), drawn)
        assert images.plan_for("high", steps).plan.cur == 0
        assert far(images.generate(rows, images.plan_for("high", steps))[0], drawn[0])
    assert images.plan_for("medium", 2).plan.num_steps == 2, "as fast as two steps can be"
    with pytest.raises(SettingRejected, match=r"^num_inference_steps is 31: give 2 to 30"):
        images.plan_for("medium", 31)
    for steps in range(2, 31):
        images.plan_for("medium", steps)
    assert len(images._even) <= 16


def test_previews_show_the_rows_asked_for(sampler):
    rows, seen = [ImageRequest(3, 11, 0), ImageRequest(4, 11, 1)], {}
    images = sampler.generate(rows, on_preview=lambda step, predict: seen.update({step: predict([1])}))
    assert list(seen) == list(range(1, 9))
    assert all(preview.shape == (1, 1, 28, 28) for preview in seen.values())
    distances = [float((preview[0] - images[1]).norm()) for preview in seen.values()]
    assert distances[-1] < distances[3] < distances[0]
    assert float((seen[8][0] - images[0]).norm()) > distances[-1]


def test_a_router_of_another_model_is_refused(tmp_path, sampler):
    other = write_model(tmp_path, shape=dataclasses.replace(SHAPE, num_layers=2))
    with pytest.raises(ValueError, match=r"model.num_layers is 3 and the router was made for 2"):
        use(sampler, make_artifact(other), "8")
    assert sampler.version == "7"


def test_latents_without_a_decoder_are_refused(tmp_path):
    latent = write_model(tmp_path, shape=dataclasses.replace(SHAPE, in_channels=4, out_channels=8))
    with pytest.raises(
        ValueError, match=r"model.vae is '' and .* of 4 channels, and comes without a decoder: give one"
    ):
        ImageSampler(load_model(latent))


@pytest.mark.parametrize("name", ["diffusers", "iddpm", "dpm-solver++", "sa-solver"])
def test_every_sampler_draws_the_pictures_of_a_latent_model(tmp_path, name):
    loaded = load_model(ModelConfig(path=str(write_pipeline(tmp_path))))
    config = SamplerConfig(name=name, num_inference_steps=5, guidance_scale=4.0, clip_sample=False)
    denoiser = make_sampler(loaded.model, with_scheduler(config, loaded.scheduler))
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    images = ImageSampler(loaded)
    use(images, RouterArtifact.build(logits, denoiser, threshold=0.5, reuse="forecast", training={}), "1")
    row = ImageRequest(1, 5, 2)
    (alone,), together = images.generate([row]), images.generate([ImageRequest(1, 6, 2), row])
    assert images.image_size == 16 and alone.shape == (3, 16, 16)
    assert not far(alone, together[1]) and far(alone, together[0])
    previews = []
    images.generate([row], on_preview=lambda step, predict: previews.append(predict([0])))
    assert len(previews) == 5 and previews[2].shape == (1, 3, 16, 16)


def test_guidance_that_is_asked_for_and_the_router_s_own_are_one(sampler):
    row, router = ImageRequest(3, 11, 1), sampler.plan_for("high")
    (alone,) = sampler.generate([row], router)
    assert torch.equal(alone, sampler.generate([replace(row, guidance_scale=2.0)], router)[0])
    assert far(alone, sampler.generate([replace(row, guidance_scale=2.5)], router)[0])


def test_a_row_s_own_guidance_is_that_of_a_sampler_of_its_scale(sampler):
    router = sampler.plan_for("high")
    rows = [ImageRequest(3, 11, 1, guidance_scale=scale) for scale in (1.0, 3.5, 2.0)]
    near = close(torch.float32, 8 * 2 * PASS, amplification=NOISIEST, is_random=True)
    for row, drawn in zip(rows, sampler.generate(rows, router)):
        config = dataclasses.replace(router.sampler.config, guidance_scale=row.guidance_scale)
        expected = sample(make_sampler(sampler.model, config), *start(sampler, [row]))[0]
        torch.testing.assert_close(drawn, expected, **near)


@pytest.mark.parametrize("execution", ["compiled", "graphed"])
def test_a_replica_at_another_level_of_execution_serves_the_same_pictures(
    execution, model, no_codegen, host_recorder
):
    artifact = make_artifact(model)
    plain = ImageSampler(load_model(model))
    other = ImageSampler(load_model(replace(model, execution=execution)))
    for images in (plain, other):
        use(images, artifact, "1")
    for size in sizes_up_to(3):
        other.warm_up(other.champion, size)
    recorded = other.model.graphs
    assert (recorded and len(recorded)) == (3 if execution == "graphed" else None), "of 1, 2 and 4 rows"
    for size in (1, 2, 3):
        requests = [ImageRequest(i, 7, i) for i in range(size)]
        for ours, wanted in zip(other.generate(requests), plain.generate(requests)):
            assert not far(ours, wanted)
    assert not recorded or len(recorded) == 3, "nothing is recorded once it is warm"


def test_warming_up_costs_nothing_where_branches_run_eagerly(model, sampler, monkeypatch):
    monkeypatch.setattr(sampler, "generate", None)
    sampler.warm_up(sampler.champion, 2)
