"""What diffusers asks of caches, of a plan: put on and taken off, broken off, copied, saved, counted."""

import copy
import logging
import weakref

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from tiny_attached import KINDS, STEPS, Case, apart, config, make_case
from tiny_pipeline import LINEAR
from tolerances import of_trajectory

import harmonica
from harmonica.core.cache import BranchCache
from harmonica.integrations.step_tracker import StepCounter
from harmonica.samplers import make_sampler
from tests.integrations.test_attach import DDIM


@pytest.fixture(params=KINDS)
def case(request, tmp_path) -> Case:
    return make_case(request.param, tmp_path)


# The contract


def test_applied_twice_raises(case):
    harmonica.apply(case.transformer, case.artifact())
    with pytest.raises(ValueError, match=r"has a plan already: harmonica.remove\(transformer\) first"):
        harmonica.apply(case.transformer, case.artifact(seed=1))


def test_removal_restores_everything(case):
    before, attributes, weights = case.run(), dict(vars(case.transformer)), case.transformer.state_dict()
    with pytest.raises(ValueError, match=r"transformer has no plan: harmonica.apply puts one on"):
        harmonica.remove(case.transformer)
    harmonica.apply(case.transformer, case.artifact())
    assert not torch.equal(case.run(), before)
    harmonica.remove(case.transformer)
    assert torch.equal(case.run(), before)
    assert vars(case.transformer) == attributes
    assert all(torch.equal(weights[name], value) for name, value in case.transformer.state_dict().items())
    harmonica.apply(case.transformer, case.artifact())
    harmonica.remove(case.transformer)


def test_two_pictures_in_a_row_share_nothing(case):
    wanted = []
    for seed in (1, 2):
        harmonica.apply(case.transformer, case.artifact(reuse="forecast"))
        wanted.append(case.run(seed=seed))
        harmonica.remove(case.transformer)
    harmonica.apply(case.transformer, case.artifact(reuse="forecast"))
    assert all(torch.equal(case.run(seed=seed), latents) for seed, latents in zip((1, 2), wanted))


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1, 2 * STEPS])
def test_another_number_of_steps_is_refused_and_forgotten(case, steps):
    harmonica.apply(case.transformer, case.artifact())
    wanted = case.run()
    with pytest.raises(ValueError, match=r"in call 2 .* num_inference_steps 4 and the scheduler dpm-solver"):
        case.run(num_inference_steps=steps)
    assert torch.equal(case.run(), wanted)


def test_another_scheduler_is_refused(case):
    harmonica.apply(case.transformer, case.artifact())
    case.pipe.scheduler = DDIMScheduler(clip_sample=False, **LINEAR)  # begins at 750
    with pytest.raises(ValueError, match=r"timestep is 750 in call 1 .* made for 999: give .* dpm-solver"):
        case.run()


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("calls", [1, 2, STEPS - 1])
def test_a_trajectory_that_broke_off_leaves_nothing_behind(case, calls, counting, monkeypatch):
    harmonica.apply(case.transformer, case.artifact(reuse="forecast"), allow_other_sampler=counting)
    wanted, step, count = case.run(), case.pipe.scheduler.step, iter(range(STEPS))

    def breaking(*args, **kwargs):
        if next(count) == calls - 1:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(case.pipe.scheduler, "step", breaking)
        with pytest.raises(KeyboardInterrupt):
            case.run(seed=7)
    assert torch.equal(case.run(), wanted)


def test_an_error_inside_a_step_leaves_nothing_behind(case):
    harmonica.apply(case.transformer, case.artifact(reuse="forecast"), allow_other_sampler=True)
    wanted = case.run()
    case.call(999)
    layer = case.transformer.transformer_blocks[1].attn1
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.call(999)
    handle.remove()
    assert torch.equal(case.run(), wanted)


def test_a_batch_stays_as_it_is_within_a_trajectory(case):
    harmonica.apply(case.transformer, case.artifact())
    wanted, times = case.run(), make_sampler(case.model, config()).timesteps
    case.call(times[-1])
    with pytest.raises(ValueError, match=r"hidden_states has shape \(1, 4, .* began with \(2, 4, "):
        case.call(times[-2], n=1)
    assert case.call(times[-1], n=1).shape[0] == 1
    assert torch.equal(case.run(), wanted)


def test_rows_at_different_timesteps_are_refused(dit):
    harmonica.apply(dit.transformer, dit.artifact())
    with pytest.raises(
        ValueError, match=r"timestep is \[749, 999\]: a plan has one step for the whole batch"
    ):
        dit.transformer(dit.noise, timestep=torch.tensor([999, 749]), class_labels=dit.condition)


def test_what_was_kept_is_let_go_of(case, monkeypatch, caplog):
    """The cache, and of a PixArt the prompts with their keys."""
    caches = weakref.WeakSet()

    class Watched(BranchCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.add(self)

    monkeypatch.setattr("harmonica.integrations.planned_forward.BranchCache", Watched)
    harmonica.apply(case.transformer, case.artifact())
    times, projected = make_sampler(case.model, config()).timesteps, []
    if "encoder_hidden_states" in case.one_call:
        attention = case.transformer.transformer_blocks[0].attn2
        attention.to_k.register_forward_hook(lambda *_: projected.append(1))
        case.one_call["encoder_hidden_states"] = case.one_call["encoder_hidden_states"].clone()
        text = weakref.ref(case.one_call["encoder_hidden_states"])
    for i in reversed(range(STEPS)):
        case.call(times[i])
        assert len(caches) == (i > 0)
    case.call(times[-1])
    case.pipe.maybe_free_model_hooks()
    assert "the pipeline ended after 1 of the router's 4 steps: it was interrupted" in caplog.text
    assert not caches
    case.call(times[-1])
    with pytest.raises(ValueError, match=r"timestep is 998 in call 2 of the trajectory"):
        case.call(998)
    assert not caches
    if "encoder_hidden_states" in case.one_call:
        assert len(projected) == 3, "once a trajectory"
        del case.one_call["encoder_hidden_states"]
        assert text() is None


def test_save_pretrained_is_unaffected(case, tmp_path):
    case.transformer.save_pretrained(tmp_path / "before")
    wanted = case.run()
    harmonica.apply(case.transformer, case.artifact())
    case.run()
    case.transformer.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()
    again = type(case.transformer).from_pretrained(tmp_path / "after", dtype=torch.float64)
    case.pipe.transformer = again
    assert apart(case.run(), wanted) < of_trajectory(STEPS), "loaded without a plan"
    harmonica.apply(again, case.artifact())


def test_a_copy_follows_a_plan_of_its_own(case):
    harmonica.apply(case.transformer, case.artifact())
    wanted, twin = case.run(), copy.deepcopy(case.transformer)
    harmonica.remove(case.transformer)
    for parameter in case.transformer.parameters():
        parameter.data.zero_()
    case.pipe.transformer = twin
    assert torch.equal(case.run(), wanted)
    harmonica.remove(twin)


# Counting calls


def test_a_public_samplers_plan_is_followed_by_counting(case, caplog):
    artifact, theirs = case.artifact(sampler=config("ddim")), config("diffusers", scheduler=DDIM)
    case.pipe.scheduler = DDIMScheduler.from_config(DDIM)
    wanted = case.ours(artifact, theirs)
    harmonica.apply(case.transformer, artifact, allow_other_sampler=True)
    for _ in range(2):
        assert apart(case.run(), wanted) < of_trajectory(STEPS)
    with pytest.raises(ValueError, match=r"in call 5 .* made for 4 steps: give .* num_inference_steps 4"):
        case.run(num_inference_steps=STEPS + 1)
    with pytest.raises(ValueError, match=r"ended after 3 of the router's 4 steps: give it num_inference_st"):
        case.run(num_inference_steps=STEPS - 1)
    case.call(700), case.call(600)
    with caplog.at_level(logging.WARNING):
        assert apart(case.run(), wanted) < of_trajectory(STEPS)
        assert "a trajectory of 2 of 4 calls was broken off" in caplog.text
        caplog.clear()
        case.run()
    assert not caplog.records


def test_a_scheduler_that_calls_twice_a_step_is_refused(pixart):
    harmonica.apply(pixart.transformer, pixart.artifact(), allow_other_sampler=True)
    pixart.pipe.scheduler = HeunDiscreteScheduler(**LINEAR)
    with pytest.raises(ValueError, match=r"in call 5 .* num_inference_steps 4 and a scheduler with one call"):
        pixart.run()


def test_steps_that_rounding_makes_equal_are_told_apart():
    timesteps = [0, 0, 400, 999, 999]
    for known in (timesteps, None):
        counter = StepCounter(5, known, "")
        falling = timesteps[::-1] if known else [999, 998, 400, 0, 0]
        for _ in range(2):
            assert [counter.next_step(timestep) for timestep in falling] == [4, 3, 2, 1, 0]
