"""Recorded steps on a CPU: what a replay computes, and what a capture would refuse."""

from typing import Any

import pytest
import torch
from host_recorder import HostRecorder
from torch import Tensor

from harmonica.execution.capture_check import NotCapturableError
from harmonica.execution.graphs import RecordedTrajectory

pytestmark = pytest.mark.usefixtures("no_codegen")


def recorded(step: Any, *inputs: Tensor) -> RecordedTrajectory:
    trajectory = RecordedTrajectory(HostRecorder(inputs), list(inputs))
    trajectory.record([step])
    return trajectory


def test_a_replay_computes_from_what_the_buffers_hold():
    buffer = torch.ones(2)
    trajectory = recorded(lambda: (buffer.view(2, 1) * 3).add_(1).mT[0, 1:], buffer)
    (result,) = trajectory.results
    trajectory.begin([torch.tensor([1.0, 5.0])])
    assert result.isnan().all(), "before the replay there is nothing"
    trajectory.replays[0]()
    assert result == 16


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda x: x.sum().item(), "reads a value back"),
        (lambda x: (x > 0).tolist(), "reads a value back"),
        (lambda x: x[x > 0], "reads a value back"),
        (lambda x: x + torch.tensor([1.0, 2.0]), "copied from the host"),
        (lambda x: x + torch.randn(2), "draws numbers"),
        (lambda x: x + torch.rand_like(x), "draws numbers"),
    ],
)
@pytest.mark.parametrize("is_inference", [False, True])
def test_what_a_capture_would_refuse_is_refused(step, why, is_inference):
    buffer = torch.ones(2)
    with torch.inference_mode(is_inference), pytest.raises(NotCapturableError, match=why):
        recorded(lambda: step(buffer), buffer)


def test_a_number_of_the_host_and_a_fill_are_allowed():
    buffer, host = torch.ones(2), torch.arange(4.0)
    trajectory = recorded(lambda: buffer * host[2] + torch.full((2,), 3.0), buffer)
    trajectory.replays[0]()
    assert trajectory.results[0].tolist() == [5, 5]


def test_what_an_earlier_trajectory_left_is_nothing():
    buffer, left = torch.ones(2), []

    def step() -> Tensor:
        left.append(buffer * 2)
        return left[0] + 1 if len(left) > 1 else left[0] + buffer

    recorder = HostRecorder([buffer])
    first, second = RecordedTrajectory(recorder, [buffer]), RecordedTrajectory(recorder, [buffer])
    first.record([step])
    second.record([step])
    second.begin([torch.ones(2)])
    second.replays[0]()
    assert second.results[0].isnan().all()


def test_a_padding_row_that_leaks_shows():
    buffer = torch.ones(4, 3)
    apart, mixed = recorded(lambda: buffer * 2, buffer), recorded(lambda: buffer - buffer.mean(0), buffer)
    for trajectory, leaks in ((apart, False), (mixed, True)):
        trajectory.begin([torch.ones(3, 3)])
        trajectory.replays[0]()
        assert bool(trajectory.results[0][:3].isnan().any()) == leaks
