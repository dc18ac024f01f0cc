"""SDT and the lambda refresh: beside the released habits, and beside the arithmetic timed alone.

Each comparison first checks that its arms give the same result.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.passes import planned_pass, soft_pass
from harmonica.core.router import Router
from harmonica.data.batch import Batch
from harmonica.models.dit.config import DiTConfig
from harmonica.samplers import Sampler
from harmonica.training.iepo import image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig
from tests.benchmarks.arms import builtin_shape, make_batch, make_dit, make_router, make_sampler
from tests.benchmarks.hardware import Hardware
from tests.benchmarks.live_tensors import peak_of
from tests.benchmarks.timing import Aim, Row, time_arms

TAU = 0.1
CONFIG = SdtConfig(threshold=TAU)


def released_trajectory(sampler: Sampler, router: Router, noise: Tensor, labels: Tensor) -> None:
    """SDT as the released script runs it: the teacher records a graph and is back-propagated as well.

    The caller leaves the weights' `requires_grad` on, so their gradients are computed too. (They are also
    reduced over all workers there; on one worker that costs nothing and is not counted.)
    """
    model = sampler.model
    optimizer = torch.optim.AdamW(router.parameters(), lr=CONFIG.learning_rate, weight_decay=0.0)
    cache = BranchCache(router.num_branches)
    state = sampler.start(noise, labels)
    everything = (True,) * router.num_branches
    for i in reversed(range(sampler.num_steps)):
        timestep = torch.full((len(state.x_MCHW),), sampler.timesteps[i], device=noise.device)
        both = model.guided_condition(labels)
        hidden, conditioning = model.embed(state.x_MCHW, timestep, both)
        if i == sampler.num_steps - 1:
            with torch.no_grad():
                guided = sampler.guide(planned_pass(model, hidden, conditioning, everything, cache, i))
        else:
            target = sampler.guide(model.full_pass(hidden, conditioning))
            scores = router.scores(i)
            refresh = (scores.detach() > TAU).tolist()
            guided = sampler.guide(soft_pass(model, hidden, conditioning, scores, refresh, cache, i))
            loss = (guided - target).square().mean() + CONFIG.beta * scores.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            router.clamp_(CONFIG.clamp)
        state = sampler.advance(i, state, guided.detach())


def arithmetic_alone(sampler: Sampler, noise: Tensor, labels: Tensor) -> None:
    """What an update cannot do without: the first step's forward, then two forwards and a backward a step.

    The backward is that of activations alone; nothing is mixed, cached, compared or updated.
    """
    model = sampler.model
    state = sampler.start(noise, labels)
    with torch.no_grad():
        model.full_pass(*sampler.embed(sampler.num_steps - 1, state))
    for i in reversed(range(sampler.num_steps - 1)):
        with torch.no_grad():
            hidden, conditioning = sampler.embed(i, state)
            model.full_pass(hidden, conditioning)
        hidden.requires_grad_(True)
        output = model.full_pass(hidden, conditioning)
        torch.autograd.grad(output.sum(), hidden)


def _sdt(
    name: str, shape: DiTConfig | str, labels: int, steps: int, rounds: int, hardware: Hardware
) -> Iterator[Row]:
    sampler = make_sampler(make_dit(shape, hardware), steps)
    model, batch = sampler.model, make_batch(sampler.model, labels)
    start, lambda_T = make_router(sampler).logits(), torch.ones(steps - 1, device=hardware.device)

    def ours() -> Tensor:
        router = Router.from_logits(start)
        SdtTrainer(sampler, router, CONFIG).train_trajectory([Batch(*batch)], lambda_T)
        return router.logits()

    def released() -> Tensor:
        router = Router.from_logits(start)
        model.requires_grad_(True)
        released_trajectory(sampler, router, *batch)
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None
        return router.logits()

    def floor() -> None:
        arithmetic_alone(sampler, *batch)

    if hardware.dtype == torch.float32:  # in half precision gradients of the released mean underflow
        torch.testing.assert_close(ours(), released(), rtol=1e-3, atol=1e-3)
    arms = time_arms({"ours": ours, "released habits": released, "arithmetic alone": floor}, rounds=rounds)
    seconds = {arm: timing.median_s for arm, timing in arms.items()}
    what = f"SDT on {name}, {steps - 1} updates, {labels} labels and guidance"
    what += f" ({(steps - 1) / seconds['ours']:.3g} updates a second)"
    ratio = seconds["ours"] / seconds["released habits"]
    yield Row.judge(f"{what}: time", arms, ratio, "of the released time", Aim("<=", 0.55))
    ratio = seconds["ours"] / seconds["arithmetic alone"]
    yield Row.judge(f"{what}: time", arms, ratio, "of two forwards and a backward", Aim("<=", 1.10))
    peaks = {arm: peak_of(model, run) for arm, run in (("ours", ours), ("released habits", released))}
    said = ", ".join(f"{arm} {peak / 2**20:.0f} MiB" for arm, peak in peaks.items())
    ratio = peaks["ours"] / peaks["released habits"]
    unit = f"of the released peak beside the weights ({said})"
    yield Row.judge(f"{what}: memory", {}, ratio, unit, Aim("<=", 0.50))


def sdt_update(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
    """SDT on DiT-B/2 and on the built-in shape; on a GPU, on DiT-XL/2 with the paper's batch."""
    if hardware.is_gpu:
        yield from _sdt("DiT-XL/2", "DiT-XL/2", 32, 5, 5, hardware)
    yield from _sdt("DiT-B/2", "DiT-B/2", 2, 4 if whole else 3, 5 if whole else 3, hardware)
    yield from _sdt("the built-in shape", builtin_shape(), 4, 5, 5, hardware)


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


def lambda_refresh(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
    """lambda of all steps, with shared prefixes and as T whole generations."""
    for steps, aim in ((10, 0.60), (20, 0.56)):
        sampler = make_sampler(make_dit(builtin_shape(), hardware), steps)
        batch, router = make_batch(sampler.model, 2), make_router(sampler)

        def shared(sampler=sampler, router=router, batch=batch) -> Tensor:
            return image_error_proxy(
                sampler, router, [Batch(*batch)], kind="leave_one_out", config=SdtConfig(threshold=TAU)
            )

        def generations(sampler=sampler, router=router, batch=batch) -> Tensor:
            noise, labels = batch
            main = whole_generation(sampler, router, noise, labels, None)
            others = (
                whole_generation(sampler, router, noise, labels, i) for i in range(sampler.num_steps - 1)
            )
            return torch.stack([(other - main).square().mean() for other in others])

        torch.testing.assert_close(shared(), generations(), rtol=10 * hardware.tolerance, atol=1e-9)
        arms = time_arms({"shared prefixes": shared, "T generations": generations}, rounds=5 if whole else 3)
        ratio = arms["shared prefixes"].median_s / arms["T generations"].median_s
        what = f"lambda refresh, built-in shape, T = {steps}, 2 labels and guidance"
        unit = f"of T generations (arithmetic {(steps + 1) / 2 / steps:.3f})"
        yield Row.judge(what, arms, ratio, unit, Aim("<=", aim))
