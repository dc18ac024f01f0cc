"""`PipelineTrainer`: checkpoints at any trajectory, and several workers as one."""

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import tiny_attached
import tiny_pixart
import torch
from all_phases import ALL_PHASES
from tolerances import of_training
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.data.samples import Shard
from harmonica.integrations.recorded.kinds import KINDS as MODULES
from harmonica.integrations.recorded.transformer_step import TransformerStep
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training import time_budget
from harmonica.training.budget import with_numbers
from harmonica.training.config import TrainingConfig
from harmonica.training.phases import phase_costs

CONFIG = dataclasses.replace(ALL_PHASES, batch_size=4, target_speedup=0.0, target_cur=0.4)
STEPS = 6
Average = Callable[[Tensor], None]


def alone(tensor: Tensor) -> None:
    """The average of one worker."""


def make_trainer(config: TrainingConfig = CONFIG, shard: Shard | None = None) -> PipelineTrainer:
    """A PixArt of random weights in float64, guided, and four prompts."""
    case = tiny_attached.make_case("sigma", None)
    noise, condition = tiny_pixart.make_batch("sigma", 4)
    prompts: list[dict[str, Any]] = [
        {
            "prompt_embeds": condition.embeddings[row : row + 1],
            "prompt_attention_mask": condition.mask[row : row + 1].long(),
            "negative_prompt_embeds": condition.negative_embeddings[row : row + 1],
            "negative_prompt_attention_mask": condition.negative_mask[row : row + 1].long(),
        }
        for row in range(4)
    ]
    call = {
        "negative_prompt": None,
        "height": 2 * noise.shape[2],
        "width": 2 * noise.shape[3],
        "use_resolution_binning": False,
        "guidance_scale": 3.0,
        "num_inference_steps": STEPS,
    }
    return PipelineTrainer(case.pipe, prompts, config, call=call, shard=shard, cacheable=MODULES)


def train(trainer: PipelineTrainer, average: Average = alone) -> list[dict[str, float]]:
    """Do all trajectories that are left; the metrics without times."""
    return [without_times(trainer.train_one(average)) for _ in trainer.next_trajectories]


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("seconds", "updates_per"))}


def test_a_training_goes_on_from_any_trajectory():
    with make_trainer() as whole:
        expected, theirs = train(whole), whole.artifact()
    found, state = [], None
    for trajectory in range(CONFIG.all_trajectories):
        with make_trainer() as trainer:
            if state is not None:
                trainer.load_state(state)
            assert trainer.next_trajectories == range(trajectory, CONFIG.all_trajectories)
            found.append(without_times(trainer.train_one(alone)))
            state, ours = copy.deepcopy(trainer.state()), trainer.artifact()
    assert found == expected
    assert torch.equal(ours.logits_TB, theirs.logits_TB) and ours.threshold == theirs.threshold
    assert torch.equal(ours.forecast_TBK, theirs.forecast_TBK) and ours.training == theirs.training


def averages(count: int) -> list[Average]:
    """The average of each of several threads."""
    barrier, slots = threading.Barrier(count, timeout=120), [torch.zeros(0)] * count

    def of_rank(rank: int) -> Average:
        def average(tensor: Tensor) -> None:
            slots[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(torch.stack(slots).mean(0))
            barrier.wait()

        return average

    return [of_rank(rank) for rank in range(count)]


@pytest.mark.parametrize("student", ["soft", "hard"])
def test_two_workers_train_the_router_of_one(student):
    config = dataclasses.replace(CONFIG, sdt=dataclasses.replace(CONFIG.sdt, student=student))
    with make_trainer(config) as whole:
        expected, theirs = train(whole), whole.artifact()
    shared, trainers = averages(2), [make_trainer(config, Shard(4, rank, 2)) for rank in range(2)]
    found: list[list[dict[str, float]]] = [[], []]
    artifacts: dict[int, RouterArtifact] = {}

    def work(rank: int) -> None:
        with trainers[rank] as trainer:
            found[rank] = train(trainer, shared[rank])
            artifacts[rank] = trainer.artifact()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and torch.equal(artifacts[0].logits_TB, artifacts[1].logits_TB)
    assert torch.equal(artifacts[0].forecast_TBK, artifacts[1].forecast_TBK)
    near = of_training(config.sdt.learning_rate, config.trajectories)
    torch.testing.assert_close(artifacts[0].logits_TB, theirs.logits_TB, **near)
    torch.testing.assert_close(artifacts[0].forecast_TBK, theirs.forecast_TBK, rtol=1e-3, atol=1e-4)
    for ours, alone_found in zip(found[0], expected, strict=True):
        assert ours == pytest.approx(alone_found, rel=1e-3)
    rows = [list(trainers[rank]._batch(1).keys.indices) for rank in range(2)]
    assert rows == [[4, 5], [6, 7]]


def test_costs_count_the_calls_of_the_pipeline(monkeypatch):
    """Every run begins at the first step: steps that compute everything, in those of a full sampling."""
    full = 0

    def planned(self: TransformerStep, row: Any, **how: Any) -> Any:
        nonlocal full
        full += all(row)
        return whole(self, row, **how)

    whole = TransformerStep.planned
    monkeypatch.setattr(TransformerStep, "planned", planned)
    with make_trainer() as trainer:
        batch = trainer._batch(0)
        trainer.backend.step_sketch(batch, reach=3, corrections=1, probes=CONFIG.forecast.probes)
        start, router, *rest = phase_costs(CONFIG, STEPS, from_start=True)
        assert start.costs[0] == pytest.approx(full / STEPS + 1.2 * CONFIG.forecast.probes)  # a backward each
        calls = mock.Mock(side_effect=trainer.backend._run)
        monkeypatch.setattr(trainer.backend, "_run", calls)
        config = dataclasses.replace(CONFIG, iepo="leave_one_out")
        trainer.backend.image_changes(trainer.router, batch, config)
    update = (3 * (STEPS - 1) + 1) / STEPS
    assert router.costs[0] == pytest.approx(update + calls.call_count)
    assert rest == list(phase_costs(CONFIG, STEPS)[2:])


def test_a_budget_s_numbers_are_those_of_calls_and_repeat_its_router(monkeypatch):
    wanted = with_numbers(CONFIG, {"router": 4})
    phases = phase_costs(wanted, STEPS, from_start=True)
    minutes = 1000 * sum(sum(phase.costs) for phase in phases) / 60 / 0.9 + 1
    config = dataclasses.replace(wanted, trajectories=5, budget=minutes)
    timed = []

    def sampling_seconds(backend: Any, batch: Any, micro_batch_size: int) -> float:
        timed.append(whole(backend, batch, 2))
        return 1000.0

    whole = time_budget.sampling_seconds
    monkeypatch.setattr(time_budget, "sampling_seconds", sampling_seconds)
    with make_trainer(config) as trainer:
        trainer.prepare()
        assert trainer.backend.fixed_steps == frozenset(), "the same as where nothing was timed"
        assert "training the router 4, " in trainer.announcement
        while trainer.next_trajectories:
            trainer.train_one(alone)
        ours = trainer.artifact()
    assert len(timed) == 1 and timed[0] > 0
    with make_trainer(wanted) as repeated:
        train(repeated)
        theirs = repeated.artifact()
    assert torch.equal(ours.logits_TB, theirs.logits_TB) and torch.equal(
        ours.forecast_TBK, theirs.forecast_TBK
    )
    assert ours.training["router_trajectories"] == 4 and ours.training["start_trajectories"] == 1
