"""`sdt.student=hard`: trajectories follow the plan that scores make, gradients are those of the soft pass."""

import dataclasses

import pytest
import torch
from torch import Tensor

from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.samplers import Ddim, SamplerConfig
from harmonica.training.iepo import KINDS, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig

TAU = 0.3
STEPS, BRANCHES = 6, 6


def make_router(spread: float = 2.0) -> Router:
    """Scores on both sides of tau, and none near it."""
    generator = torch.Generator().manual_seed(4)
    logits_TB = torch.randn(STEPS, BRANCHES, generator=generator, dtype=torch.float64)
    away_TB = torch.where(logits_TB.abs() < 0.2, 0.2, logits_TB)
    return Router.from_logits(spread * (away_TB - 0.5))


@pytest.mark.parametrize("reuse", ["hold", "forecast"])
def test_training_ends_where_sampling_does(tiny_sampler, batch, reuse):
    router = make_router()
    plan = router.plan(TAU)
    assert 0.2 < plan.cur < 0.8
    config = SdtConfig(threshold=TAU, reuse=reuse, learning_rate=0.1, student="hard")
    _, images = SdtTrainer(tiny_sampler, router, config).train_trajectory(
        [Batch(*batch)], torch.ones(STEPS - 1)
    )
    # A row moves when its step is done, so what was sampled is the plan from before.
    torch.testing.assert_close(images, sample(tiny_sampler, *batch, plan, reuse=reuse, accumulate=False))
    soft = dataclasses.replace(config, student="soft")
    _, other = SdtTrainer(tiny_sampler, make_router(), soft).train_trajectory(
        [Batch(*batch)], torch.ones(STEPS - 1)
    )
    assert not torch.allclose(images, other)


def trained(sampler, batch, router: Router) -> tuple[dict[int, float], dict[int, Tensor]]:
    """Every step's MSE and gradient, the router left where it is."""
    gradients: dict[int, Tensor] = {}
    config = SdtConfig(threshold=TAU, learning_rate=1e-300, student="hard", beta=0.0)
    records, _ = SdtTrainer(sampler, router, config).train_trajectory(
        [Batch(*batch)],
        torch.ones(STEPS - 1, dtype=torch.float64),
        on_gradient=lambda i, gradient_B: gradients.update({i: gradient_B.clone()}),
    )
    return {record.step: record.mse for record in records}, gradients


@pytest.mark.parametrize("step", [0, 2, 4])
def test_gradients_are_those_of_the_soft_pass_along_the_plan(tiny_sampler, batch, step):
    _, gradients = trained(tiny_sampler, batch, make_router())
    direction_B = torch.linspace(-1, 1, BRANCHES, dtype=torch.float64)
    errors = []
    for nudge in (1e-4, -1e-4):
        router = make_router()
        with torch.no_grad():
            router.rows[step] += nudge * direction_B
        errors.append(trained(tiny_sampler, batch, router)[0][step])
    assert gradients[step] @ direction_B == pytest.approx((errors[0] - errors[1]) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_is_that_of_scores_which_are_0_and_1(tiny_sampler, batch, kind):
    router = make_router()
    sure = Router.from_logits(torch.where(router.plan(TAU).to_tensor(), 60.0, -60.0).double())
    batches, soft, hard = [Batch(*batch)], SdtConfig(threshold=TAU), SdtConfig(threshold=TAU, student="hard")
    hard_T = image_error_proxy(tiny_sampler, router, batches, kind=kind, config=hard)
    sure_T = image_error_proxy(tiny_sampler, sure, batches, kind=kind, config=soft)
    rows = router.plan(TAU).compute[:-1]  # a row that computes everything is weighed otherwise, see below
    here = [i for i, row in enumerate(rows) if kind == "cumulative" or not all(row)]
    assert len(here) > 1
    torch.testing.assert_close(hard_T[here], sure_T[here])
    soft_T = image_error_proxy(tiny_sampler, router, batches, kind=kind, config=soft)
    assert not torch.allclose(hard_T, soft_T, rtol=1e-3)


def test_a_step_that_the_plan_computes_is_weighed_by_its_reuse(tiny_dit, batch):
    """Held against itself it would weigh nothing, whatever it is worth."""
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.0, clip_sample=False)
    sampler = Ddim(tiny_dit, config)
    steps, full = range(STEPS - 1), sample(sampler, *batch)
    finals = [sample(sampler, *batch, stepwise_plan(STEPS, BRANCHES, [i]), accumulate=False) for i in steps]
    lambda_T = image_error_proxy(
        sampler,
        Router(STEPS, BRANCHES).double(),
        [Batch(*batch)],
        kind="leave_one_out",
        config=SdtConfig(threshold=TAU, student="hard"),
    )
    expected_T = torch.stack([(final - full).square().mean() for final in finals])
    torch.testing.assert_close(lambda_T, expected_T, rtol=1e-6, atol=0)


def test_another_student_is_refused():
    with pytest.raises(ValueError, match=r"train.sdt.student is 'firm': give soft or hard"):
        SdtConfig(student="firm")  # type: ignore[arg-type]
