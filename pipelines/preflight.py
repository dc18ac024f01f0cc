"""Check before any work what a run's stages need of each other and the model."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from harmonica.data.conditions import check_conditions
from harmonica.io.paths import shown
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import LoadedModel, load_model
from harmonica.samplers import SamplerConfig, make_sampler, with_scheduler
from harmonica.training.feasibility import check_quality_target, check_training
from harmonica.validation.settings import require

from .compare.results import is_complete
from .config.workflow import Stage, WorkflowConfig
from .data.read_prompts import check_prompts
from .evaluation.metric_networks import check_metric_files, check_metric_settings
from .evaluation.variants import transfer_samplers
from .pipeline_settings import refuse_settings
from .run_state import resume
from .run_state.resume import ROUTER
from .run_state.routers import load_router
from .run_state.storage import RunStorage
from .serving.auth import load_keys
from .serving.model_check import check_is_whole
from .serving.servable_pipeline import check_servable


def check_model(config: WorkflowConfig, storage: RunStorage) -> tuple[WorkflowConfig, tuple[str, ...]]:
    """Check the model and that every stage asked for has what it works on.

    Returns:
        The settings, with the sampler as the model's own scheduler completes it, and the names of classes.

    Raises:
        ValueError: names field, value and cure.
    """
    if config.pipeline.enabled:
        check_pipeline(config, storage)
        return config, ()
    loaded = load_model(config.model)
    sampler = with_scheduler(config.sampler, loaded.scheduler)
    config = dataclasses.replace(config, sampler=sampler)
    make_sampler(loaded.model, sampler)
    check_stages(config, storage, loaded)
    return config, loaded.class_names


def check_pipeline(config: WorkflowConfig, storage: RunStorage) -> None:
    """Check a diffusers pipeline by what its folder says, before any of it is loaded.

    Raises:
        ValueError: names field, value and cure.
    """
    from harmonica.integrations.pipeline_folder import PipelineFolder
    from harmonica.pipeline_training.trainable import check_trainable

    refuse_settings(config)
    if not config.model.path:
        raise ValueError("model.path is '': give the folder of a diffusers pipeline")
    folder = PipelineFolder.read(config.model.path, config.model.revision)
    check_trainable(folder, config.pipeline.call(config.sampler.num_inference_steps))
    _check_router(config, storage)
    _check_promotion(config, storage)
    to_do = {stage for stage in config.stages if not resume.is_finished(stage, config, storage)}
    if "train" in to_do:
        check_quality_target(config.train, folder.has_pictures)
    if resume.is_finished("prompts", config, storage):
        pass
    elif late := _before(config.stages, "prompts", ("train", "evaluate", "register", "serve")):
        raise ValueError(_no_prompts(config, late))
    else:
        check_prompts(config.prompts)
    if "evaluate" in to_do:
        _check_pipeline_metrics(config, folder.has_vae)
    if "serve" in to_do:
        check_servable(folder, config.model)
        load_keys(config.serve.api_keys_file)


def _check_pipeline_metrics(config: WorkflowConfig, has_vae: bool) -> None:
    settings = config.evaluate
    looking = {
        "features": settings.features if settings.features != "auto" else "",
        "clip_path": settings.clip_path,
        "lpips_path": settings.lpips_path,
    }
    name = next((name for name, value in looking.items() if value), "")
    if settings.features == "classifier" or (name and not has_vae):
        what = "it knows grey pictures of 28 x 28" if has_vae else f"{shown(config.model.path)} has no VAE"
        raise ValueError(f"evaluate.{name} is {looking[name]!r} and {what}: leave it out")
    check_metric_files(config)


def _check_router(config: WorkflowConfig, storage: RunStorage) -> None:
    late = _before(config.stages, "train", {"evaluate", "register"})
    if late and not resume.is_finished("train", config, storage):
        raise ValueError(_no_router(config, late))


def stages_to_do(config: WorkflowConfig, storage: RunStorage) -> set[Stage]:
    """Return the stages that will ask Ray for something.

    They are those that are not done, and the endpoint.
    """
    done = {stage for stage in config.stages if resume.is_finished(stage, config, storage)} - {"serve"}
    if "register" in done and not storage.read_json(resume.PROMOTION).get("promoted"):
        done.remove("register")  # it is decided once more
    if "compare" in done and not is_complete(config, storage):
        done.remove("compare")
    return set(config.stages) - done


def check_stages(config: WorkflowConfig, storage: RunStorage, loaded: LoadedModel) -> None:
    """Check that every stage has its input, or that one before it makes that.

    Args:
        config: with the sampler as the model's own scheduler completes it.

    Raises:
        ValueError: names field, value and cure.
    """
    model, stages = loaded.model, config.stages
    if "serve" in stages:
        check_is_whole(loaded)
        load_keys(config.serve.api_keys_file)
    if resume.is_finished("train", config, storage):
        load_router(storage, ROUTER).check(model, config.sampler)
    elif late := _before(stages, "train", {"evaluate", "register"}):
        raise ValueError(_no_router(config, late))
    _check_promotion(config, storage)
    _check_prompts(config, storage, loaded)
    to_do = {stage for stage in stages if not resume.is_finished(stage, config, storage)}
    if "train" in to_do:
        check_training(config.train, model, config.sampler.num_inference_steps)
    if "evaluate" in to_do:
        check_metric_settings(config, loaded)
        _check_samplers(transfer_samplers(config), "evaluate.transfer", model)
    if "sweep" in to_do:
        from .sweep.stage import check_sweep

        check_sweep(config, storage)
        check_trials(config, model)
    if "compare" in stages:  # finished or not, since it may have more targets than it had
        check_comparison(config, model)


def check_trials(config: WorkflowConfig, model: BranchedTransformer) -> None:
    """Check every training that the sweep will start.

    Raises:
        ValueError: names field, value and cure.
    """
    from .sweep.trial import trials_of

    for trial in trials_of(config):
        train = trial.settings(config).train
        check_training(train, model, config.sampler.num_inference_steps, field="sweep.targets")


def check_comparison(config: WorkflowConfig, model: BranchedTransformer) -> None:
    """Check every training that the comparison will start, and its other plans.

    Those are the ones that it makes without training.

    Raises:
        ValueError: names field, value and cure.
    """
    from .compare.methods import learned_methods, untrained_entries, untrained_variant

    num_steps = config.sampler.num_inference_steps
    for target in config.compare.targets:
        for train in learned_methods(config.train, target, with_baselines=config.compare.learners).values():
            check_training(train, model, num_steps, field="compare.targets")
        require(
            round(num_steps / target) >= 2,
            "compare.targets",
            target,
            f"give at most {num_steps / 1.5:.3g}, since the baseline of fewer steps than sampler."
            f"num_inference_steps ({num_steps}) has to have 2",
        )
        macs, entries = model.macs(), untrained_entries(target, seeds=1)
        variants = [untrained_variant(config.sampler, macs, entry) for entry in entries]
        _check_samplers({variant.name: variant.sampler for variant in variants}, "compare.targets", model)


def _check_samplers(
    samplers: Mapping[str, SamplerConfig], field_name: str, model: BranchedTransformer
) -> None:
    for title, sampler in samplers.items():
        try:
            make_sampler(model, sampler)
        except ValueError as error:
            raise ValueError(f"{field_name} is {title}: leave it out ({error})") from error


def _before(stages: Sequence[Stage], needed: Stage, by: Collection[Stage]) -> Stage | None:
    """Return the first stage that needs another which does not come before it."""
    first = stages.index(needed) if needed in stages else len(stages)
    return next((stage for stage in stages[:first] if stage in by), None)


def _no_router(config: WorkflowConfig, late: Stage) -> str:
    return (
        f"stages is {config.stages} and run_id {config.run_id} has no router yet: "
        f"add the stage train before {late}, or give the --run-id of a trained run"
    )


def _no_prompts(config: WorkflowConfig, late: Stage) -> str:
    return (
        f"stages is {config.stages} and run_id {config.run_id} has no embedded prompts yet: add the "
        f"stage prompts before {late}"
    )


def _check_promotion(config: WorkflowConfig, storage: RunStorage) -> None:
    stages, is_evaluated = config.stages, resume.is_finished("evaluate", config, storage)
    if config.promote != "gate" or "register" not in stages or is_evaluated:
        return
    if "evaluate" not in stages[: stages.index("register")]:
        raise ValueError(
            f"promote is 'gate' and run_id {config.run_id} has no evaluation before stages {stages} "
            "register its router: add the stage evaluate, or give --promote never or always"
        )


def _check_prompts(config: WorkflowConfig, storage: RunStorage, loaded: LoadedModel) -> None:
    stages, prompts, model = config.stages, config.prompts, loaded.model
    if model.num_classes:
        if "prompts" in stages:
            raise ValueError(f"stages is {stages} and the model takes labels: leave prompts out")
        return
    tokens = model.text_shape()[1]
    if prompts.max_tokens != tokens:
        raise ValueError(
            f"prompts.max_tokens is {prompts.max_tokens} and the model takes {tokens}: give that number"
        )
    if resume.is_finished("prompts", config, storage):
        return
    if late := _before(stages, "prompts", ("train", "evaluate", "sweep", "compare", "serve")):
        raise ValueError(_no_prompts(config, late))
    if "prompts" in stages:
        check_prompts(prompts)
    check_conditions(loaded)
