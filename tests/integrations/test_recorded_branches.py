"""Branches found by recording: which there are, what they cost, what a plan on them leaves alone."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import tiny_transformers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harmonica.core.plan import Plan
from harmonica.integrations.recorded.kinds import DECLARATIONS, RefusedTransformer
from harmonica.integrations.recorded.unit_passes import MixedPass
from harmonica.integrations.recorded.unit_store import UnitStore
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import recorded

STEPS = 3
FLUX, SD3, Z_IMAGE = "FluxTransformer2DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel"
EXPECTED = {
    FLUX: {"attn": 2, "mlp": 4, "single": 2},
    "Flux2Transformer2DModel": {"attn": 4, "mlp": 4},
    SD3: {"attn": 2, "mlp": 3},
    "PRXTransformer2DModel": {"attn": 2, "mlp": 2},
    "ErnieImageTransformer2DModel": {"attn": 2, "mlp": 2},
    Z_IMAGE: {"attn": 4, "mlp": 4},
    "PixArtTransformer2DModel": {"attn": 2, "cross": 2, "mlp": 2},
    "AuraFlowTransformer2DModel": {"attn": 4, "mlp": 6},
    "WanTransformer3DModel": {"attn": 2, "cross": 2, "mlp": 2},
}


@pytest.fixture(params=EXPECTED)
def name(request) -> str:
    return request.param


def output_of(output: Any) -> Tensor:
    first = output[0]
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


@torch.no_grad()
def run(view: RecordedTransformer, plan: Plan, steps: list[dict[str, Any]], reuse: str = "hold") -> Tensor:
    """Outputs of a trajectory's forwards (T, ...)."""
    kept, shapes, outputs = view.new_kept(reuse, plan.forecast), dict[str, Any](), []
    for i, arguments in zip(reversed(range(len(steps))), steps):
        outputs.append(output_of(view.planned(plan.compute[i], kept, i, shapes, (), arguments)))
    return torch.stack(outputs)


@torch.no_grad()
def plain(module: nn.Module, steps: list[dict[str, Any]]) -> Tensor:
    return torch.stack([output_of(module(**arguments)) for arguments in steps])


def test_kinds_and_costs(name):
    module = tiny_transformers.make_transformer(name)
    arguments = tiny_transformers.make_inputs(name, module)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        module(**arguments)
    with recorded(module, **arguments) as view:
        assert Counter(branch.kind for branch in view.branches) == EXPECTED[name]
        macs = view.macs()
        assert macs.full == counter.get_total_flops() // 2 // tiny_transformers.ROWS
        assert min(macs.branches) > 0 and macs.rest > 0


def test_a_plan_that_computes_everything_changes_no_bit(name):
    module = tiny_transformers.make_transformer(name)
    steps = list(tiny_transformers.step_inputs(name, module, STEPS))
    wanted = plain(module, steps)
    with recorded(module, **steps[0]) as view:
        assert torch.equal(run(view, Plan.full(STEPS, len(view.branches)), steps), wanted)
        assert torch.equal(plain(module, steps), wanted), "outside of a pass"
    assert torch.equal(plain(module, steps), wanted)
    assert not any("forward" in vars(each) for each in module.modules())


def test_a_reused_step_changes_a_little_and_leaves_out_norms(name):
    module = tiny_transformers.make_transformer(name)
    steps = list(tiny_transformers.step_inputs(name, module, STEPS))
    wanted = plain(module, steps)
    norms = Counter[str]()

    def count_norms(blocks: tuple[str, ...]) -> None:
        for path, each in module.named_modules():
            if "Norm" in type(each).__name__ and not any(each.children()) and path.startswith(blocks):
                each.forward = lambda *args, own=each.forward, path=path: (norms.update([path]), own(*args))[
                    1
                ]

    with recorded(module, **steps[0]) as view:
        units = tuple(unit for branch in view.branches for unit in branch.units)
        blocks = tuple({".".join(unit.split(".")[:2]) + "." for unit in units})
    count_norms(blocks)
    with recorded(module, **steps[0]) as view:
        count = len(view.branches)
        norms.clear()
        first = run(view, Plan.full(STEPS, count), steps)
        computed = norms.copy()
        norms.clear()
        plan = Plan(((False,) * count, (False,) * count, (True,) * count))
        held = run(view, plan, steps)
    assert torch.equal(held[0], first[0])
    change = float((held[1] - wanted[1]).norm() / wanted[1].norm())
    assert 1e-5 < change < 0.3
    assert sum(computed.values()) > 0 and {path: STEPS * ran for path, ran in norms.items()} == computed


def test_one_reused_branch_is_the_kept_value(name):
    """A branch whose module gives something else is still what it gave when it was kept."""
    module = tiny_transformers.make_transformer(name)
    steps = [tiny_transformers.make_inputs(name, module)] * 2
    with recorded(module, **steps[0]) as view:
        count = len(view.branches)
        wanted = run(view, Plan.full(2, count), steps)
        for place in range(count):
            row = tuple(k != place for k in range(count))
            found = run(view, Plan((row, (True,) * count)), steps)
            assert torch.equal(found, wanted), view.branches[place].name


@pytest.mark.parametrize("name", [FLUX, SD3, Z_IMAGE])
def test_forecasts_are_those_of_the_cache(name):
    module = tiny_transformers.make_transformer(name)
    steps = list(tiny_transformers.step_inputs(name, module, 4))
    with recorded(module, **steps[0]) as view:
        count = len(view.branches)
        plan = Plan(((True,) * count, (False,) * count, (True,) * count, (True,) * count))
        learned = Plan(plan.compute, (((0.0,),) * count,) * 4)
        held, forecast = run(view, plan, steps), run(view, plan, steps, "forecast")
        assert not torch.equal(held[2], forecast[2])
        assert torch.equal(run(view, learned, steps, "forecast"), held), "weights of zero hold"


@pytest.mark.parametrize("name", [FLUX, SD3, "PixArtTransformer2DModel"])
def test_the_gradient_of_a_score_is_the_difference_quotient(name):
    module = tiny_transformers.make_transformer(name).double()
    steps = list(tiny_transformers.step_inputs(name, module, 2))
    steps = [
        {
            key: each.double() if key != "class_labels" and _is_float(each) else each
            for key, each in one.items()
        }
        for one in steps
    ]
    with recorded(module, **steps[0]) as view:
        count, kept = len(view.branches), view.new_kept()
        with torch.no_grad():
            view.planned((True,) * count, kept, 1, {}, (), steps[0])
            target = output_of(module(**steps[1]))

        def error(scores_B: Tensor) -> Tensor:
            output = view.mixed(scores_B, (False,) * count, kept.copy(), 0, (), steps[1])
            return (output_of(output) - target).square().sum()

        ones_B = torch.ones(count, dtype=torch.float64)
        assert error(ones_B) < 1e-20, "r = 1 computes"
        scores_B = torch.full((count,), 0.5, dtype=torch.float64, requires_grad=True)
        (gradient_B,) = torch.autograd.grad(error(scores_B), scores_B)
        for place in range(count):
            step_B = torch.zeros(count, dtype=torch.float64)
            step_B[place] = 1e-2
            with torch.no_grad():
                quotient = (error(scores_B + step_B) - error(scores_B - step_B)) / 2e-2
            assert gradient_B[place] == pytest.approx(
                quotient.item(), rel=0.02, abs=1e-7
            )  # rotary tables are in float32


def test_a_unit_that_the_first_step_did_not_call_is_computed_and_kept():
    kept, value = UnitStore({"late": 0}), torch.ones(2)
    mixed = MixedPass(torch.tensor([0.25]), (False,), kept, 0)
    assert mixed.run("late", partial(torch.Tensor.clone, value)).equal(value) and "late" in kept


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Overwriting(nn.Module):
    """A block that changes what its attention returned in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm(x))
        y *= 0.5
        return x + y


class _Reading(nn.Module):
    """A block that looks at the values of what it gives its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y * 2 if y.amax().item() > 0 else y)


class _Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


@pytest.mark.parametrize("block", [_Overwriting, _Reading])
def test_blocks_that_overwrite_or_look_are_followed(block):
    torch.manual_seed(0)
    module, steps = _Model(block).requires_grad_(False), [{"x": torch.randn(2, 5, 8)}] * 3
    wanted = plain(module, steps)
    with recorded(module, **steps[0]) as view:
        assert [branch.name for branch in view.branches] == ["blocks.0.attn", "blocks.1.attn"]
        plan = Plan(((False, False), (False, False), (True, True)))
        assert torch.equal(run(view, plan, steps), wanted)


def test_what_has_no_branches_is_refused():
    refused = "MiniMaxMusic3RVQDepthDecoder"
    module = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        RefusedTransformer, match="is a Sequential, which has no plan: in its forward no block"
    ):
        RecordedTransformer(module, module.forward).record(torch.randn(2, 8))
    declared = tiny_transformers.make_transformer(refused)
    with pytest.raises(RefusedTransformer, match=DECLARATIONS[refused].refused):
        RecordedTransformer(declared, declared.forward).record(torch.randn(2, 4, 32))
