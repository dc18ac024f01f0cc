"""Sample from recorded steps.

Inputs go into buffers, and nothing is waited for until the last step.

Shapes: N images, B rows of the buffers, C channels, H W image.
"""

import dataclasses
import json
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.trajectory import Trajectory
from harmonica.execution.graphs import (
    BUCKETS,
    GraphStore,
    RecordedTrajectory,
    addresses_of,
    bucket_of,
)
from harmonica.samplers import Sampler, State
from harmonica.samplers.noise import SampleKeys
from harmonica.samplers.step_noise import drawn_noise

OnStep = Callable[[int, Callable[[], Tensor]], None]
"""Called after step i with what makes the predicted x_0 (N, C, H, W): progress bars, previews.

To be made before the callback returns: recorded steps write over what it is made of."""


def sample_graphed(
    sampler: Sampler,
    noise_NCHW: Tensor,
    condition_N: Any,
    plan: Plan | None,
    *,
    reuse: Reuse,
    keys: SampleKeys | None,
    on_step: OnStep | None,
    accumulate: bool | None,
) -> Tensor | None:
    """Sample like `harmonica.core.sampling.sample`, by replaying recorded steps.

    Returns:
        Images or latents (N, C, H, W); None where there is no recording, and the steps are to be run.
    """
    model, count = sampler.model, len(noise_NCHW)
    if model.graphs is None:
        model.graphs = GraphStore(model.graph_bytes)
    store: GraphStore = model.graphs
    if sampler.is_stochastic and keys is None:
        return None  # which is an error that the sampler has the words for
    bucket = bucket_of(count)
    if bucket is None:
        store.say_once(f"a batch of {count} is larger than {BUCKETS[-1]}")
        return None
    given = _inputs(sampler, noise_NCHW, condition_N, keys)
    key = _key(sampler, plan, reuse, accumulate, bucket, given, noise_NCHW.device)

    def make() -> RecordedTrajectory:
        return _record(sampler, condition_N, given, bucket, (plan, reuse, accumulate))

    with store.lock:
        recorded = store.find(key, make)
        if recorded is None:
            return None
        recorded.begin(given)
        for k, replay in enumerate(recorded.replays):
            replay()
            if k and on_step is not None:  # the first prepares conditionings
                i = sampler.num_steps - k
                before, guided = recorded.results[k]
                on_step(i, partial(_predict, sampler, i, before, guided, count))
        images_NCHW: Tensor = recorded.results[0].finish()
        return images_NCHW[:count].clone()


def _predict(sampler: Sampler, i: int, before: State, guided_MCHW: Tensor, count: int) -> Tensor:
    return sampler.predict_clean(i, before, guided_MCHW)[:count]


def _inputs(sampler: Sampler, noise_NCHW: Tensor, condition_N: Any, keys: SampleKeys | None) -> list[Tensor]:
    """Return all that differs between batches.

    These are noise, guidance scales, conditions and the steps' noise.
    """
    given = [noise_NCHW, sampler.guidance_scales(noise_NCHW), *condition_tensors(condition_N)]
    if sampler.is_stochastic and keys is not None:
        given.append(drawn_noise(keys, range(sampler.num_steps), noise_NCHW))
    return given


def condition_tensors(condition_N: Any) -> list[Tensor]:
    """Return the tensors of a condition, a batch of labels or a dataclass of them."""
    if isinstance(condition_N, Tensor):
        return [condition_N]
    values = (getattr(condition_N, field.name) for field in dataclasses.fields(condition_N))
    return [value for value in values if value is not None]


def condition_of(condition_N: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the condition with other tensors, in the order of `condition_tensors`."""
    if isinstance(condition_N, Tensor):
        return tensors[0]
    names = [field.name for field in dataclasses.fields(condition_N)]
    present = [name for name in names if getattr(condition_N, name) is not None]
    return dataclasses.replace(condition_N, **dict(zip(present, tensors, strict=True)))


def _key(
    sampler: Sampler,
    plan: Plan | None,
    reuse: Reuse,
    accumulate: bool | None,
    bucket: int,
    given: Sequence[Tensor],
    device: torch.device,
) -> Hashable:
    """Return all that a recording holds as constants.

    The scale of guidance is an input instead.
    """
    config = json.dumps({**sampler.config.to_dict(), "guidance_scale": sampler.is_guided}, sort_keys=True)
    model = sampler.model
    kinds = tuple((tuple(each.shape[1:]), each.dtype) for each in given)
    place = (str(device), addresses_of(model), model.dtype, model.residual_dtype)
    return plan, reuse, accumulate, bucket, kinds, config, place


def _record(
    sampler: Sampler,
    condition_N: Any,
    given: Sequence[Tensor],
    bucket: int,
    how: tuple[Plan | None, Reuse, bool | None],
) -> RecordedTrajectory:
    recorded = RecordedTrajectory.on(sampler.model, given, bucket)
    count = len(condition_tensors(condition_N))
    noise, scales, *others = recorded.inputs
    condition = condition_of(condition_N, others[:count])
    step_noise = others[count].unbind(1) if others[count:] else ()
    sampler = sampler.with_scale_buffer(scales)
    trajectory = Trajectory(sampler, *how)

    def steps(trajectory: Trajectory) -> list[Callable[[], Any]]:
        def start() -> Trajectory:
            trajectory.start(noise, condition, step_noise=step_noise)
            return trajectory

        return [start, *(partial(trajectory.step, i) for i in reversed(range(sampler.num_steps)))]

    with recorded.recorder.recording():
        recorded.recorder.warm_up(lambda: [step() for step in steps(Trajectory(sampler, *how))])
        recorded.record(steps(trajectory))
        trajectory.release()
    return recorded
