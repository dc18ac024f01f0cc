"""Recomputation and micro-batches change what is kept at a time, and nothing of what is learned."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_pixart import make_batch, make_pixart
from tolerances import PASS, close, rounding
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.passes import planned_pass, soft_pass
from harmonica.core.router import Router
from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer
from harmonica.models.dit.model import DiT
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.iepo import KINDS, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig
from harmonica.training.trainer import RouterTrainer

STEPS = SamplerConfig(num_inference_steps=5, guidance_scale=1.5, clip_sample=False)
KEYS = SampleKeys.of(3, range(4))
LAMBDA = torch.tensor([3.0, 1.0, 0.5, 2.0], dtype=torch.float64)
REUSES = ("hold", "forecast")
NEAR = rounding(torch.float64, 10 * PASS, amplification=1000)
"""Five steps and their gradients. An error is the difference of two outputs that differ by a thousandth."""


@pytest.fixture(params=["dit", "pixart"])
def problem(request: pytest.FixtureRequest, tiny_dit: DiT) -> tuple[Sampler, Tensor, Any]:
    """A guided sampler of a float64 model, four rows of noise and what they are to show."""
    if request.param == "pixart":
        return make_sampler(make_pixart("sigma"), STEPS), *make_batch("sigma", 4)
    noise = torch.from_numpy(KEYS.start_noise((4, 8, 8))).double()
    return make_sampler(tiny_dit, STEPS), noise, torch.arange(4)


def make_router(model: BranchedTransformer) -> Router:
    """Scores on both sides of 0.4."""
    return Router.normal(5, len(model.branches), 0).double()


def trained(problem: tuple[Sampler, Tensor, Any], reuse: str = "hold", size: int = 0, **settings: Any):
    """Records, final latents, gradients of every row, and the logits they lead to."""
    sampler, noise, condition = problem
    router, gradients = make_router(sampler.model), []
    # Without beta, beside which the error's gradient would be too small to be looked at.
    config = SdtConfig(threshold=0.4, beta=0.0, reuse=reuse, **settings)  # type: ignore[arg-type]
    records, final = SdtTrainer(sampler, router, config).train_trajectory(
        Batch(noise, condition, KEYS).split(size),
        LAMBDA,
        on_gradient=lambda i, grad: gradients.append(grad.clone()),
    )
    numbers = torch.tensor([[r.step, r.mse, r.l1, r.loss] for r in records], dtype=torch.float64)
    return numbers, final, torch.stack(gradients), router.logits()


def is_near(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours - expected).norm() <= NEAR * expected.norm())


@pytest.mark.parametrize("reuse", REUSES)
def test_recomputed_branches_train_the_same_router_bit_for_bit(problem, reuse: str) -> None:
    kept = trained(problem, reuse)
    for ours, expected in zip(trained(problem, reuse, activation_checkpointing=True), kept, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_however_many_branches_are_recomputed_at_a_time(problem, size: int, monkeypatch) -> None:
    monkeypatch.setattr("harmonica.core.passes.branches_per_checkpoint", lambda count: size)
    ours = trained(problem, "forecast", activation_checkpointing=True)
    assert all(map(torch.equal, ours, trained(problem, "forecast")))


def test_the_cache_takes_each_value_once(problem, monkeypatch) -> None:
    written: list[tuple[int, int, bool]] = []
    write = BranchCache.write

    def watched(cache: BranchCache, branch: int, step: int, value: Tensor) -> None:
        written.append((step, branch, value.requires_grad))
        write(cache, branch, step, value)

    monkeypatch.setattr(BranchCache, "write", watched)
    trained(problem, activation_checkpointing=True)
    scores = make_router(problem[0].model).logits().sigmoid()
    refreshed = [(i, b, False) for i in range(4, -1, -1) for b, r in enumerate(scores[i]) if r > 0.4]
    assert written == refreshed


def test_branches_are_recomputed_once_and_the_last_of_them_never(tiny_dit: DiT, batch, monkeypatch) -> None:
    calls: list[int] = []
    for index, branch in enumerate(tiny_dit.branches):

        def counted(hidden, conditioning, index=index, original=branch.compute):
            calls.append(index)
            return original(hidden, conditioning)

        monkeypatch.setattr(branch, "compute", counted)
    noise, labels = batch
    hidden, conditioning = tiny_dit.embed(noise, torch.full_like(labels, 500), labels)
    scores, cache = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True), BranchCache(6)
    planned_pass(tiny_dit, hidden, conditioning, (True,) * 6, cache, 1)
    calls.clear()
    output = soft_pass(tiny_dit, hidden, conditioning, scores, (True,) * 6, cache, 0, recompute=True)
    assert calls == [0, 1, 2, 3, 4, 5]
    output.square().sum().backward()
    assert calls == [0, 1, 2, 3, 4, 5] + [4, 3, 2, 1, 0], "one at a time here, from the last but one"


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_micro_batches_make_the_update_of_the_whole_batch(
    problem, reuse: str, size: int, monkeypatch
) -> None:
    """Three and one rows too: a mean of means would weigh the one as much as the three."""
    whole, rows = trained(problem, reuse), set()
    branch = problem[0].model.branches[0]
    compute = branch.compute
    monkeypatch.setattr(branch, "compute", lambda hidden, c: rows.add(len(hidden)) or compute(hidden, c))
    parts = trained(problem, reuse, size, activation_checkpointing=True)
    assert all(map(is_near, parts, whole))
    assert max(rows) == 2 * min(size, 4), "guided rows at a time"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_lambda_of_micro_batches_is_that_of_the_whole_batch(problem, kind, size: int) -> None:
    sampler, noise, condition = problem
    router, batch = make_router(sampler.model), Batch(noise, condition)
    parts, whole = (
        image_error_proxy(sampler, router, batches, kind=kind, config=SdtConfig(threshold=0.4))
        for batches in (batch.split(size), [batch])
    )
    assert is_near(parts, whole)


@pytest.mark.parametrize("name", ["iddpm", "sa-solver"])
def test_rows_of_a_micro_batch_keep_their_own_noise_at_every_step(tiny_dit: DiT, name) -> None:
    sampler = make_sampler(tiny_dit, replace(STEPS, name=name))
    noise = torch.from_numpy(KEYS.start_noise((4, 8, 8))).double()
    problem = sampler, noise, torch.arange(4)
    assert all(map(is_near, trained(problem, size=3), trained(problem)))
    router = make_router(tiny_dit)
    batch = Batch(noise, problem[2], KEYS)
    parts, whole = (
        image_error_proxy(sampler, router, batches, kind="sensitivity", config=SdtConfig(threshold=0.4))
        for batches in (batch.split(1), [batch])
    )
    assert is_near(parts, whole)


def test_no_more_rows_than_a_micro_batch_go_through_the_model(problem, monkeypatch) -> None:
    sampler, noise, condition = problem
    rows, embed = set(), sampler.model.embed
    monkeypatch.setattr(sampler.model, "embed", lambda x, *rest: (rows.add(len(x)), embed(x, *rest))[1])
    config = TrainingConfig(batch_size=4, micro_batch_size=3, sdt=SdtConfig(threshold=0.4))
    run = RouterTrainer(sampler, config, seed=0)
    run.context.sdt = SdtTrainer(sampler, make_router(sampler.model), config.sdt)
    run.train_one(Batch(noise, condition, KEYS))
    assert rows == {6, 2}, "three rows and one, both halves of guidance"


def test_a_lean_training_is_resumed_bit_for_bit(tiny_dit: DiT, tmp_path) -> None:
    config = TrainingConfig(
        batch_size=4, micro_batch_size=3, iepo_every=2, sdt=SdtConfig(activation_checkpointing=True)
    )
    sampler = make_sampler(tiny_dit, STEPS)
    noise = torch.from_numpy(KEYS.start_noise((4, 8, 8))).double()

    def train(run: RouterTrainer, until: int) -> RouterTrainer:
        while run.trajectory < until:
            run.train_one(Batch((1 + run.trajectory) * noise, torch.arange(4), KEYS))
        return run

    fresh = functools.partial(RouterTrainer, sampler, config, seed=0)
    torch.save(train(fresh(), 3).state(), tmp_path / "state.pt")
    resumed = fresh()
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(train(resumed, 4).router.logits(), train(fresh(), 4).router.logits())
    plain = train(RouterTrainer(sampler, TrainingConfig(batch_size=4, iepo_every=2), seed=0), 4)
    near = close(torch.float32, 4 * 20)  # of the optimiser, whose state is in float32
    torch.testing.assert_close(resumed.router.logits(), plain.router.logits(), **near)


def test_a_negative_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.micro_batch_size is -1: give 1 or more, or 0 for all"):
        TrainingConfig(micro_batch_size=-1)
