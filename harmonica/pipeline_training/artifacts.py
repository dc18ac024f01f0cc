"""Make the artifacts of trained routers and of even steps for a pipeline."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import logits_of
from harmonica.integrations.recorded.even_steps import EvenSteps, is_flow_matching
from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.integrations.recorded.weights import fingerprint_of
from harmonica.pipeline_training.pipeline_calls import PipelineCalls
from harmonica.pipeline_training.plan_policy import PlanPolicy
from harmonica.pipeline_training.sampling import Prompt, check_prompts, check_seed

_LOGIT = 1.0
"""Of a plan that was not trained; only its sign counts."""


def artifact_of(
    calls: PipelineCalls,
    prompts: Sequence[Prompt],
    plan: Plan,
    logits_TB: Tensor,
    *,
    threshold: float,
    reuse: Reuse,
    learned: tuple[Tensor | None, Tensor | None],
    training: Mapping[str, Any],
) -> RouterArtifact:
    """Return the artifact of a plan for a pipeline that is open.

    Args:
        plan: what the logits (T, B) and the threshold make.
        learned: the weights of forecasts (T, B, K) and of the output's correction (T, J).
        training: settings and provenance, for people to read.
    """
    macs, weights = calls.view.macs(), fingerprint_of(transformers_of(calls.pipe))
    forecast_TBK, correction_TJ = (None if each is None else each.float() for each in learned)
    return RouterArtifact(
        logits_TB=logits_TB.float(),
        threshold=threshold,
        sampler=calls.sampler_config(),
        reuse=reuse,
        forecast_TBK=forecast_TBK,
        correction_TJ=correction_TJ,
        model={**calls.view.shape(), "transformers": len(calls.transformers), "weights": weights.exact},
        rounded_weights=weights.rounded,
        ideal_speedup=plan.ideal_speedup(macs),
        macs_full=macs.full * plan.num_steps,
        cache_bytes=calls.kept_bytes(reuse, 1 if forecast_TBK is None else forecast_TBK.shape[2]),
        training={
            "pipeline": type(calls.pipe).__name__,
            "call": calls.described_call(prompts[:1]),
            **training,
        },
    )


def untrained_artifact(
    pipe: Any, prompts: Sequence[Prompt], even: EvenSteps, *, call: Mapping[str, Any], seed: int
) -> RouterArtifact:
    """Return the artifact of evenly spread steps in a pipeline.

    One image is drawn under them.

    Raises:
        ValueError: no prompts, or the pipeline refuses the call or makes other steps than were given.
    """
    check_prompts(prompts)
    check_seed(seed)
    calls = PipelineCalls(pipe, call, seed=seed, cacheable=even.cacheable, reuse="forecast")
    with calls.opened(prompts[:1]):
        if even.num_inference_steps not in (None, calls.num_steps):
            raise ValueError(
                f"num_inference_steps is {even.num_inference_steps} and the pipeline makes {calls.num_steps} "
                "steps: leave it out"
            )
        is_flow = is_flow_matching(pipe.scheduler)
        plan = even.plan(calls.num_steps, calls.view.macs(), is_flow_matching=is_flow)
        calls.run(PlanPolicy(plan), prompts[:1], [0])  # as a check, and since it counts the calls of a step
        correction = None if plan.correction is None else torch.tensor(plan.correction)
        return artifact_of(
            calls,
            prompts,
            plan,
            logits_of(plan, _LOGIT),
            threshold=0.5,
            reuse="forecast",
            learned=(None, correction),
            training={"initial": "even", "chosen": "even", "seed": seed, "trajectories": 0},
        )
