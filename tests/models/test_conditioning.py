"""Modulations of several steps are made together; nobody can tell but by the time it takes."""

import pytest
import torch
from tolerances import CLOSE, close
from torch import nn

from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.models.base import freeze
from harmonica.models.dit import model as dit
from harmonica.models.dit.model import DiT
from harmonica.models.step_conditionings import StepConditionings
from harmonica.samplers import Ddim, SamplerConfig
from harmonica.samplers.noise import SampleKeys


class Counted(nn.Module):
    """Rows that each call of a block's modulation had."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.inner(x)


@pytest.fixture
def counted(tiny_shape) -> tuple[DiT, Counted]:
    model = DiT(tiny_shape)
    model.initialize(torch.Generator().manual_seed(3), zero=False)
    freeze(model.double())
    counted = Counted(model.blocks[0].adaLN_modulation[1])
    model.blocks[0].adaLN_modulation[1] = counted
    return model, counted


def noise_of(model: DiT, count: int) -> torch.Tensor:
    shape = (model.in_channels, model.sample_size, model.sample_size)
    return torch.from_numpy(SampleKeys.of(0, range(count)).start_noise(shape)).double()


@pytest.mark.parametrize(
    ("images", "rows"), [(1, [10]), (7, [56, 14]), (16, [64, 64, 32]), (32, [64] * 5), (33, [66] * 5)]
)
def test_a_trajectory_reads_modulation_weights_once_for_some_64_rows(counted, images, rows):
    model, calls = counted
    sampler = Ddim(model, SamplerConfig(num_inference_steps=5, guidance_scale=1.5))
    noise, labels = noise_of(model, images), torch.arange(images) % 10
    together = sample(sampler, noise, labels)
    assert calls.rows == rows
    calls.rows.clear()
    row_by_row = torch.cat([sample(sampler, noise[i : i + 1], labels[i : i + 1]) for i in range(images)])
    torch.testing.assert_close(together, row_by_row, **CLOSE)
    assert calls.rows == [10] * images


def test_each_step_has_its_own(counted, monkeypatch):
    model, _ = counted
    labels, timesteps = torch.tensor([1, 10]), [0, 130, 131, 600, 999]
    near = close(torch.float64, 256 + 2 * 48, amplification=3)  # three products, from 256 cosines on
    monkeypatch.setattr(dit, "ROWS_AT_ONCE", 4)  # two steps at a time, from the last one down
    steps = model.prepare(labels, timesteps)
    assert len(steps) == 5 and len(steps[1:]) == 4
    for i in (4, 3, 2, 4, 0, 1, 2):  # also back again, as IEPO's forks do
        wanted = model.embed(torch.zeros(2, 4, 8, 8).double(), torch.full((2,), timesteps[i]), labels)[1]
        torch.testing.assert_close(steps[i].blocks, wanted.blocks, **near)
        torch.testing.assert_close(steps[i].final, wanted.final, **near)


def test_a_plan_changes_nothing_about_it(counted):
    model, calls = counted
    sampler = Ddim(model, SamplerConfig(num_inference_steps=5, guidance_scale=1.5))
    compute = ((False,) * len(model.branches),) * 4 + ((True,) * len(model.branches),)
    sample(sampler, noise_of(model, 2), torch.tensor([1, 2]), Plan(compute))
    assert calls.rows == [20]


def test_the_steps_of_a_trajectory_are_a_sequence():
    steps = StepConditionings(
        lambda timesteps: [2 * each for each in timesteps], [1.0, 10.0, 100.0], at_once=2
    )
    assert (steps[-1], steps[-3], list(steps), steps[-2:]) == (200.0, 2.0, [2.0, 20.0, 200.0], [20.0, 200.0])
    for index in (3, -4):
        with pytest.raises(IndexError):
            steps[index]
