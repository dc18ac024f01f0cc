"""Memory of a training in a pipeline, all blocks as one branch: the formula, and what is counted."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from harmonica.core.plan import Plan, forecast_of
from harmonica.core.plan_builders import stepwise_plan
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training.memory_estimates import learning_memory
from harmonica.training.memory_model import Memory, Shape
from harmonica.training.plans.fitted_weights import linear_weights
from harmonica.training.presets import learned_steps
from tests.benchmarks.live_tensors import SAVINGS, peaks_in_both

STEPS, REUSED = 8, [1, 3, 5]
HEADS, HEAD_DIM, LAYERS, SIDE, TEXT = 4, 32, (2, 6), 32, 32
SHAPE = Shape(
    kinds=("attn", "mlp"),
    cacheable=("attn", "mlp"),
    layers=sum(LAYERS),
    width=HEADS * HEAD_DIM,
    heads=HEADS,
    tokens=(SIDE // 2) ** 2 + TEXT,
    text_tokens=0,
    value_bytes=4,
    hidden_bytes=4,
    sharded_weights=0,
    other_weights=0,
    are_one_branch=True,
)


@pytest.fixture(scope="module")
def trainer():
    """Of a FLUX that is large enough for its activations to outweigh all else."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=LAYERS[0],
        num_single_layers=LAYERS[1],
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=64,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)
    prompt = {"prompt_embeds": torch.randn(1, TEXT, 64), "pooled_prompt_embeds": torch.randn(1, 16)}
    call = {"num_inference_steps": STEPS, "height": 8 * SIDE, "width": 8 * SIDE}
    with PipelineTrainer(pipe, [prompt], learned_steps(target_speedup=1.6), call=call) as trainer:
        yield trainer


def expected(how: str) -> tuple[Memory, Memory]:
    return learning_memory(
        SHAPE,
        rows_at_once=1,
        computed_steps=STEPS - len(REUSED),
        is_guided=False,
        savings=SAVINGS[how],
        num_steps=STEPS,
    )


@pytest.mark.parametrize("how", ["none", "recomputed", "both"])
def test_memory_is_what_the_formula_says(trainer, how):
    """The fit's is an upper bound, since a plan may compute some steps before any reuse."""
    (batch, *_), backend, savings = trainer._batch(0).split(1), trainer.backend, SAVINGS[how]
    plan = stepwise_plan(STEPS, 1, REUSED)
    plan = Plan(plan.compute, forecast_of(linear_weights(plan, 2)))
    full_NX = torch.zeros(1, (SIDE // 2) ** 2, 64)
    runs = (
        lambda: backend.step_sketch(batch, reach=7, corrections=0, probes=1, savings=savings),
        lambda: backend.sketch(plan, batch, full_NX, order=2, probes=1, savings=savings),
    )
    peaks, on_host = zip(*(peaks_in_both(trainer.calls.pipe.transformer, run) for run in runs), strict=True)
    start, fit = expected(how)
    assert peaks[0] == pytest.approx(start.total, rel=0.15)
    assert 0.6 < peaks[1] / fit.total < 1.1
    if savings.offload:
        assert on_host[0] == pytest.approx(start.host, rel=0.35)
        assert peaks[0] < expected("recomputed")[0].total / 2, "what blocks are given is in the host's memory"
