"""Published methods that compute some blocks at every step, SpeCa and DBCache, against their rules."""

import math

import pytest
import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.models.base import Macs
from harmonica.samplers import Ddim
from pipelines.compare.baselines.dbcache import LONGEST, dbcache, partial_steps, residual_changes
from pipelines.compare.baselines.schedules import bisected, branches_of_blocks, interval_plan
from pipelines.compare.baselines.speca import _Verifier, speca, speculative_plan, threshold
from pipelines.compare.baselines.taylorseer import taylorseer
from tests.workflow.test_baselines import forecast


def test_a_bisection_finds_the_smallest_threshold_that_is_fast_enough() -> None:
    macs = Macs(branches=(1,), rest=0)
    plan_of = lambda threshold: stepwise_plan(20, 1, range(min(19, int(threshold * 4))))  # noqa: E731
    assert bisected(plan_of, macs, 2.0) == plan_of(2.5), "10 of 20 steps"
    assert bisected(plan_of, macs, 30.0) == plan_of(10.0), "as fast as it goes"


def test_specas_threshold_decays_to_its_floor() -> None:
    """With the authors' base of 0.1 for DiT: 0.1 * 0.01^p, at least 0.01."""
    assert threshold(49, 50, 0.1) == pytest.approx(0.1 * 0.01**0.02)
    assert threshold(40, 50, 0.1) == pytest.approx(0.0398, abs=1e-4)
    assert threshold(25, 50, 0.1) == pytest.approx(0.01) == threshold(3, 50, 0.1)


def test_speca_verifies_taylorseers_forecast_and_keeps_nothing_of_it() -> None:
    values = [math.sin(0.3 * i) for i in range(20)]
    plan = taylorseer(interval_plan(20, 1, 4), 4)
    cache = _Verifier(1, "forecast", plan.forecast)
    for i in (19, 18, 17, 13, 9):
        cache.errors = []
        cache.write(0, i, torch.full((2, 1, 1), values[i], dtype=torch.float64))
    cache.is_draft = True
    for i in (8, 7):
        cache.errors = []
        cache.write(0, i, torch.full((2, 1, 1), values[i], dtype=torch.float64))
        expected = abs(forecast(plan, values, i) - values[i]) / abs(values[i])
        assert cache.errors == pytest.approx([expected], rel=1e-4)


def test_speca_computes_the_step_after_an_error_and_ends_a_run(
    tiny_sampler: Ddim, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(tau: float) -> list[int]:
        plan = speculative_plan(tiny_sampler, [Batch(*batch)] * 2, tau)
        last = branches_of_blocks(tiny_sampler.model)[-1]
        assert all(all(row[-last:]) for row in plan.compute), "verification"
        return [i for i in range(6) if all(plan.compute[i])]

    assert whole(tau=1e9) == [3, 4, 5]
    assert whole(tau=0.0) == [1, 3, 4, 5]
    monkeypatch.setattr("pipelines.compare.baselines.speca.LONGEST", 2)
    assert whole(tau=1e9) == [0, 3, 4, 5]


def test_specas_speed_counts_verification(tiny_sampler: Ddim, batch: tuple[Tensor, Tensor]) -> None:
    macs = tiny_sampler.model.macs()
    plan = speca(tiny_sampler, [Batch(*batch)], 1.1)
    drafts = sum(not all(row) for row in plan.compute)
    saved = sum(macs.branches[:-2])
    assert branches_of_blocks(tiny_sampler.model)[-1] == 2 and drafts >= 2
    assert plan.ideal_speedup(macs) == pytest.approx(6 * macs.full / (6 * macs.full - drafts * saved))
    assert plan.forecast == taylorseer(Plan(plan.compute), 4).forecast


def test_dbcache_compares_with_the_last_whole_step() -> None:
    """Steps 5 and 4 are the warm-up; 3 and 2 are near 4, 1 is not, and 0 is near 1 but not near 4."""
    changes_TT = torch.full((6, 6), torch.inf)
    changes_TT[3, 4], changes_TT[2, 4], changes_TT[1, 4] = 0.1, 0.2, 0.3
    changes_TT[0, 4], changes_TT[0, 1], changes_TT[2, 3], changes_TT[1, 2] = 0.4, 0.1, 0.01, 0.01
    assert partial_steps(changes_TT, 0.25) == [3, 2, 0]
    assert partial_steps(changes_TT, 0.05) == [2]
    assert partial_steps(changes_TT, 0.5) == [3, 2, 1, 0]


def test_dbcaches_differences_are_of_the_first_blocks_residuals(
    tiny_sampler: Ddim, batch: tuple[Tensor, Tensor]
) -> None:
    changes_TT = residual_changes(tiny_sampler, [Batch(*batch)], 2)
    seen: dict[int, Tensor] = {}

    class Seen(BranchCache):
        def write(self, branch: int, step: int, value: Tensor) -> None:
            super().write(branch, step, value)
            if branch < 2:
                gated = value * tiny_sampler.model.branches[branch].gate(conditionings[step])
                seen[step] = seen[step] + gated if step in seen else gated

    state, conditionings = Batch(*batch).start(tiny_sampler), {}
    everything, cache = (True,) * len(tiny_sampler.model.branches), Seen(len(tiny_sampler.model.branches))
    for i in reversed(range(6)):
        _, conditionings[i] = tiny_sampler.embed(i, state)
        state, _ = planned_step(tiny_sampler, i, state, everything, cache)
    for i in range(6):
        for j in range(6):
            if i < j <= i + LONGEST:
                expected = (seen[i] - seen[j]).abs().mean() / seen[j].abs().mean()
                assert float(changes_TT[i, j]) == pytest.approx(float(expected))
            else:
                assert changes_TT[i, j].isinf()
    twice = residual_changes(tiny_sampler, [Batch(*batch)] * 2, 2)
    torch.testing.assert_close(changes_TT, twice)


@pytest.mark.parametrize("last", [0, 1])
def test_dbcache_computes_the_first_and_last_blocks_at_every_step(
    last: int, tiny_sampler: Ddim, batch: tuple[Tensor, Tensor]
) -> None:
    macs = tiny_sampler.model.macs()
    plan = dbcache(tiny_sampler, [Batch(*batch)], 1.15, first=1, last=last)
    assert plan.ideal_speedup(macs) >= 0.985 * 1.15
    for row in plan.compute:
        reused = [branch for branch, is_computed in enumerate(row) if not is_computed]
        assert reused in ([], list(range(2, len(row) - 2 * last)))
    assert all(map(all, plan.compute[-2:])) and not all(map(all, plan.compute))
