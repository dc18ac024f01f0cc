"""A plan over several calls of one pipeline: other sizes, interrupted ones, and two at once."""

import copy
import logging
import pickle
import threading

import pytest
import tiny_pixart
import tiny_sana
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tiny_attached import STEPS, Case, apart, config, make_case, planned_sana
from tiny_pipeline import LINEAR
from torch import Tensor

import harmonica
from harmonica.core.sampling import sample
from harmonica.samplers import make_sampler

ENDED = "the pipeline ended after {} of the router's 4 steps: it was interrupted, or was given fewer"
SECOND = r"a second call came while one runs \(in thread \w+\): a pipeline with a plan does one at a time"


@pytest.fixture
def planned(pixart) -> Case:
    harmonica.apply(pixart.transformer, pixart.artifact(reuse="forecast"))
    return pixart


def call(pipe, noise: Tensor, condition, **changes):
    """Latents by a PixArt's pipeline, of any size."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | changes
    given = {
        "negative_prompt": None,
        "prompt_embeds": condition.embeddings,
        "prompt_attention_mask": condition.mask.long(),
        "negative_prompt_embeds": condition.negative_embeddings,
        "negative_prompt_attention_mask": condition.negative_mask.long(),
        "latents": noise,
        "height": 2 * noise.shape[2],
        "width": 2 * noise.shape[3],
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return pipe(**given | settings).images


# Calls that differ


@pytest.mark.parametrize("kind", ["sigma", "alpha 1024"])
def test_sizes_batches_and_guidance_may_change_from_call_to_call(kind, tmp_path):
    """Each is what our sampler makes of it, and so has nothing of the calls before."""
    case = make_case(kind, tmp_path)
    artifact = case.artifact(reuse="forecast")
    harmonica.apply(case.transformer, artifact)
    for n, tall, guidance_scale in ((2, False, 3.0), (1, True, 3.0), (3, True, 1.0), (2, False, 1.0)):
        noise, condition = tiny_pixart.make_batch(kind, n, tall=tall, seed=n)
        found = call(case.pipe, noise, condition, guidance_scale=guidance_scale)
        sampler = make_sampler(case.model, config(guidance_scale=guidance_scale))
        wanted = sample(sampler, noise, condition, artifact.plan, reuse="forecast")
        assert apart(found, wanted) < 1e-5


def test_several_images_a_prompt(pixart):
    artifact = pixart.artifact()
    harmonica.apply(pixart.transformer, artifact)
    noise, _ = tiny_pixart.make_batch("sigma", 4)
    _, condition = tiny_pixart.make_batch("sigma", 2)
    found = call(pixart.pipe, noise, condition, num_images_per_prompt=2)
    rows = [call(pixart.pipe, noise[i : i + 1], condition[i // 2 : i // 2 + 1]) for i in range(4)]
    assert apart(found, torch.cat(rows)) < 1e-12


@pytest.mark.parametrize("is_binned", [False, True])
def test_pictures_that_are_not_square(is_binned, tmp_path):
    """A plan that computes everything changes nothing; one that reuses does."""
    case = make_case("alpha 1024", tmp_path)
    _, condition = tiny_pixart.make_batch("alpha 1024", 1)

    def draw() -> Tensor:
        settings = {"height": 256, "width": 1024, "use_resolution_binning": is_binned}
        generator = torch.Generator().manual_seed(5)
        return call(case.pipe, case.noise, condition, latents=None, generator=generator, **settings)

    plain, artifact = draw(), case.artifact()
    # The VAE has two pixels a latent, and 512 by 2048 is the only public size of that shape.
    assert plain.shape == ((1, 4, 256, 1024) if is_binned else (1, 4, 128, 512))
    harmonica.apply(case.transformer, artifact)
    reused = draw()
    harmonica.remove(case.transformer)
    artifact.logits_TB.fill_(9.0)
    harmonica.apply(case.transformer, artifact)
    assert apart(draw(), plain) < 1e-6 < apart(reused, plain)


def test_another_precision_after_apply(planned):
    wanted = planned.run()
    planned.pipe.to(torch.float32)
    found = planned.run()
    # Of float32, 1.2e-7 an operation: some hundred in a row in three blocks and four steps.
    assert apart(found.double(), wanted) < 1e-4


def test_fewer_steps_than_the_routers_are_refused(pixart, caplog):
    harmonica.apply(pixart.transformer, pixart.artifact(), allow_other_sampler=True)
    pixart.pipe.scheduler = DDIMScheduler(clip_sample=False, **LINEAR)
    wanted = pixart.run()
    with pytest.raises(ValueError, match=r"ended after 3 of the router's 4 steps: give it num_inference_s"):
        pixart.run(num_inference_steps=STEPS - 1)
    assert torch.equal(pixart.run(), wanted) and not caplog.records


def test_a_call_of_the_transformer_by_itself_is_told_to_remove_first(planned):
    with pytest.raises(ValueError, match=r"timestep is 500 in call 1 .*by itself, harmonica.remove first"):
        planned.call(500)
    harmonica.remove(planned.transformer)
    assert planned.call(500).isfinite().all()


def test_removed_twice_raises(planned):
    harmonica.remove(planned.transformer)
    with pytest.raises(ValueError, match="transformer has no plan"):
        harmonica.remove(planned.transformer)


# Interrupted calls


@pytest.mark.parametrize("is_counted", [False, True])
@pytest.mark.parametrize("steps", [1, STEPS - 1])
def test_an_interrupted_call_gives_its_image_and_is_forgotten(is_counted, steps, caplog):
    pipe = planned_sana(allow_other_sampler=is_counted)
    (noise, condition), seen = tiny_sana.make_batch("1.5"), []

    def interrupt(pipe, i, timestep, values):
        seen.append(values["latents"])
        pipe._interrupt = i == steps - 1
        return {}

    def draw(**more) -> Tensor:
        size = {"height": 32 * noise.shape[2], "width": 32 * noise.shape[3]}
        return call(pipe, noise, condition, **size, **more)

    wanted = draw()
    with caplog.at_level(logging.WARNING):
        found = draw(callback_on_step_end=interrupt)
        assert len(seen) == steps and torch.equal(found, seen[-1]) and not torch.equal(found, wanted)
        assert [record.getMessage().startswith(ENDED.format(steps)) for record in caplog.records] == [True]
        caplog.clear()
        assert torch.equal(draw(), wanted)
    assert not caplog.records


@pytest.mark.parametrize("is_counted", [False, True])
def test_after_an_error_another_thread_may_call(pixart, is_counted):
    """The thread of the broken call lives on, as a server's does."""
    harmonica.apply(pixart.transformer, pixart.artifact(), allow_other_sampler=is_counted)
    wanted = pixart.run()
    found, broken, done = [], threading.Event(), threading.Event()

    def breaks() -> None:
        with pytest.raises(ZeroDivisionError):
            pixart.run(callback=lambda i, *_: 1 / (i - 1))
        broken.set()
        done.wait(60)

    thread = threading.Thread(target=breaks)
    thread.start()
    assert broken.wait(60)
    try:
        found.append(pixart.run())
    finally:
        done.set()
        thread.join()
    assert torch.equal(found[0], wanted)
    assert "set_timesteps" not in vars(pixart.pipe.scheduler)


# Two at once


def during(case: Case, other, *, thread: bool) -> tuple[Tensor, list]:
    """Latents of a call, and what came of `other`, which is called after its second step."""
    outcomes: list = []

    def attempt() -> None:
        try:
            outcomes.append(other())
        except ValueError as error:
            outcomes.append(error)

    def between(i: int, *_) -> None:
        if i == 1 and thread:
            second = threading.Thread(target=attempt)
            second.start()
            second.join(60)
        elif i == 1:
            attempt()

    return case.run(callback=between), outcomes


@pytest.mark.parametrize("is_counted", [False, True])
@pytest.mark.parametrize("thread", [True, False])
def test_a_second_call_while_one_runs_is_refused_and_disturbs_nothing(pixart, thread, is_counted):
    """In another thread, or in the callback of the first."""
    harmonica.apply(pixart.transformer, pixart.artifact(reuse="forecast"), allow_other_sampler=is_counted)
    wanted = pixart.run()
    found, (error,) = during(pixart, lambda: pixart.run(seed=9), thread=thread)
    with pytest.raises(ValueError, match=SECOND):
        raise error
    assert torch.equal(found, wanted), "its scheduler has several steps, and lost none"
    assert torch.equal(pixart.run(), wanted)
    assert "set_timesteps" not in vars(pixart.pipe.scheduler)


def test_two_pipelines_of_one_transformer_are_one_call_at_a_time_too(planned):
    twin = type(planned.pipe)(
        **planned.pipe.components | {"scheduler": copy.deepcopy(planned.pipe.scheduler)}
    )
    twin.set_progress_bar_config(disable=True)
    noise, condition = tiny_pixart.make_batch("sigma", 2)
    wanted = planned.run()
    found, (error,) = during(planned, lambda: call(twin, noise, condition), thread=True)
    with pytest.raises(ValueError, match=SECOND):
        raise error
    assert torch.equal(found, wanted) and torch.equal(call(twin, noise, condition), wanted)


def test_a_copy_of_the_pipeline_follows_the_plan_beside_it(planned):
    noise, condition = tiny_pixart.make_batch("sigma", 2, seed=9)
    wanted = planned.run(), planned.run(seed=9)
    found, (other,) = during(
        planned, lambda: call(copy.deepcopy(planned.pipe), noise, condition), thread=True
    )
    assert torch.equal(found, wanted[0]) and torch.equal(other, wanted[1])


def test_no_step_takes_the_values_of_another_threads(planned):
    """Loops of one's own: the later one goes on, the earlier one is told."""
    times = make_sampler(planned.model, config()).timesteps
    planned.call(times[-1])
    errors: list = []

    def other() -> None:
        try:
            planned.call(times[-2])
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(60)
    with pytest.raises(ValueError, match="a second call came while one runs"):
        raise errors[0]
    for i in reversed(range(STEPS - 1)):
        assert planned.call(times[i]).isfinite().all()


# Copies in other forms


@pytest.mark.parametrize("kind", ["dit", "sigma"])
@pytest.mark.parametrize("through", ["pickle", "torch.save"])
def test_pickles_follow_a_plan_of_their_own(kind, through, tmp_path):
    case = make_case(kind, tmp_path)
    plain = case.run()
    harmonica.apply(case.transformer, case.artifact())
    wanted = case.run()
    case.call(999)  # a trajectory that is not theirs
    if through == "pickle":
        twin = pickle.loads(pickle.dumps(case.transformer))
    else:
        torch.save(case.transformer, tmp_path / "transformer.pt")
        twin = torch.load(tmp_path / "transformer.pt", weights_only=False)
    for parameter in case.transformer.parameters():
        parameter.data.zero_()
    case.pipe.transformer = twin
    assert torch.equal(case.run(), wanted)
    harmonica.remove(twin)
    assert torch.equal(case.run(), plain)
