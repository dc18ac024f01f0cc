"""What the method's design saves: frozen base, shared prefixes, branches that are not run.

Each comparison first checks that its arms give the same result. Random weights in the built-in model's
shape: a DiT's speed does not depend on what it has learnt.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from harmonica.builtin import FASHION_DIT
from harmonica.cache import BranchCache, Reuse
from harmonica.iepo import image_error_proxy
from harmonica.models.dit import DiT
from harmonica.models.loading import read_folder_config
from harmonica.passes import planned_pass, soft_pass
from harmonica.plan import Plan
from harmonica.router import Router
from harmonica.samplers import Ddim, Sampler, SamplerConfig
from harmonica.sampling import sample
from harmonica.sdt import SdtConfig, SdtTrainer, freeze
from tests.benchmarks.timing import Aim, Row, time_arms

TAU = 0.1
CONFIG = SdtConfig(threshold=TAU)


def make_sampler(num_steps: int) -> Ddim:
    """Guided DDIM of a frozen random model."""
    shape, _ = read_folder_config(FASHION_DIT)  # the built-in model's
    model = DiT(shape)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    freeze(model)
    return Ddim(model, SamplerConfig(num_inference_steps=num_steps))


def make_batch(size: int) -> tuple[Tensor, Tensor]:
    """Noise and labels."""
    noise = torch.randn(size, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return noise, torch.arange(size) % 10


def make_router(sampler: Sampler) -> Router:
    """Random scores on both sides of tau."""
    generator = torch.Generator().manual_seed(2)
    shape = (sampler.num_steps, len(sampler.model.branches))
    return Router.from_logits((2 * torch.randn(shape, generator=generator) - 2).clamp(-5, 5))


def released_trajectory(sampler: Sampler, router: Router, noise: Tensor, labels: Tensor) -> None:
    """SDT as the released script runs it: the teacher records a graph and is back-propagated as well.

    The caller leaves the weights' `requires_grad` on, so their gradients are computed too.
    """
    model = sampler.model
    optimizer = torch.optim.AdamW(router.parameters(), lr=CONFIG.learning_rate, weight_decay=0.0)
    cache = BranchCache(router.num_branches)
    state = sampler.start(noise, labels)
    for i in reversed(range(sampler.num_steps)):
        hidden, conditioning = sampler.embed(i, state)
        if i == sampler.num_steps - 1:
            with torch.no_grad():
                row = (True,) * router.num_branches
                guided = sampler.guide(planned_pass(model, hidden, conditioning, row, cache, i))
        else:
            empty = BranchCache(router.num_branches)
            row = (True,) * router.num_branches
            target = sampler.guide(planned_pass(model, hidden, conditioning, row, empty, i))
            scores = router.scores(i)
            refresh = (scores.detach() > TAU).tolist()
            guided = sampler.guide(soft_pass(model, hidden, conditioning, scores, refresh, cache, i))
            loss = (guided - target).square().mean() + CONFIG.beta * scores.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            router.clamp_(CONFIG.clamp)
        state = sampler.advance(i, state, guided.detach())


def sdt_update() -> Iterator[Row]:
    """One SDT update (with its share of the trajectory's first step), ours and as released."""
    sampler, batch = make_sampler(5), make_batch(4)
    model, start = sampler.model, make_router(sampler).logits()
    lambda_T = torch.ones(sampler.num_steps - 1)

    def ours() -> Tensor:
        router = Router.from_logits(start)
        SdtTrainer(sampler, router, CONFIG).train_trajectory(*batch, lambda_T)
        return router.logits()

    def released() -> Tensor:
        router = Router.from_logits(start)
        model.requires_grad_(True)
        released_trajectory(sampler, router, *batch)
        model.requires_grad_(False)
        return router.logits()

    torch.testing.assert_close(ours(), released(), rtol=1e-3, atol=1e-3)
    arms = time_arms({"ours": ours, "released habits": released}, rounds=5)
    ratio = arms["ours"].median_s / arms["released habits"].median_s
    what = f"SDT, {sampler.num_steps - 1} updates, batch 4, guided"
    yield Row.judge(what, arms, ratio, "of the released time", Aim("<=", 0.65))


@torch.inference_mode()
def whole_generation(
    sampler: Sampler, router: Router, noise: Tensor, labels: Tensor, left_out: int | None
) -> Tensor:
    """Final latents with the cache switched off at one step, from the very start."""
    cache = BranchCache(router.num_branches)
    state = sampler.start(noise, labels)
    for i in reversed(range(sampler.num_steps)):
        hidden, conditioning = sampler.embed(i, state)
        if i in (left_out, sampler.num_steps - 1):
            row = (True,) * router.num_branches
            output = planned_pass(sampler.model, hidden, conditioning, row, cache, i)
        else:
            scores = router.scores(i)
            refresh = (scores > TAU).tolist()
            output = soft_pass(sampler.model, hidden, conditioning, scores, refresh, cache, i)
        state = sampler.advance(i, state, sampler.guide(output))
    return state.x_MCHW


def lambda_refresh() -> Iterator[Row]:
    """lambda of all steps, with shared prefixes and as T whole generations."""
    sampler, batch = make_sampler(10), make_batch(2)
    router = make_router(sampler)

    def shared() -> Tensor:
        return image_error_proxy(sampler, router, *batch, kind="leave_one_out", threshold=TAU)

    def whole() -> Tensor:
        main = whole_generation(sampler, router, *batch, None)
        others = (whole_generation(sampler, router, *batch, i) for i in range(sampler.num_steps - 1))
        return torch.stack([(other - main).square().mean() for other in others])

    torch.testing.assert_close(shared(), whole(), rtol=1e-3, atol=1e-9)
    arms = time_arms({"shared prefixes": shared, "T generations": whole}, rounds=3)
    ratio = arms["shared prefixes"].median_s / arms["T generations"].median_s
    yield Row.judge(
        "lambda refresh, T = 10, batch 2, guided", arms, ratio, "of T generations", Aim("<=", 0.60)
    )


def random_plan(num_steps: int, num_branches: int, cur: float) -> Plan:
    """Reuse spread evenly over all rows but T-1."""
    entries = (num_steps - 1) * num_branches
    chosen = torch.randperm(entries, generator=torch.Generator().manual_seed(3))
    compute = torch.ones(num_steps * num_branches, dtype=torch.bool)
    compute[chosen[: round(cur * num_steps * num_branches)]] = False
    return Plan(tuple(map(tuple, compute.reshape(num_steps, num_branches).tolist())))


def planned_trajectory() -> Iterator[Row]:
    """How much of the arithmetic a plan leaves out is also time left out."""
    sampler, batch = make_sampler(10), make_batch(4)
    macs, num_branches = sampler.model.macs(), len(sampler.model.branches)
    plans = {cur: random_plan(sampler.num_steps, num_branches, cur) for cur in (0.3, 0.5)}
    reuses: tuple[Reuse, ...] = ("hold", "forecast")

    def arm(plan: Plan | None, reuse: Reuse):
        return lambda: sample(sampler, *batch, plan, reuse=reuse)

    full_plan = Plan.full(sampler.num_steps, num_branches)
    assert torch.equal(arm(None, "hold")(), arm(full_plan, "forecast")())
    arms = {"full": arm(None, "hold")}
    arms |= {f"{reuse} {cur:.0%}": arm(plan, reuse) for cur, plan in plans.items() for reuse in reuses}
    timings = time_arms(arms, rounds=7)
    for cur, plan in plans.items():
        for reuse in reuses:
            full, cached = timings["full"], timings[f"{reuse} {cur:.0%}"]
            share = (1 - cached.median_s / full.median_s) / (1 - 1 / plan.ideal_speedup(macs))
            yield Row.judge(
                f"planned sampling, T = 10, batch 4, guided, CUR {plan.cur:.0%}, {reuse}",
                {"full": full, "cached": cached},
                share,
                "realised share",
                Aim(">=", 0.95),
            )


BENCHMARKS = (sdt_update, lambda_refresh, planned_trajectory)
