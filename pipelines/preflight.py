"""What a run's stages need of each other and of the model: refused before any work starts."""

from collections.abc import Collection, Mapping, Sequence

from harmonica.data.conditions import check_conditions
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import LoadedModel
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.feasibility import check_training
from harmonica.validation.settings import require

from .config.workflow import Stage, WorkflowConfig
from .evaluation.metric_networks import check_metric_settings
from .evaluation.variants import transfer_samplers
from .run_state import resume
from .run_state.resume import ROUTER
from .run_state.routers import load_router
from .run_state.storage import RunStorage
from .serving.auth import load_keys
from .serving.image_sampler import check_is_whole


def check_stages(config: WorkflowConfig, storage: RunStorage, loaded: LoadedModel) -> None:
    """Every stage asked for has what it works on, or one before it makes that.

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
        raise ValueError(
            f"stages is {stages} and run_id {config.run_id} has no router yet: "
            f"add the stage train before {late}, or give the --run-id of a trained run"
        )
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
    """Every training that the sweep will start.

    Raises:
        ValueError: names field, value and cure.
    """
    from .sweep.trial import trials_of

    for trial in trials_of(config):
        train = trial.settings(config).train
        check_training(train, model, config.sampler.num_inference_steps, field="sweep.targets")


def check_comparison(config: WorkflowConfig, model: BranchedTransformer) -> None:
    """Every training that the comparison will start, and every plan that it makes without one.

    Raises:
        ValueError: names field, value and cure.
    """
    from .compare.methods import learned_methods, untrained_methods

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
        variants = untrained_methods(config.sampler, model.macs(), target, seeds=1)
        _check_samplers({variant.name: variant.sampler for _, variant in variants}, "compare.targets", model)


def _check_samplers(
    samplers: Mapping[str, SamplerConfig], field_name: str, model: BranchedTransformer
) -> None:
    for title, sampler in samplers.items():
        try:
            make_sampler(model, sampler)
        except ValueError as error:
            raise ValueError(f"{field_name} is {title}: leave it out ({error})") from error


def _before(stages: Sequence[Stage], needed: Stage, by: Collection[Stage]) -> Stage | None:
    """The first of the stages that needs another one which does not come before it."""
    first = stages.index(needed) if needed in stages else len(stages)
    return next((stage for stage in stages[:first] if stage in by), None)


def _check_promotion(config: WorkflowConfig, storage: RunStorage) -> None:
    stages, is_judged = config.stages, resume.is_finished("evaluate", config, storage)
    if config.promote != "gate" or "register" not in stages or is_judged:
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
        raise ValueError(
            f"stages is {stages} and run_id {config.run_id} has no embedded prompts yet: add the "
            f"stage prompts before {late}"
        )
    if "prompts" in stages and not prompts.path:
        raise ValueError("prompts.path is '' and the model takes prompts: give a file of prompts")
    check_conditions(loaded)
