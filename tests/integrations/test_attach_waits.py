"""Steps of a pipeline under a plan wait for the device at the first one and at the last one alone.

There is no device here: the host's tensors are taken for a device's, and reading one is refused in between.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_sana
import torch
from diffusers import SanaPipeline
from tiny_attached import STEPS, apart, make_case, planned_sana, sana_arguments
from torch import Tensor
from torch.overrides import TorchFunctionMode

import harmonica
from harmonica.integrations import timestep_reader
from harmonica.integrations.planned_forward import PlannedForward

READS = (
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
)


class NoReads(TorchFunctionMode):
    """Refuses to read a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def unread_between_first_and_last(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yields the numbers of the calls seen."""
    call, seen = PlannedForward.__call__, list[int]()

    def watched(self: PlannedForward, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(seen) + 1)
        if 1 < seen[-1] < STEPS:
            with NoReads():
                return call(self, *args, **kwargs)
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(timestep_reader, "on_host", lambda tensor: False)
        patch.setattr(PlannedForward, "__call__", watched)
        yield seen


def make_sana() -> tuple[SanaPipeline, Callable[[], Tensor]]:
    """A pipeline whose transformer is under a plan, and what makes latents by it."""
    pipe, (noise, condition) = planned_sana(), tiny_sana.make_batch("1.5")
    return pipe, lambda: pipe(latents=noise, **sana_arguments(noise, condition)).images


@pytest.mark.parametrize("kind", ["dit", "sigma", "sana"])
def test_only_the_first_and_the_last_step_read_a_timestep_back(kind, tmp_path, monkeypatch):
    if kind == "sana":
        _, run = make_sana()
    else:
        case = make_case(kind, tmp_path)
        harmonica.apply(case.transformer, case.artifact(reuse="forecast"))
        run = case.run
    wanted = run()
    with unread_between_first_and_last(monkeypatch) as seen:
        found = run()
    assert seen == list(range(1, STEPS + 1)) and apart(found, wanted) < 1e-12


def test_a_timestep_that_was_taken_for_another_shows_at_the_end(monkeypatch):
    pipe, run = make_sana()
    wanted, set_timesteps = run(), pipe.scheduler.set_timesteps

    def moved(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        pipe.scheduler.timesteps[2] += 1

    with unread_between_first_and_last(monkeypatch) as seen, monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "set_timesteps", moved)
        with pytest.raises(ValueError, match=r"in call 3 of the trajectory and the router was made for"):
            run()
    assert len(seen) == STEPS
    assert apart(run(), wanted) < 1e-12, "nothing of that call is left"


def test_a_schedule_that_has_changed_is_read_anew(monkeypatch):
    reader, timesteps = timestep_reader.TimestepReader(), torch.tensor([9, 5, 1])
    scheduler = type("Scheduler", (), {"timesteps": timesteps})()
    monkeypatch.setattr(timestep_reader, "on_host", lambda tensor: False)
    pipe = type("Pipe", (), {"scheduler": scheduler})()
    monkeypatch.setattr(timestep_reader, "current_pipeline", lambda: pipe)

    def read(place: int) -> float:
        return reader.read(timesteps[place][None].expand(3), lambda: None)

    assert [read(place) for place in range(3)] == [9, 5, 1]
    timesteps[1] = 4
    assert read(1) == 4
