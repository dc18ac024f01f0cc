"""What a run's stages need of each other and of the model: refused before any work starts."""

from harmonica.models.loading import LoadedModel
from harmonica.models.vae import check_vae, draws_pixels
from harmonica.targets import reusable_share
from harmonica.text.conditions import check_conditions
from pipelines import resume
from pipelines.config import WorkflowConfig
from pipelines.judges import check_judges
from pipelines.resume import ROUTER
from pipelines.routers import load_router
from pipelines.storage import RunStorage


def check_stages(config: WorkflowConfig, storage: RunStorage, loaded: LoadedModel) -> None:
    """Every stage asked for has what it works on, or one before it makes that.

    Args:
        config: with the sampler as the model's own scheduler completes it.

    Raises:
        ValueError: names field, value and cure.
    """
    model, stages = loaded.model, config.stages
    for speedup in (config.train.target_speedup, *config.train.others):
        if speedup:
            reusable_share(config.sampler.num_inference_steps, model.macs(), speedup)
    if "serve" in stages and not draws_pixels(model):
        if loaded.vae_folder is None:
            raise ValueError(
                f"model.vae is '' and {config.model.path} draws latents: give its decoder, or leave the "
                "stage serve out"
            )
        check_vae(loaded.vae_folder)
    if "serve" in stages:
        check_conditions(loaded)
    if resume.is_finished("train", config, storage):
        load_router(storage, ROUTER).check(model, config.sampler)
    elif "train" not in stages and {"evaluate", "register"} & set(stages):
        raise ValueError(
            f"stages is {stages} and run_id {config.run_id} has no router yet: "
            "add the stage train, or give the --run-id of a trained run"
        )
    _check_promotion(config, storage)
    _check_prompts(config, storage, loaded)
    if "evaluate" in stages and not resume.is_finished("evaluate", config, storage):
        check_judges(config, loaded)
    if "sweep" in stages and not resume.is_finished("sweep", config, storage):
        from pipelines.sweep import check

        check(config, storage)


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
    trained_on = {"prompts", "train", "evaluate", "sweep", "compare"}
    if resume.is_finished("prompts", config, storage) or not trained_on & set(stages):
        return
    if "prompts" not in stages:
        raise ValueError(
            f"stages is {stages} and run_id {config.run_id} has no embedded prompts yet: add the "
            "stage prompts"
        )
    if not prompts.path:
        raise ValueError("prompts.path is '' and the model takes prompts: give a file of prompts")
    check_conditions(loaded)
