"""The bounds of `tolerances` cover what rounding does, and other sums are what they claim to be."""

from typing import Any

import other_sums
import pytest
import tiny_pixart
import tiny_sana
import torch
from tiny_pixart import TIMES, apart
from tolerances import MARGIN, of_pass, roundoff
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
EXACT = {ATEN._to_copy, ATEN.clone, ATEN.copy_, ATEN.cat, ATEN.stack, ATEN.detach, ATEN._unsafe_view}
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm}


class Rounding(TorchDispatchMode):
    """Monte Carlo arithmetic: every result in float64 is moved by a random share of a type's roundoff.

    So roundings are as many, and are amplified as much, as in the computation itself, and no kernel of that
    type runs. Products take their sum in pieces of 32 terms, as wide as a tile of AMX, and round each.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.generator = roundoff(dtype), torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = operation(*args, **kwargs or {})
        first = result[0] if isinstance(result, tuple) else result
        if not isinstance(first, Tensor) or first.dtype != torch.float64 or operation.is_view:
            return result
        if operation.overloadpacket not in EXACT:
            pieces = args[-1].shape[-2] / 32 if operation.overloadpacket in PRODUCTS else 1
            share = 2 * torch.rand(first.shape, generator=self.generator, dtype=first.dtype) - 1
            first.mul_(1 + self.size * max(1, pieces) ** 0.5 * share)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["alpha", "alpha 1024", "patches"])
def test_a_pass_is_moved_by_less_than_its_bound_without_the_margin(kind, dtype):
    tiny, make = (
        (tiny_sana, tiny_sana.make_sana) if kind == "patches" else (tiny_pixart, tiny_pixart.make_pixart)
    )
    (noise, condition), model = tiny.make_batch(kind), make(kind)
    exact = model(noise, TIMES, condition)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).double()
    with Rounding(dtype):
        moved = apart(model(noise, TIMES, condition), exact)
    assert roundoff(dtype) < moved < of_pass(dtype) / MARGIN


@pytest.fixture
def with_other_sums():
    library = other_sums.install()
    yield
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_sums_are_equal_at_equal_shapes_alone(dtype, request):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((6, 50), (50, 40)))
    q, norm = torch.randn(2, 3, 9, 12, generator=generator).to(dtype), torch.nn.LayerNorm(50).to(dtype)
    attention = torch.nn.functional.scaled_dot_product_attention
    runs = [lambda: a @ b, lambda: a[:3] @ b, lambda: attention(q, q, q), lambda: norm(a), lambda: q @ q.mT]
    plain = [run().detach() for run in runs]
    request.getfixturevalue("with_other_sums")
    for run, before in zip(runs, plain):
        now = run().detach()
        assert torch.equal(run().detach(), now) and not torch.equal(now, before)
        assert apart(now, before) < MARGIN * 50 * roundoff(dtype)
    assert not torch.equal((a @ b)[:3], a[:3] @ b), "another batch size"
    assert not torch.equal((torch.cat([a[:1]] * 6) @ b)[0], (torch.cat([a[:1]] * 6) @ b)[5]), "another place"
    gradient = torch.autograd.functional.jacobian(lambda x: (x @ b).sum(), a)
    assert apart(gradient, b.sum(1).expand(6, 50)) < MARGIN * 50 * roundoff(dtype)
