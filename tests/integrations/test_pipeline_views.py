"""The training of a PixArt in its pipeline's loop, by the general view, is that by its own branch file."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from all_phases import ALL_PHASES
from pixart_views import PixartViews, builtin_views, tiny_views

from harmonica.builtin import CAPTIONS
from harmonica.integrations.recorded.branches import RecordedBranch
from harmonica.integrations.recorded.kinds import KINDS as MODULES
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training.config import TrainingConfig
from harmonica.training.trainer import RouterTrainer

SDT = dataclasses.replace(ALL_PHASES.sdt, penalty="count")
CONFIG = dataclasses.replace(ALL_PHASES, target_speedup=0.0, target_cur=0.4, iepo="leave_one_out", sdt=SDT)
STILL = 1e-9
"""A learning rate that leaves the start as it is."""


def check_macs(branches: Sequence[RecordedBranch], views: PixartViews) -> None:
    """The same but for keys and values of the text, which a branch file computes once a trajectory."""
    tokens, width = views.condition.embeddings.shape[1], views.pipe.transformer.inner_dim
    text = {"cross": 2 * tokens * width * width}
    found = [branch.macs - text.get(branch.kind, 0) for branch in branches]
    assert found == list(views.sampler.model.macs().branches)


def compare(views: PixartViews, config: TrainingConfig) -> None:
    """Do every trajectory in both views.

    The updates are compared where nothing is guided: a pipeline's errors are those before guidance.
    """
    is_guided, size = views.sampler.is_guided, config.batch_size
    if is_guided:
        config = dataclasses.replace(config, sdt=dataclasses.replace(config.sdt, learning_rate=STILL))
    theirs = RouterTrainer(views.sampler, config, seed=0)
    with PipelineTrainer(views.pipe, views.prompts, config, call=views.call, cacheable=MODULES) as trainer:
        ours = trainer.run.current
        check_macs(trainer.calls.view.branches, views)
        for k in range(config.all_trajectories):
            phase = theirs.phase.name
            wanted, found = theirs.train_one(views.batch(k, size)), trainer.train_one()
            if not (phase == "router" and is_guided):
                for name in wanted:
                    if name.startswith(("loss", "mse", "lambda", "choice", "forecast")):
                        assert found[name] == pytest.approx(wanted[name], rel=1e-3), name
            torch.testing.assert_close(ours.router.logits(), theirs.router.logits(), rtol=0, atol=1e-4)
            if phase == "start":
                ours_EE, theirs_EE = ours.phases[0].state(), theirs.phases[0].state()
                torch.testing.assert_close(ours_EE, theirs_EE, rtol=1e-6, atol=1e-9)
        router, other = trainer.artifact(), theirs.artifact()
    assert ours.context.starts.keys() == theirs.context.starts.keys() >= {"even", "measured"}
    for name, logits_TB in theirs.context.starts.items():
        assert torch.equal(ours.context.starts[name], logits_TB), name
    assert router.plan.compute == other.plan.compute and 0 < router.plan.cur < 1
    assert router.training["chosen"] == other.training["chosen"]
    torch.testing.assert_close(router.forecast_TBK, other.forecast_TBK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(router.correction_TJ, other.correction_TJ, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_all_phases_of_a_random_pixart_are_those_of_its_branch_file(guidance_scale):
    compare(tiny_views(guidance_scale, num_steps=6), CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_all_phases_of_the_built_in_pixart_are_those_of_its_branch_file(guidance_scale):
    # Lambda takes a generation a step; the random one has it.
    config = dataclasses.replace(CONFIG, iepo="none")
    compare(builtin_views(CAPTIONS.read_text().splitlines()[:16], guidance_scale, num_steps=6), config)
