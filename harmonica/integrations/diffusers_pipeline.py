"""Use a plan in an unmodified diffusers pipeline: `apply` and `remove`.

    pipe = PixArtSigmaPipeline.from_pretrained(...)
    harmonica.apply(pipe.transformer, "router/")
    pipe("a harmonica", num_inference_steps=20).images[0].save("harmonica.png")

The plan is a trained router's; `harmonica.EvenSteps` is one that needs no training.

With a router that was trained for a model with branch files (DiT, PixArt and Sana), the transformer's
forward is replaced by a walk over its branches, the very functions that our sampler calls: a reused branch
costs one fused multiply-add, and the images are ours. Hooks on the sub-layers (diffusers' own way) would
still run the norm and the modulation of each reused branch, and each would pick from the plan inside a
compiled graph. The walk does not call the blocks themselves, so hooks on those (group offloading, a device
map) are refused. Under any other router, and under `EvenSteps`, the transformer's own forward runs, and what
is reused is replaced inside (`harmonica.integrations.recorded`).

Nothing checks what a transformer does not see: the guidance scale, and a scheduler that visits the right
timesteps by another rule. The first timestep, or those of the scheduler, are read back once a call; others
are compared at its end (`harmonica.integrations.timestep_reader`), so no step between waits for the device. A
transformer follows one call at a time, and refuses a second that comes meanwhile. Under `torch.compile` each
distinct row of the plan (with forecasts, each step) is a graph of its own, compiled in the first trajectory;
with `execution` compiled instead, each kind of branch is one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.adapters import pipeline_transformer
from harmonica.integrations.compiled_modules import allows_no_break, any_compiled, has_cuda_graphs
from harmonica.integrations.forward_holders import own_forward
from harmonica.integrations.forward_slots import (
    STATE,
    check_own_forward,
    is_on,
    put_on,
    take_off,
    unwrapped,
)
from harmonica.integrations.pipeline_transformer import PipelineTransformer
from harmonica.integrations.planned_forward import PipelineExecution, PlannedForward
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.integrations.recorded.even_trajectory import EvenTrajectory, even_calls
from harmonica.integrations.recorded.pipelines import is_recorded, planned_calls, transformers_of
from harmonica.integrations.recorded.trajectory import TransformerCall
from harmonica.integrations.step_tracker import StepCounter
from harmonica.integrations.weight_check import matched_fingerprint, other_weights
from harmonica.models.base import BranchedTransformer
from harmonica.samplers import make_sampler
from harmonica.torchvision_ops import ensure_torchvision_imports

# A pipeline that is imported after this module imports torchvision, also where torch's plug-ins are off.
ensure_torchvision_imports()


def apply(
    transformer: Any,
    artifact: RouterArtifact | EvenSteps | str | Path,
    *,
    allow_other_sampler: bool = False,
    check_weights: bool = True,
    execution: PipelineExecution = "eager",
) -> None:
    """Run a pipeline's transformer under a plan, until `remove`.

    Before or after `torch.compile` and `enable_model_cpu_offload`. Height, width, batch and guidance may
    change from call to call. `save_pretrained` saves the plain model; `copy.deepcopy` takes the plan along,
    and so do pickle and `torch.save` for a DiT, PixArt or Sana.

    Args:
        transformer: a pipeline, or `pipe.transformer`, changed in place. A pipeline whose trajectories are
            shared by two transformers (Wan 2.2) has to be given itself.
        artifact: a router, or its folder; or `EvenSteps()`, which needs no training.
        allow_other_sampler: count calls, whatever their timesteps. For routers of ddim and iddpm, whose
            steps are the public DiT code's and no diffusers scheduler's, and for measuring transfer.
        check_weights: False where the weights are the router's in another form: quantised, or with an adapter
            (LoRA) fused into them. The same weights in bfloat16 or float16, with an adapter beside them or
            with fused projections of queries, keys and values, are recognised.
        execution: `compiled` runs each branch as one graph of torch.compile, one a kind for all blocks and
            rows of the plan; leave the transformer itself uncompiled then. `graphed`, for a router with a
            branch file, replays each step from a CUDA graph of those, from the second call of a shape on.
            `auto` does that on CUDA, and nothing for other plans. Where the pipeline's owner has compiled
            the blocks, as `compile_repeated_blocks` does, they stay compiled, and so are the branches in
            them.

    Raises:
        ValueError: no such execution, or not for this plan, there is a plan already, or the router was not
            made for this model, or its sampler is none that a pipeline can follow, or the transformer is
            compiled in a way that no plan can be part of.
    """
    if execution not in get_args(PipelineExecution):
        raise ValueError(f"execution is {execution!r}: give one of {', '.join(get_args(PipelineExecution))}")
    given = transformers_of(transformer)
    modules = [unwrapped(each) for each in given]
    if any(hasattr(module, STATE) for module in modules):
        raise ValueError("transformer has a plan already: harmonica.remove(transformer) first")
    if not isinstance(artifact, RouterArtifact | EvenSteps):
        artifact = RouterArtifact.load(artifact)
    replaced: list[tuple[nn.Module, PlannedForward | TransformerCall]]
    forwards = [own_forward(module) for module in modules]
    is_whole = any(each is not module for each, module in zip(given, modules)) or any_compiled(modules)
    is_inside = isinstance(artifact, EvenSteps) or is_recorded(artifact)
    _check_execution(execution, (*given, *modules), is_inside=is_inside, is_whole=is_whole)
    # Recorded branches end the graphs of a transformer that is compiled as a whole.
    is_compiled = execution == "compiled" or is_whole
    if isinstance(artifact, EvenSteps):
        replaced = list(zip(modules, even_calls(modules, forwards, artifact, is_compiled=is_compiled)))
    elif is_recorded(artifact):
        calls = planned_calls(
            modules,
            forwards,
            artifact,
            allow_other_sampler=allow_other_sampler,
            check_weights=check_weights,
            is_compiled=is_compiled,
        )
        replaced = list(zip(modules, calls))
    else:
        # A step is part of the graph of a transformer that is compiled as a whole.
        alone = "eager" if is_whole and execution == "auto" else execution
        replaced = [
            (
                modules[0],
                _planned_forward(modules[0], artifact, allow_other_sampler, check_weights, alone),
            )
        ]
    for module, _ in replaced:
        check_own_forward(module)
    for module, planned in replaced:
        put_on(module, planned)


def _check_execution(
    execution: PipelineExecution, modules: Sequence[Any], *, is_inside: bool, is_whole: bool
) -> None:
    """Refuse what no plan can be part of.

    Args:
        modules: the transformers, also as torch.compile has wrapped them.
        is_inside: whether the transformers' own forwards run, with the plan inside.
        is_whole: whether one is compiled as a whole.
    """
    if execution == "graphed" and is_inside:
        raise ValueError(
            "execution is 'graphed', which needs a router that was trained with a branch file (DiT, PixArt, "
            "Sana): compile the pipeline's blocks, or give execution='compiled'"
        )
    if execution == "graphed" and is_whole:
        raise ValueError(
            "execution is 'graphed', and the transformer is compiled as a whole: leave it uncompiled"
        )
    if is_inside and any(map(allows_no_break, modules)):
        raise ValueError(
            "transformer is compiled as a whole with fullgraph=True, and its graph ends where a plan begins: "
            "compile its blocks in its place, transformer.compile_repeated_blocks(fullgraph=True)"
        )
    if not is_inside and any(map(has_cuda_graphs, modules)):
        raise ValueError(
            "transformer is compiled as a whole with CUDA graphs (mode reduce-overhead or max-autotune), "
            "which write over the values that a plan keeps: leave it uncompiled and give execution='graphed'"
        )


def _planned_forward(
    module: nn.Module,
    artifact: RouterArtifact,
    allow_other_sampler: bool,
    check_weights: bool,
    execution: PipelineExecution,
) -> PlannedForward:
    """Return the forward of a class that has branches of its own."""
    model = pipeline_transformer(module, artifact.model)
    model.check()
    _check_weights_and_shape(model, artifact, check_weights)
    config, plan = artifact.sampler, artifact.plan
    timesteps = None if allow_other_sampler else _timesteps(model.view, artifact)
    scheduler = (config.scheduler or {}).get("_class_name", config.name)
    steps = StepCounter(plan.num_steps, timesteps, scheduler)
    return PlannedForward(model, plan, artifact.reuse, steps, execution)


def remove(transformer: Any) -> None:
    """Restore the transformer, or those of a pipeline, as they were before `apply`.

    Raises:
        ValueError: there is no plan, or something wraps it.
    """
    modules = [unwrapped(each) for each in transformers_of(transformer)]
    plans: list[PlannedForward | TransformerCall | None] = [
        getattr(module, STATE, None) for module in modules
    ]
    for module, planned in zip(modules, plans):
        if planned is None:
            raise ValueError("transformer has no plan: harmonica.apply puts one on")
        if not is_on(module, planned):
            raise ValueError("transformer.forward is not the plan's, something wraps it: take that off first")
        planned.reset()
        if isinstance(planned, TransformerCall):
            planned.close()
    for module, planned in zip(modules, plans):
        take_off(module, planned)


def even_speedup(transformer: Any) -> float:
    """Return how many times less arithmetic the last call took under `EvenSteps`.

    Args:
        transformer: a pipeline, or its transformer.

    Raises:
        ValueError: it has no such plan, or has not been called since that came.
    """
    call = getattr(unwrapped(transformers_of(transformer)[0]), STATE, None)
    trajectory = getattr(call, "trajectory", None)
    if not isinstance(trajectory, EvenTrajectory) or not trajectory.views[0].is_recorded:
        raise ValueError(
            "transformer has not run under EvenSteps: harmonica.apply it, then call the pipeline"
        )
    return trajectory.ideal_speedup()


def _check_weights_and_shape(
    model: PipelineTransformer, artifact: RouterArtifact, check_weights: bool
) -> None:
    parameters = list(model.transformer.parameters())
    found = matched_fingerprint(parameters, model.fingerprint, artifact, check_weights=check_weights)
    model.view.recorded_fingerprint = found
    try:
        artifact.check(model.view, artifact.sampler)
    except ValueError as error:
        if not str(error).startswith("model.weights "):
            raise
        raise other_weights(found, artifact) from None


def _timesteps(view: BranchedTransformer, artifact: RouterArtifact) -> Sequence[float]:
    """Return the timesteps that a pipeline has to visit, ascending."""
    config, cure = artifact.sampler, "apply with allow_other_sampler to measure what it is worth here"
    if config.name in ("ddim", "iddpm"):
        raise ValueError(
            f"sampler.name is {config.name}, whose steps no scheduler of diffusers takes: {cure}, or train a "
            "router with dpm-solver++, sa-solver or diffusers"
        )
    if config.is_guided and config.guidance_channels != "all":
        raise ValueError(
            f"sampler.guidance_channels is {config.guidance_channels} and diffusers' pipelines guide all: "
            f"{cure}, or train a router with all"
        )
    return make_sampler(view, config).timesteps
