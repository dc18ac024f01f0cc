"""The arms of `python -m tests.benchmarks gpu`, by section, the important ones first.

Random weights of the public shapes, since speed does not depend on what was learnt. A section makes its model
when it begins, and arms of one model share what is compiled.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.execution import compiled
from harmonica.models.base import Execution, freeze
from harmonica.models.dit.config import DiTConfig, dit_shape
from harmonica.models.dit.model import DiT
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import Sampler, State
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig
from tests.benchmarks.arms import make_batch, make_noise, make_router, make_sampler, random_plan
from tests.benchmarks.gpu_modules import (
    captured,
    diffusers_dit,
    diffusers_pixart,
    planned_dit,
    taylor_seer,
    with_db_cache,
)
from tests.benchmarks.hardware import Hardware
from tests.benchmarks.sampling import make_pixart

DIFFUSERS = "diffusers, torch.compile"
TINY = DiTConfig(
    sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
    attention_head_dim=8, num_embeds_ada_norm=10,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """One way to do one batch."""

    section: str
    name: str
    batch: int
    run: Callable[[], Tensor]
    full: str = ""
    """Name of the arm that computes everything in the same way."""
    ideal: float = 1.0
    """Multiply-accumulates of a full trajectory over those of this one."""
    updates: int = 0
    """Updates of a router."""
    is_graphed: Callable[[], bool] = lambda: True
    """Whether its steps run as its name says, once it has run twice."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What was asked for."""

    device: str
    tiny: bool
    batches: tuple[int, ...]
    levels: tuple[Execution, ...]

    @property
    def hardware(self) -> Hardware:
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        return Hardware(self.device, dtype, compiled=True)


@lru_cache(maxsize=1)  # sections that follow each other share it
def make_model(shape: DiTConfig, hardware: Hardware) -> DiT:
    """A frozen random DiT, made where it runs."""
    with torch.device(hardware.device):
        model = DiT(shape)
    model.initialize(torch.Generator(hardware.device).manual_seed(0), zero=False)
    freeze(model)
    model = hardware.place(model)
    model.graph_bytes = 32 * 2**30
    return model


def dit_sampler(setting: Setting, name: str = "DiT-XL/2") -> Sampler:
    """Guided DDIM on a DiT: 20 steps."""
    model = make_model(TINY if setting.tiny else dit_shape(name), setting.hardware)
    return make_sampler(model, 4 if setting.tiny else 20)


def plans(sampler: Sampler, cur: float = 0.375) -> dict[str, Plan | None]:
    """Everything, every second step, and entries at random."""
    steps, branches = sampler.num_steps, len(sampler.model.branches)
    even = Plan(tuple(((steps - 1 - i) % 2 == 0,) * branches for i in range(steps)))
    return {"full": None, "even": even, f"random {cur:.1%}": random_plan(steps, branches, cur)}


def ours(
    section: str,
    sampler: Sampler,
    batch: tuple[Tensor, Any],
    plan: tuple[str, Plan | None],
    *,
    execution: Execution = "graphed",
    residual: str = "float32",
    reuse: Reuse = "hold",
) -> Arm:
    """Our sampler at one level under one plan."""
    model, way, (title, rows) = sampler.model, f"{execution} {residual}", plan

    def run() -> Tensor:
        model.execution = execution
        model.residual_dtype = model.dtype if residual == "weights" else None
        return sample(sampler, *batch, rows, reuse=reuse)

    def is_graphed() -> bool:
        return execution != "graphed" or (len(model.graphs) > 0 and not model.graphs.reasons)

    name = f"{way} {title}" + (f" {reuse}" if rows else "")
    ideal = rows.ideal_speedup(model.macs()) if rows else 1.0
    return Arm(section, name, len(batch[0]), run, f"{way} full", ideal, is_graphed=is_graphed)


def theirs(
    section: str, name: str, sampler: Sampler, batch: tuple[Tensor, Any], module: Callable[..., Tensor]
) -> Arm:
    """A whole guided trajectory of diffusers' module, with our sampler's arithmetic around it."""
    noise, condition = batch
    guided_condition = sampler.model.guided_condition(condition)

    @torch.inference_mode()
    def run() -> Tensor:
        state = State(torch.cat([noise, noise]), ())
        for i in reversed(range(sampler.num_steps)):
            timestep = torch.full((len(state.x_MCHW),), int(sampler.timesteps[i]), device=noise.device)
            output = module(state.x_MCHW, timestep, guided_condition)
            state = sampler.advance(i, state, sampler.guide(output))
        return sampler.finish(state)

    return Arm(section, name, len(noise), run)


def dit_256(setting: Setting, section: str = "dit-256") -> Iterator[Arm]:
    """DiT-XL/2 at 256: the first arms of the process show what its first image takes."""
    sampler = dit_sampler(setting)
    module = diffusers_dit(sampler.model, setting.hardware, mode="reduce-overhead")
    for size in setting.batches:
        sampler.model.graphs = None  # recordings of the last batch size
        batch = make_batch(sampler.model, size)
        first, *others = plans(sampler).items()
        if "graphed" in setting.levels:
            yield ours(section, sampler, batch, first)
        yield theirs(section, DIFFUSERS, sampler, batch, module)
        if "graphed" in setting.levels:
            for each in others:
                yield ours(section, sampler, batch, each)
            yield applied(section, sampler, batch, others[0], setting.hardware)


def applied(
    section: str,
    sampler: Sampler,
    batch: tuple[Tensor, Any],
    plan: tuple[str, Plan | None],
    hardware: Hardware,
) -> Arm:
    """diffusers' module under a plan of `harmonica.apply`, each of its steps a graph."""
    title, rows = plan
    assert rows is not None, "a plan reuses something"
    module, recordings = planned_dit(sampler, hardware, rows)
    arm = theirs(section, f"harmonica.apply, graphed {title} hold", sampler, batch, module)
    return dataclasses.replace(
        arm,
        full=DIFFUSERS,
        ideal=rows.ideal_speedup(sampler.model.macs()),
        is_graphed=lambda: len(recordings()) > 0 and not recordings().reasons,
    )


def dit_256_more(setting: Setting, section: str = "dit-256") -> Iterator[Arm]:
    """Forecasts, more reuse, the other residual stream, and the other levels."""
    sampler = dit_sampler(setting)
    more = plans(sampler) | plans(sampler, 0.5)
    for size in setting.batches:
        sampler.model.graphs = None
        batch = make_batch(sampler.model, size)
        for execution in setting.levels:
            for residual in ("float32", "weights") if execution == "graphed" else ("float32",):
                way = partial(ours, section, sampler, batch, execution=execution, residual=residual)
                is_done = execution == "graphed" and residual == "float32"
                for each in more.items():
                    if not is_done or each[0] == "random 50.0%":
                        yield way(each)
                    if each[1] is not None:
                        yield way(each, reuse="forecast")


def dit_512(setting: Setting, section: str = "dit-512") -> Iterator[Arm]:
    """DiT-XL/2 at 512."""
    shape = TINY if setting.tiny else dataclasses.replace(dit_shape("DiT-XL/2"), sample_size=64)
    sampler = make_sampler(make_model(shape, setting.hardware), 4 if setting.tiny else 20)
    module = diffusers_dit(sampler.model, setting.hardware)
    for size in setting.batches[:2]:
        sampler.model.graphs = None
        yield from _all(section, sampler, make_batch(sampler.model, size), module)


def _all(
    section: str,
    sampler: Sampler,
    batch: tuple[Tensor, Any],
    module: Callable[..., Tensor],
    cur: float = 0.375,
) -> Iterator[Arm]:
    """diffusers' module with its blocks compiled and its step captured, and our graphs."""
    yield theirs(section, DIFFUSERS, sampler, batch, captured(module))
    for each in plans(sampler, cur).items():
        yield ours(section, sampler, batch, each)
    for each in list(plans(sampler, cur).items())[1:]:
        yield ours(section, sampler, batch, each, reuse="forecast")


def _pixart(setting: Setting, section: str, latent_size: int, steps: int) -> Iterator[Arm]:
    size, layers, tokens = (8, 2, 7) if setting.tiny else (latent_size, 28, 300)
    hardware = setting.hardware
    model = make_pixart(size, layers, hardware, **({"width": 24} if setting.tiny else {}))
    model.graph_bytes = 32 * 2**30
    text = torch.randn(1, tokens, 4096, device=hardware.device, dtype=hardware.dtype)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=hardware.device)
    condition = TextCondition(embeddings=text, mask=mask, negative_embeddings=-text, negative_mask=mask)
    sampler = make_sampler(model, 4 if setting.tiny else steps)
    module = diffusers_pixart(model, hardware)
    yield from _all(section, sampler, (make_noise(model, 1), condition), module, 0.55)


def sdt(setting: Setting, section: str = "sdt") -> Iterator[Arm]:
    """Updates of a router a second, on the paper's batch of 64 rows."""
    model = dit_sampler(setting).model
    model.graphs, model.residual_dtype = None, None
    sampler = make_sampler(model, 4)
    batch = Batch(*make_batch(model, 2 if setting.tiny else 32))
    start, lambda_T = make_router(sampler).logits(), torch.ones(3, device=setting.device)

    def run(execution: Execution) -> Tensor:
        model.execution = execution
        router = Router.from_logits(start)
        SdtTrainer(sampler, router, SdtConfig()).train_trajectory([batch], lambda_T)
        return router.logits()

    for execution in ("compiled", "eager"):
        yield Arm(section, f"SDT {execution}", len(batch), partial(run, execution), updates=3)


def caches(setting: Setting, section: str = "caches") -> Iterator[Arm]:
    """Caches of other libraries on diffusers' module, run eagerly since they break its graph.

    Each reuses at every second step; by thresholds that anything is below, as weights are random.
    """
    sampler, hardware = dit_sampler(setting), setting.hardware
    batch = make_batch(sampler.model, setting.batches[-1] if setting.tiny else 8)
    even, macs = plans(sampler)["even"], sampler.model.macs()
    assert even is not None
    plain = "diffusers, eager"
    yield theirs(section, plain, sampler, batch, diffusers_dit(sampler.model, hardware, mode="eager"))
    module, start = taylor_seer(sampler.model, hardware)
    yield _with(theirs(section, "diffusers TaylorSeer", sampler, batch, module), start, plain, even, macs)
    if importlib.util.find_spec("cache_dit") is not None:
        module, start = with_db_cache(sampler.model, hardware, sampler.num_steps)
        yield _with(theirs(section, "cache-dit DBCache", sampler, batch, module), start, plain, even, macs)


def _with(arm: Arm, start: Callable[[], None], full: str, even: Plan, macs: Any) -> Arm:
    """An arm whose cache is reset before each trajectory."""

    def run() -> Tensor:
        start()
        return arm.run()

    return dataclasses.replace(arm, run=run, full=full, ideal=even.ideal_speedup(macs))


def pipeline(setting: Setting, section: str = "flux-1024") -> Iterator[Arm]:
    """Even steps in the loop of diffusers' own pipeline, eager and with compiled blocks."""
    from tests.benchmarks.gpu_pipelines import draws

    make_model.cache_clear()  # its memory is wanted
    for name, full, ideal, draw in draws(setting.hardware, is_tiny=setting.tiny):
        yield Arm(section, name, 1, draw, full, ideal)


def static(setting: Setting, section: str = "dit-256") -> Iterator[Arm]:
    """Our graphs once more with sizes that are no symbols; the last, since it compiles anew."""
    sampler, size = dit_sampler(setting), setting.batches[1] if len(setting.batches) > 1 else 1
    batch, model = make_batch(sampler.model, size), sampler.model
    compiled.compiled_for.cache_clear()
    model.graphs = None
    for each in list(plans(sampler).items())[:2]:
        arm = ours(section, sampler, batch, each)

        def run(arm: Arm = arm) -> Tensor:
            with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
                return arm.run()

        name = f"{arm.name}, static sizes"
        yield dataclasses.replace(arm, name=name, run=run, full=f"{arm.full}, static sizes")


SECTIONS: dict[str, Callable[[Setting], Iterator[Arm]]] = {
    "dit-256": dit_256,
    "flux-1024": pipeline,
    "sdt": sdt,
    "caches": caches,
    "pixart-1024": lambda setting: _pixart(setting, "pixart-1024", 128, 20),
    "dit-512": dit_512,
    "pixart-2048": lambda setting: _pixart(setting, "pixart-2048", 256, 8),
    "dit-256-more": dit_256_more,
    "static": static,
}
"""In the order of their importance."""
