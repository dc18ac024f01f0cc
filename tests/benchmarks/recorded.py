"""What the view of any diffusers transformer costs: the share of a plan's promise that is realised.

    python -m tests.benchmarks.recorded [--rounds 3] [--tokens 256] [--compiled] [--cacheable blocks]

Transformers of width 1024 with random weights, on one thread. A trajectory is that of a plan that computes
everything, or reuses every second step, or entries drawn at random; all arms take turns in one run. With
`--compiled` the repeated blocks are compiled in all arms (`transformer.compile_repeated_blocks`), and an arm
of the plain forward without compilation is added. With `--cacheable blocks` all blocks are one branch, so
that there are whole steps alone.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn

from harmonica.core.plan import Plan
from harmonica.integrations.recorded.compiled_units import compile_blocks
from harmonica.integrations.recorded.kinds import KINDS
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import recorded
from tests.benchmarks.arms import random_plan
from tests.benchmarks.timing import Aim, Row, Timing, describe_machine

STEPS, WIDTH, HEADS = 4, 1024, 16
TEXT = 64


def make_flux(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """Two double and four single blocks of FLUX.1's shape."""
    module = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    )
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "pooled_projections": torch.randn(1, 256),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "timestep": torch.tensor([0.5]),
    }
    return module, inputs


def make_sd3(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """Four joint blocks of SD3's shape."""
    module = SD3Transformer2DModel(
        sample_size=128,
        num_layers=4,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=256,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=256,
    )
    side = 2 * round(tokens**0.5)
    inputs = {
        "hidden_states": torch.randn(1, 16, side, side),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.tensor([500.0]),
    }
    return module, inputs


def make_pixart(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """Four blocks of PixArt's shape."""
    side = 2 * round(tokens**0.5)
    module = PixArtTransformer2DModel(
        num_layers=4,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        cross_attention_dim=WIDTH,
        caption_channels=256,
        sample_size=side,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, side, side),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "timestep": torch.tensor([500]),
    }
    return module, inputs


def trajectory(view: RecordedTransformer, plan: Plan, inputs: dict[str, Any]) -> Callable[[], None]:
    """One trajectory's forwards under a plan."""

    @torch.no_grad()
    def run() -> None:
        kept, shapes = view.new_kept(), dict[str, Any]()
        for i in reversed(range(plan.num_steps)):
            view.planned(plan.compute[i], kept, i, shapes, (), inputs)

    return run


def time_arms(arms: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, Timing]:
    """Each arm once for warmth, then all in turn, in seconds of the one thread's own time.

    Not by the clock: a busy machine would be measured too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            seconds[name].append(time.process_time() - start)
    return {name: Timing(statistics.median(each), max(each) - min(each)) for name, each in seconds.items()}


def shares(
    make: Callable[[int], tuple[nn.Module, dict[str, Any]]],
    tokens: int,
    rounds: int,
    *,
    is_compiled: bool = False,
    cacheable: Sequence[str] = KINDS,
) -> list[Row]:
    """Realised shares of one transformer, whole steps and random entries."""
    torch.manual_seed(0)
    module, inputs = make(tokens)
    module = module.eval().requires_grad_(False)
    inputs["return_dict"] = False
    # What is timed in full is another instance: in the view's own, compiled blocks end at each branch.
    eager, full = module, copy.deepcopy(module)
    if is_compiled:
        torch.compiler.reset()
        eager = copy.deepcopy(module)
        for each in (module, full):
            compile_blocks(each)
    with recorded(module, **inputs, cacheable=cacheable) as view:
        count, macs = len(view.branches), view.macs()
        plans = {
            "full": Plan.full(STEPS, count),
            "whole steps": Plan(tuple(((STEPS - 1 - i) % 2 == 0,) * count for i in range(STEPS))),
        }
        if count > 1:
            plans["random"] = random_plan(STEPS, count, 0.5)

        def plain(forward: Callable[..., Any]) -> Callable[[], None]:
            @torch.no_grad()
            def run() -> None:
                for _ in range(STEPS):
                    forward(**inputs)

            return run

        arms = {"plain": plain(full)} | ({"eager": plain(eager)} if is_compiled else {})
        arms |= {name: trajectory(view, plan, inputs) for name, plan in plans.items()}
        timings = time_arms(arms, rounds=rounds)
    rows = []
    for name, bound in (("whole steps", 0.93), ("random", 0.85)):
        if name not in plans:
            continue
        ideal = plans[name].ideal_speedup(macs)
        share = (1 - timings[name].median_s / timings["plain"].median_s) / (1 - 1 / ideal)
        what = f"{type(module).__name__}, {tokens} tokens, {name}, ideal {ideal:.2f}x"
        seen = {arm: timing for arm, timing in timings.items() if arm not in plans or arm in ("full", name)}
        rows.append(Row.judge(what, seen, share, "realised share", Aim(">=", bound)))
    return rows


def main() -> None:
    """Print the shares of all three transformers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--compiled", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--cacheable", nargs="+", default=KINDS, help="kinds of branches, or blocks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), flush=True)
    for make in (make_pixart, make_sd3, make_flux):
        how = {"is_compiled": arguments.compiled, "cacheable": arguments.cacheable}
        for row in shares(make, arguments.tokens, arguments.rounds, **how):
            times = ", ".join(f"{arm} {t.median_s:.3g} s ({t.spread_s:.2g})" for arm, t in row.arms.items())
            verdict = "holds" if row.holds else "missed"
            print(f"{row.what}: {row.value:.3f}; aim {row.aim} {verdict}; {times}", flush=True)


if __name__ == "__main__":
    main()
