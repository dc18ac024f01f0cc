"""`ActivationOffloading`: which tensors go to the host's memory, and that gradients stay as they are."""

import gc

import pytest
import torch
from torch import Tensor

from harmonica.execution.offloading import LEAST_BYTES, ActivationOffloading


class Copying(ActivationOffloading):
    """Copies what lies in the only memory of this machine, too."""

    def _is_on_host(self, tensor: Tensor) -> bool:
        return False


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """A tensor (512, 512) to differentiate in, and weights."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(512, 512, generator=generator, dtype=torch.float64) for _ in range(2)]
    assert made[0].nbytes >= LEAST_BYTES
    return made[0].requires_grad_(True), made[1]


def test_gradients_are_the_same_and_weights_stay(inputs):
    x, weights = inputs

    def run() -> Tensor:
        y = 2 * x @ weights
        return (y.sin() + (y * y).T @ weights.T).sum()

    (expected,) = torch.autograd.grad(run(), x)
    with (offloading := Copying([weights])):
        result = run()
    assert len(offloading._copies) == 1, "y, which its sine and both factors share, and no weights"
    (found,) = torch.autograd.grad(result, x)
    assert torch.equal(found, expected)
    del result
    gc.collect()
    assert not offloading._copies, "copies go with the graph that needs them"


def test_small_tensors_and_those_of_the_host_stay(inputs):
    x, weights = inputs
    assert ActivationOffloading([]).on_host(x) is x
    offloading = Copying([weights])
    assert offloading.on_host(small := x.detach()[:4]) is small
    assert offloading.on_host(weights) is weights
    assert offloading.on_host(view := weights.T) is view
    assert offloading.on_host(x) is not x


def test_what_is_written_in_place_is_copied_anew():
    tensor = torch.zeros(512, 512, dtype=torch.float64)
    offloading = Copying([])
    before = offloading.on_host(tensor)
    assert offloading.on_host(tensor) is before
    tensor += 1
    after = offloading.on_host(tensor)
    assert before.max() == 0 and after.min() == 1
