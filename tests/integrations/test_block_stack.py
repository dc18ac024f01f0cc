"""All blocks of a pipeline's transformer as one branch, `cacheable=("blocks",)`."""

import dataclasses
from typing import Any

import pytest
import tiny_transformers
import torch
from all_phases import ALL_PHASES
from tiny_recorded_pipelines import Case, make_case

import harmonica
from harmonica.core.plan_builders import stepwise_plan
from harmonica.integrations.recorded.kinds import BLOCKS, RefusedTransformer
from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.integrations.recorded.recording import block_modules
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import recorded
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.validation.settings import SettingError
from pipelines.config.pipeline import PipelineConfig
from tests.benchmarks.live_tensors import SAVINGS, peaks_in_both
from tests.integrations.test_pipeline_training import ALL_STEPS as STEPS
from tests.integrations.test_pipeline_training import all_phases_trainer, drawn_by, prompts_of
from tests.training.test_memory_savings import with_weights


def trainer_of(case: Case) -> PipelineTrainer:
    return all_phases_trainer(case, cacheable=(BLOCKS,))


def calls_in_blocks(case: Case, num_steps: int = STEPS) -> int:
    """How often the first modules of all blocks are called while the pipeline draws."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [
        next(block.children()).register_forward_hook(count)
        for transformer in transformers_of(case.pipe)
        for _, block in block_modules(transformer)
    ]
    drawn_by(case, num_steps)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("kind", ["flux", "flux guided", "sd3", "wan 2.1", "qwen", "krea2", "z-image"])
def test_a_step_of_reuse_runs_no_block(kind):
    case = make_case(kind)
    whole, calls = drawn_by(case), calls_in_blocks(case)
    with trainer_of(case) as trainer:
        (branch,) = trainer.calls.view.branches
        assert (branch.kind, len(branch.units)) == (BLOCKS, 1)
        share = trainer.calls.view.macs().branches[0] / trainer.calls.view.macs().full
        artifact = trainer.artifact()
    assert 0.85 < share < 1
    everything = dataclasses.replace(artifact, logits_TB=torch.ones(STEPS, 1), threshold=0.5)
    harmonica.apply(case.pipe, everything)
    assert torch.equal(drawn_by(case), whole), "a plan that computes everything changes no bit"
    harmonica.remove(case.pipe)
    logits = torch.where(stepwise_plan(STEPS, 1, [1, 3]).to_tensor(), 1.0, 0.0)
    harmonica.apply(case.pipe, dataclasses.replace(everything, logits_TB=logits))
    found = drawn_by(case)  # whose first call finds the blocks
    assert calls_in_blocks(case) == calls * (STEPS - 2) // STEPS
    assert not torch.allclose(found, whole, rtol=1e-4) and found.isfinite().all()


@pytest.mark.parametrize("kind", ["flux guided", "wan 2.2", "z-image truncated"])
def test_all_phases_reach_the_pipeline_that_a_router_is_applied_to(kind):
    case = make_case(kind)
    with trainer_of(case) as trainer:
        for _ in trainer.next_trajectories:
            trainer.train_one()
        artifact = trainer.artifact()
        far = {"forecast_TBK": artifact.forecast_TBK + 0.1, "correction_TJ": artifact.correction_TJ + 0.1}
        artifact = dataclasses.replace(artifact, **far)
        images = trainer.backend.images(trainer._batch(0), artifact.plan, "forecast")
    assert 0 < artifact.plan.cur < 1 and artifact.model["cacheable"] == [BLOCKS]
    harmonica.apply(case.pipe, artifact)
    assert torch.equal(drawn_by(case), images)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_savings_of_memory_measure_the_same(kind):
    case = make_case(kind)
    plan = with_weights(stepwise_plan(STEPS, 1, [1, 3]))
    found, peaks = {}, {}
    with trainer_of(case) as trainer:
        backend, batch = trainer.backend, trainer._batch(0)
        full = backend.images(batch).clone()

        def measure(name: str) -> None:
            how = {"probes": 1, "savings": SAVINGS[name]}
            fit = backend.sketch(plan, batch, full, order=2, **how)
            found[name] = fit.jacobian_RP, backend.step_sketch(batch, reach=3, corrections=1, **how)

        for name in ("none", "recomputed", "both"):
            peaks[name], _ = peaks_in_both(case.pipe.transformer, lambda name=name: measure(name))
    assert all(each.abs().max() > 0 for each in found["none"])
    for name in ("recomputed", "both"):
        torch.testing.assert_close(found[name], found["none"])
    # What lies in the blocks before the last is computed again, too.
    assert peaks["both"] < peaks["recomputed"] < 0.7 * peaks["none"]


def test_compiled_blocks_make_the_same_latents(no_codegen):
    case = make_case("flux")
    with trainer_of(case) as trainer:
        artifact = trainer.artifact()
    logits = torch.where(stepwise_plan(STEPS, 1, [1, 3]).to_tensor(), 1.0, 0.0)
    artifact = dataclasses.replace(artifact, logits_TB=logits, threshold=0.5)
    harmonica.apply(case.pipe, artifact)
    eager = drawn_by(case)
    harmonica.remove(case.pipe)
    harmonica.apply(case.pipe, artifact, execution="compiled")
    torch.testing.assert_close(drawn_by(case), eager, rtol=1e-4, atol=1e-4)


def test_one_value_a_call_is_kept():
    case, sizes = make_case("flux"), {}
    for kinds in ((BLOCKS,), ("attn", "cross", "mlp", "single")):
        prompts, call = prompts_of(case)
        with PipelineTrainer(case.pipe, prompts, ALL_PHASES, call=call, cacheable=kinds) as trainer:
            sizes[kinds] = trainer.calls.view.call_bytes(), len(trainer.calls.view.branches)
    (whole, one), (parts, several) = sizes.values()
    assert one == 1 < several and whole <= 2 * parts / several


def test_blocks_stand_alone():
    transformer, kinds = make_case("sd3").pipe.transformer, (BLOCKS, "mlp")
    cure = r"cacheable is \('blocks', 'mlp'\): give some of attn, cross, mlp, single, or blocks alone"
    with pytest.raises(ValueError, match=cure):
        RecordedTransformer(transformer, transformer.forward, cacheable=kinds)
    with pytest.raises(SettingError, match=f"^pipeline.{cure}"):
        PipelineConfig(cacheable=kinds)
    assert PipelineConfig(cacheable=(BLOCKS,)).cacheable == (BLOCKS,)


def test_a_transformer_that_reads_other_blocks_later_is_refused_and_left_as_it_was():
    name = "HunyuanVideo15Transformer3DModel"
    module = tiny_transformers.make_transformer(name)
    (inputs, *_) = tiny_transformers.step_inputs(name, module, 2)
    before = dict(vars(module))
    with (
        pytest.raises(
            RefusedTransformer, match=r"reads what its blocks return after the last one, give some of"
        ),
        recorded(module, cacheable=(BLOCKS,), **inputs),
    ):
        pass
    assert dict(vars(module)) == before
    assert not any("forward" in vars(each) for each in module.modules())
