"""`train_pipeline` trains a router for any diffusers pipeline, without Ray.

The training happens in the pipeline's own loop.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.integrations.recorded.kinds import BLOCKS
from harmonica.pipeline_training.artifacts import untrained_artifact
from harmonica.pipeline_training.sampling import Prompt
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training.config import TrainingConfig
from harmonica.training.presets import learned_steps
from harmonica.validation.settings import require

OnTrajectory = Callable[[int, dict[str, float]], object]
"""Called after each trajectory with its number and metrics."""


def train_pipeline(
    pipe: Any,
    prompts: Sequence[Prompt],
    config: TrainingConfig | EvenSteps | None = None,
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    cacheable: Sequence[str] = (BLOCKS,),
    on_trajectory: OnTrajectory | None = None,
) -> RouterArtifact:
    """Train a router for a diffusers pipeline.

    By default it learns which whole steps to reuse, for 1.8 times less arithmetic, and fits their forecasts
    (`harmonica.learned_steps`). A phase of SDT with IEPO (arXiv 2410.01723) comes between: the pipeline
    samples as ever, its transformer runs the teacher and the student at every step, the router is updated,
    and the scheduler goes on from the student's output; errors are those of the transformer's outputs, before
    guidance. The pipeline is left as it was.

    Args:
        pipe: a pipeline with a transformer, such as `FluxPipeline`; or with two that share trajectories.
        prompts: texts, or what `encode_prompt` gave for each, by the names of the pipeline's arguments.
        config: trajectories, batch size, objective and target; a target of speed is met by the plan. By
            default learned steps on four images a trajectory, with branches computed again in backward
            passes: `harmonica.learned_steps()`. `EvenSteps()` trains nothing and has its own `cacheable`: the
            artifact, of evenly spread steps, is for what takes a router, such as the endpoint.
        call: arguments of every call: `num_inference_steps`, guidance, height, width. The plan is for this
            number of steps.
        seed: of the noise and of random logits.
        cacheable: what a branch is. By default all blocks are one, whose last output is kept. Or kinds of
            sub-modules, each of which keeps its own: attn, cross, mlp, single. That takes far more memory,
            and is for classes that read what their blocks return after the last one.
        on_trajectory: called after each trajectory.

    Returns:
        The artifact that `harmonica.apply(pipe, artifact)` takes.

    Raises:
        SettingError: a setting that training in a pipeline has no counterpart of, or a target that is out
            of reach.
        ValueError: no prompts, a pipeline without a transformer, a class that is refused, or prompts that
            do not fit together.
        NotFinite: the router's updates are.
    """
    if isinstance(config, EvenSteps):
        return untrained_artifact(pipe, prompts, config, call=call or {}, seed=seed)
    config = config or learned_steps()
    require(
        not config.targets,
        "train.targets",
        config.targets,
        "give none, since one router is returned; PipelineTrainer trains one for each",
    )
    trainer = PipelineTrainer(pipe, prompts, config, call=call, seed=seed, cacheable=cacheable)
    with trainer:
        trainer.prepare()
        while trainer.next_trajectories:
            trajectory = trainer.trajectory
            metrics = trainer.train_one()
            if on_trajectory is not None:
                on_trajectory(trajectory, metrics)
        return trainer.artifact()
