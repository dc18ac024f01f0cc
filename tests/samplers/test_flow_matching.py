"""Schedulers of flow matching as samplers. That they are diffusers' is in `test_sana`."""

import pytest
import torch
from tiny_sana import FLOW, SCHEDULERS, config, make_batch, make_sana

from harmonica.core.plan_builders import even_plan
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.trainer import RouterTrainer


@pytest.mark.parametrize("steps", [2, 20, 1000])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_straight_flow_ends_at_its_image_in_T_steps(scheduler, steps):
    """x_t = (1 - t) image + t noise, whose velocity is noise - image at every t."""
    sampler = make_sampler(make_sana("1.0"), config(scheduler, num_inference_steps=steps, guidance_scale=1.0))
    assert sampler.timesteps == sorted(sampler.timesteps) and sampler.timesteps[-1] > 998
    noise, condition = make_batch("1.0")
    image = noise.flip(0) / 2
    state, visited = sampler.start(noise, condition), []
    for i in reversed(range(steps)):
        visited.append(state)
        predicted = sampler.predict_clean(i, state, noise - image)
        torch.testing.assert_close(predicted, image, rtol=2e-3, atol=2e-3)
        state = sampler.advance(i, state, noise - image)
    # The first noise level is 0.9997 to some of them, the last 1e-3 of the image to none.
    torch.testing.assert_close(sampler.finish(state), image, rtol=2e-3, atol=2e-3)
    middle = steps // 2
    before, after = visited[-1 - middle], visited[-middle] if middle else state
    again = [sampler.advance(middle, before, noise - image).x_MCHW for _ in range(2)]
    assert all(torch.equal(each, after.x_MCHW) for each in again), "a state is never changed in place"


def test_a_scheduler_takes_what_the_model_predicts(tiny_dit):
    flow, epsilon = make_sana("1.0"), tiny_dit
    assert (flow.prediction, epsilon.prediction) == ("flow", "epsilon")
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    dpm = {"_class_name": "DPMSolverMultistepScheduler"}
    for model, scheduler, words in (
        (epsilon, euler, "prediction_type flow_prediction: only epsilon is what the model predicts"),
        (epsilon, {**euler, "prediction_type": "epsilon"}, "prediction_type flow_prediction: only epsilon"),
        (epsilon, {**dpm, "use_flow_sigmas": True}, "use_flow_sigmas True: set the latter to False"),
        (flow, dpm, "prediction_type epsilon: only flow_prediction"),
        (flow, {**dpm, **FLOW, "use_flow_sigmas": False}, "use_flow_sigmas False: set the latter to True"),
        (flow, {**FLOW, "_class_name": "SASolverScheduler"}, "SASolverScheduler leaves noise at the end"),
        (
            flow,
            {**FLOW, "_class_name": "DEISMultistepScheduler"},
            "DEISMultistepScheduler leaves noise at",
        ),
        (
            flow,
            {**euler, "stochastic_sampling": True},
            "stochastic_sampling True: it draws its noise by batch",
        ),
        (flow, {**euler, "use_dynamic_shifting": True}, "use_dynamic_shifting True: its shift depends"),
        (flow, {**euler, "invert_sigmas": True}, "invert_sigmas True: the velocity would be"),
    ):
        with pytest.raises(ValueError, match=f"sampler.scheduler .*{words}"):
            make_sampler(model, SamplerConfig(name="diffusers", scheduler=scheduler))
    for name, words in (
        ("dpm-solver++", "dpm-solver.. has prediction_type epsilon"),
        ("sa-solver", "sa-solver has prediction_type epsilon"),
        ("ddim", "is ddim, which takes predicted noise, and the model predicts flow"),
        ("iddpm", "is iddpm, which takes"),
    ):
        with pytest.raises(ValueError, match=f"sampler.name {words}"):
            make_sampler(flow, SamplerConfig(name=name))


def test_a_training_takes_the_even_steps_of_flow_matching(tiny_dit):
    """Beyond twice the speed, runs of reuse are longer late under flow matching, and early else."""
    training = TrainingConfig(target_speedup=2.5, initial="even", iepo="none", trajectories=1)
    flow, other = (
        make_sampler(make_sana("1.0"), config("unipc", num_inference_steps=20)),
        make_sampler(tiny_dit, SamplerConfig(num_inference_steps=20)),
    )
    for sampler, is_flow in ((flow, True), (other, False)):
        expected = even_plan(20, sampler.model.macs(), 2.5, is_flow_matching=is_flow)
        assert RouterTrainer(sampler, training, seed=0).plan.compute == expected.compute
        assert expected != even_plan(20, sampler.model.macs(), 2.5, is_flow_matching=not is_flow)
