"""Router training against the definitions, written out here without caches, prefixes or passes."""

import math
import threading
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from tolerances import PASS, rounding
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.router import Router
from harmonica.data.batch import Batch
from harmonica.samplers import Sampler
from harmonica.training.beta import BetaController
from harmonica.training.iepo import IepoKind, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig

Inputs = tuple[Tensor, Tensor]
"""Noise and labels."""
TAU = 0.3
STILL = SdtConfig(threshold=TAU, learning_rate=1e-300)
"""Trains without moving the router."""
NEAR = rounding(torch.float64, 12 * PASS, amplification=1e5)
"""Six steps by two passes, whose difference is a thousandth of them at least; lambda squares it and takes
the difference of two generations, a hundredth of either."""


@pytest.fixture
def router() -> Router:
    """Scores on both sides of tau."""
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return Router.from_logits(logits.clamp(-4, 4))


@pytest.fixture
def lambda_T() -> Tensor:
    return torch.tensor([3.0, 1.0, 0.5, 2.0, 4.0], dtype=torch.float64)


@dataclass
class Generation:
    """One whole generation: x_t before each step, guided output of each step, latents at the end."""

    x: dict[int, Tensor] = field(default_factory=dict)
    guided: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.zeros(()))


def reused(kept: list[tuple[int, Tensor]], i: int, reuse: str) -> Tensor:
    """The last value kept, or the line through the last two."""
    j, value = kept[-1]
    if reuse == "hold" or len(kept) == 1:
        return value
    k, before = kept[-2]
    return value + (value - before) * (j - i) / (k - j)


@torch.no_grad()
def generate(
    sampler: Sampler, router: Router, batch: Inputs, soft: set[int], reuse: str = "hold"
) -> Generation:
    """Weights of the router at the steps in `soft`, 1 at the others."""
    run = Generation()
    state = sampler.start(*batch)
    kept: dict[int, list[tuple[int, Tensor]]] = {b: [] for b in range(6)}
    for i in reversed(range(sampler.num_steps)):
        run.x[i] = state.x_MCHW
        hidden, conditioning = sampler.embed(i, state)
        for b, branch in enumerate(sampler.model.branches):
            r = router.logits()[i, b].sigmoid() if i in soft else torch.tensor(1.0)
            y = branch.compute(hidden, conditioning)
            if i in soft:
                y = r * y + (1 - r) * reused(kept[b], i, reuse)
            if r > TAU:
                kept[b].append((i, y))
            hidden = branch.merge(hidden, y, conditioning)
        run.guided[i] = sampler.guide(sampler.model.head(hidden, conditioning))
        state = sampler.advance(i, state, run.guided[i])
    run.final = state.x_MCHW
    return run


def mean_squared(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().item()


def measure(sampler: Sampler, router: Router, batch: Inputs, kind: IepoKind, reuse: Reuse = "hold") -> Tensor:
    return image_error_proxy(
        sampler, router, [Batch(*batch)], kind=kind, config=SdtConfig(threshold=TAU, reuse=reuse)
    )


def close(ours: Tensor, expected: list[float]) -> bool:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return bool((ours - wanted).norm() / wanted.norm() < NEAR)


def test_a_step_updates_its_row_alone_and_never_the_last(tiny_sampler, batch: Inputs, router, lambda_T):
    trainer = SdtTrainer(tiny_sampler, router, SdtConfig(threshold=TAU))
    before, seen = router.logits(), []
    snapshots = [before]

    def observe(i: int, gradient_B: Tensor) -> None:
        seen.append(i)
        snapshots.append(router.logits())

    records, _ = trainer.train_trajectory([Batch(*batch)], lambda_T, on_gradient=observe)
    snapshots.append(router.logits())
    assert seen == [record.step for record in records] == [4, 3, 2, 1, 0]
    # What changed between one gradient and the next is the row of the former, all of it.
    changed = [
        (after != earlier).any(1).nonzero().flatten().tolist() for earlier, after in pairwise(snapshots[1:])
    ]
    assert changed == [[4], [3], [2], [1], [0]]
    assert torch.equal(snapshots[1], before), "no update before the first gradient"
    assert torch.equal(router.logits()[-1], before[-1])


def test_the_base_model_stays_as_it_is(tiny_sampler, batch: Inputs, router, lambda_T):
    model = tiny_sampler.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    SdtTrainer(tiny_sampler, router, SdtConfig()).train_trajectory([Batch(*batch)], lambda_T)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_teacher_and_student_see_the_students_x(tiny_sampler, batch: Inputs, router, lambda_T):
    records, final = SdtTrainer(tiny_sampler, router, STILL).train_trajectory([Batch(*batch)], lambda_T)
    student = generate(tiny_sampler, router, batch, soft=set(range(5)))
    torch.testing.assert_close(final, student.final.chunk(2)[0])
    for record in records:
        i = record.step
        condition = tiny_sampler.model.guided_condition(batch[1])
        half = student.x[i].chunk(2)[0]
        t = torch.full_like(condition, tiny_sampler.timesteps[i])
        teacher = tiny_sampler.guide(tiny_sampler.model(torch.cat([half, half]), t, condition))
        assert record.mse == pytest.approx(mean_squared(student.guided[i], teacher), rel=NEAR)
        assert record.l1 == pytest.approx(router.scores(i).sum().item())
        assert record.loss == pytest.approx(lambda_T[i].item() * record.mse + STILL.beta * record.l1)


def test_a_given_beta_replaces_the_configured_one(tiny_sampler, batch: Inputs, router, lambda_T):
    records, _ = SdtTrainer(tiny_sampler, router, STILL).train_trajectory([Batch(*batch)], lambda_T, beta=0.0)
    assert all(record.loss == lambda_T[record.step].item() * record.mse for record in records)


def test_logits_are_clamped_after_each_update(tiny_sampler, batch: Inputs, router, lambda_T):
    config = SdtConfig(learning_rate=2.0, clamp=1.5)
    SdtTrainer(tiny_sampler, router, config).train_trajectory([Batch(*batch)], lambda_T)
    assert router.logits()[:-1].abs().max() == 1.5


def test_two_halves_on_two_workers_train_as_the_whole_batch(tiny_sampler, batch: Inputs, router, lambda_T):
    config = SdtConfig(threshold=TAU)
    halves = [Router.from_logits(router.logits()) for _ in range(2)]
    whole: dict[int, Tensor] = {}
    averaged: list[dict[int, Tensor]] = [{}, {}]
    SdtTrainer(tiny_sampler, router, config).train_trajectory(
        [Batch(*batch)], lambda_T, on_gradient=lambda i, grad: whole.setdefault(i, grad.clone())
    )
    barrier, slots = threading.Barrier(2, timeout=60), [torch.zeros(6)] * 2

    def work(rank: int) -> None:
        def average(gradient_B: Tensor) -> None:
            slots[rank] = gradient_B.clone()
            barrier.wait()
            gradient_B.copy_((slots[0] + slots[1]) / 2)
            barrier.wait()

        noise, labels = (part[2 * rank : 2 * rank + 2] for part in batch)
        SdtTrainer(tiny_sampler, halves[rank], config).train_trajectory(
            [Batch(noise, labels)],
            lambda_T,
            average=average,
            on_gradient=lambda i, grad: averaged[rank].setdefault(i, grad.clone()),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, gradient in whole.items():
        torch.testing.assert_close(
            averaged[0][i], gradient, rtol=NEAR, atol=NEAR * gradient.abs().max().item()
        )
    assert torch.equal(halves[0].logits(), halves[1].logits())
    torch.testing.assert_close(halves[0].logits(), router.logits(), rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize("reuse", ["hold", "forecast"])
def test_leave_one_out_is_t_whole_generations(tiny_sampler, batch: Inputs, router, reuse):
    steps = set(range(5))
    main = generate(tiny_sampler, router, batch, steps, reuse)
    expected = [
        mean_squared(generate(tiny_sampler, router, batch, steps - {i}, reuse).final, main.final)
        for i in range(5)
    ]
    assert close(measure(tiny_sampler, router, batch, "leave_one_out", reuse), expected)


def test_cumulative_switches_steps_on_noisiest_first(tiny_sampler, batch: Inputs, router):
    runs = [generate(tiny_sampler, router, batch, soft=set(range(i, 5))) for i in range(6)]
    expected = [mean_squared(runs[i].final, runs[i + 1].final) for i in range(5)]
    assert close(measure(tiny_sampler, router, batch, "cumulative"), expected)


def test_sensitivity_is_leave_one_out_by_the_steps_own_error(tiny_sampler, batch: Inputs, router):
    steps = set(range(5))
    main = generate(tiny_sampler, router, batch, soft=steps)
    # Up to step i the two runs are one, so their outputs at i are of the same x_t.
    errors = [
        mean_squared(generate(tiny_sampler, router, batch, soft=steps - {i}).guided[i], main.guided[i])
        for i in range(5)
    ]
    expected = measure(tiny_sampler, router, batch, "leave_one_out") / torch.tensor(errors)
    assert close(measure(tiny_sampler, router, batch, "sensitivity"), expected.tolist())


@pytest.mark.parametrize("kind", ["leave_one_out", "cumulative", "sensitivity"])
def test_a_router_that_computes_everything_does_no_harm(tiny_sampler, batch: Inputs, kind):
    router = Router.from_logits(torch.full((6, 6), 60.0, dtype=torch.float64))
    assert torch.equal(measure(tiny_sampler, router, batch, kind), torch.zeros(5, dtype=torch.float64))


def test_an_unknown_kind_lists_the_known(tiny_sampler, batch: Inputs, router):
    with pytest.raises(ValueError, match=r"iepo.kind is 'paper': give one of leave_one_out, cumulative"):
        measure(tiny_sampler, router, batch, "paper")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", -1.0),
        ("learning_rate", 0.0),
        ("epsilon", 0.0),
        ("threshold", 1.0),
        ("clamp", 0.0),
        ("reuse", "guess"),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"train.sdt.{name} is .?{value}"):
        SdtConfig(**{name: value})


def test_a_score_that_is_1_to_float32_leaves_beta_a_number():
    controller = BetaController(3, torch.ones(2), fraction=0.5, threshold=0.5)
    for i in range(2):
        controller.observe(i, torch.zeros(2), torch.tensor([30.0, 0.5]))
    assert math.isfinite(controller.update()) and controller.worth_TB.isfinite().all()


@pytest.mark.parametrize("target", [0.25, 0.7])
def test_beta_brings_cur_to_its_target(tiny_sampler, batch: Inputs, lambda_T, target):
    router = Router.alternating(6, 6, 0.5).double()
    trainer = SdtTrainer(tiny_sampler, router, SdtConfig(threshold=0.5, learning_rate=0.15))
    beta = BetaController(6, torch.ones(6), fraction=target * 6 / 5, threshold=0.5)
    start = router.plan(0.5).cur
    noise, labels = batch
    for _ in range(12):
        trainer.train_trajectory(
            [Batch(noise[:2], labels[:2])],
            lambda_T,
            beta=beta.beta,
            on_gradient=lambda i, grad: beta.observe(i, grad, router.rows[i]),
        )
        beta.update()
    assert beta.beta > 0
    assert abs(router.plan(0.5).cur - target) < 0.5 * abs(start - target)


def test_beta_is_the_quantile_of_what_entries_are_worth():
    beta = BetaController(3, torch.ones(2), fraction=0.75, threshold=0.2)
    logits = torch.zeros(2)
    # r = 1/2 and beta = 0: worth = -gradient / (r (1 - r)) / (1 - r) = -8 gradient.
    beta.observe(0, torch.tensor([-1.0, -4.0]) / 8, logits)
    beta.observe(1, torch.tensor([-2.0, -3.0]) / 8, logits)
    # 3 of 6 entries are 3 of the 4 that can be reused: the quantile is at 0.75.
    assert beta.update() == pytest.approx((1 - 0.2) * 3.25)
    torch.testing.assert_close(beta.worth_TB, torch.tensor([[1.0, 4.0], [2.0, 3.0]]))


def test_a_resumed_beta_continues_bit_for_bit():
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(6, 3, 4, generator=generator) / 8
    logits = torch.randn(3, 4, generator=generator)

    def run(beta: BetaController, trajectories: range) -> list[float]:
        values = []
        for k in trajectories:
            for i in (2, 1, 0):
                beta.observe(i, gradients[k, i], logits[i])
            values.append(beta.update())
        return values

    whole = BetaController(4, torch.ones(4), fraction=2 / 3, threshold=0.1)
    run(whole, range(3))
    state = whole.state_dict()
    expected = run(whole, range(3, 6))
    resumed = BetaController(4, torch.ones(4), fraction=2 / 3, threshold=0.1)
    resumed.load_state_dict(state)
    assert run(resumed, range(3, 6)) == expected
    assert torch.equal(resumed.worth_TB, whole.worth_TB)
    assert len(set(expected)) == 3
