"""A speed in measured time: what it is in MACs, what is refused, told, kept and resumed."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from all_phases import ALL_PHASES
from tiny_dit import write_model

from harmonica.cli import train
from harmonica.core.plan_builders import stepwise_plan
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.base import Macs
from harmonica.models.loading import load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training import multi_target, timing
from harmonica.training.config import TrainingConfig
from harmonica.training.measured_speed import in_macs, macs_speedup
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.validation.settings import SettingError

STEPS, SHARE = 9, 0.25
MACS = Macs(branches=(30, 60), rest=10)
MEASURED = dataclasses.replace(ALL_PHASES, speed="measured", targets=(1.5,), micro_batch_size=1)


@pytest.mark.parametrize("reused", [1, 4, 8])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_the_plan_of_a_speed_in_time_takes_that_time(reused: int, share: float) -> None:
    in_time = STEPS / (STEPS - reused + share * reused)
    plan = stepwise_plan(STEPS, 2, range(reused))
    assert macs_speedup(in_time * (1 - 1e-12), share, MACS, STEPS) == pytest.approx(plan.ideal_speedup(MACS))


def test_time_beyond_reach_is_refused_with_what_can_be_reached() -> None:
    most = STEPS / (1 + (STEPS - 1) * SHARE)
    for field, config in {
        "target_speedup": TrainingConfig(target_speedup=3.1),
        "targets": TrainingConfig(target_speedup=1.5, targets=(2.0, 3.1)),
    }.items():
        with pytest.raises(
            SettingError, match=rf"^train\.{field} is 3\.1 of .* takes 25% .* less than {most:g}"
        ):
            in_macs(config, SHARE, MACS, STEPS)
    for slow in (1.0, 1.3):
        with pytest.raises(SettingError, match=r"give train\.speed macs$"):
            macs_speedup(1.2, slow, MACS, STEPS)
    with pytest.raises(SettingError, match=r"train\.speed is 'measured': give macs, or the speed in"):
        TrainingConfig(speed="measured", target_cur=0.4)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory):
    loaded = load_model(write_model(tmp_path_factory.mktemp("model")))
    sampler = make_sampler(loaded.model, SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5))
    spec = SampleSpec.of(loaded.model, 0)
    return lambda config: (MultiTargetTrainer(sampler, config, seed=0), spec)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_reused_step_is_timed_beside_a_computed_one(fresh, monkeypatch, fixed) -> None:
    run, spec = fresh(MEASURED)
    now, orders, rounds = 0.0, [], 0

    def images(self, batch, plan=None, reuse="hold"):
        nonlocal now, rounds
        rounds += plan is None
        reused = sum(not any(row) for row in plan.compute) if plan else 0
        if fixed and plan:  # a step that computes everything whatever the plan says, as in some pipelines
            self.fixed_steps = frozenset({plan.compute.index((False,) * plan.num_branches)})
            reused -= 1
        assert len(batch) == 1, "a micro-batch"
        if plan:
            orders.append(len(plan.forecast[1][0]))
        # The first time it compiles, and once another process is in the way.
        now += (STEPS - reused + SHARE * reused) * len(batch) + 100.0 * (rounds in (1, 3))

    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(SamplerBackend, "images", images)
    batch = spec.batch_of(0, Shard(2), "cpu")
    backend = run.current.context.backend
    assert timing.reused_share(backend, batch, MEASURED) == pytest.approx(SHARE)
    assert backend.fixed_steps == frozenset(), "as where nothing was timed"
    assert set(orders) == {MEASURED.forecast.order}


def test_it_aims_at_the_macs_of_the_time_says_so_and_resumes_with_them(fresh, monkeypatch) -> None:
    monkeypatch.setattr(multi_target, "reused_share", lambda *_: SHARE)
    run, spec = fresh(MEASURED)
    kept = {}
    for _ in train.trained(run, spec, Shard(2)):
        kept[run.trajectory] = copy.deepcopy(run.state())
    macs = run.sampler.model.macs()
    aims = {speed: macs_speedup(speed, SHARE, macs, STEPS) for speed in (1.3, 1.5)}
    assert run.announcement == (
        "train.speed is measured: a reused step takes 25.0% of the time of a computed one, so "
        f"1.3x is {aims[1.3]:.3g}x in MACs, 1.5x is {aims[1.5]:.3g}x in MACs"
    )
    main, others = run.artifact(target_speedup=1.3), run.extra_artifacts()
    assert list(others) == ["1.5x"] and (main.training["target_speedup"], main.training["macs_speedup"]) == (
        1.3,
        aims[1.3],
    )
    assert main.ideal_speedup == pytest.approx(aims[1.3], rel=0.02)
    assert others["1.5x"].ideal_speedup == pytest.approx(aims[1.5], rel=0.02)

    counted, _ = fresh(
        dataclasses.replace(MEASURED, speed="macs", target_speedup=aims[1.3], targets=(aims[1.5],))
    )
    list(train.trained(counted, spec, Shard(2)))
    assert torch.equal(counted.artifact().logits_TB, main.logits_TB)

    monkeypatch.setattr(multi_target, "reused_share", lambda *_: pytest.fail("it was measured before"))
    for stop in (2, run.trajectory - 2):
        resumed, _ = fresh(MEASURED)
        resumed.load_state(kept[stop])
        assert resumed.trajectory == stop
        list(train.trained(resumed, spec, Shard(2)))
        assert torch.equal(resumed.extra_artifacts()["1.5x"].logits_TB, others["1.5x"].logits_TB)
        assert torch.equal(resumed.extra_artifacts()["1.5x"].forecast_TBK, others["1.5x"].forecast_TBK)


def test_a_budget_counts_the_speed_in_macs(fresh, monkeypatch) -> None:
    monkeypatch.setattr(multi_target, "reused_share", lambda *_: SHARE)
    run, spec = fresh(dataclasses.replace(MEASURED, budget=600.0))
    run.prepare(spec.batch_of(0, Shard(2), "cpu"))
    assert (
        run.announcement.startswith("train.speed is measured") and "; train.budget is 600" in run.announcement
    )
    resumed, _ = fresh(dataclasses.replace(MEASURED, budget=600.0))
    resumed.load_state(copy.deepcopy(run.state()))
    assert [one.config for one in resumed.trainers] == [one.config for one in run.trainers]
    assert run.trainers[0].config.target_speedup > 1.3
