"""`PipelineTrainer`: checkpoints at any trajectory, and several workers as one."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny_attached
import tiny_pixart
import torch
from tiny_recorded_pipelines import STEPS
from tolerances import of_training
from torch import Tensor

from harmonica.data.samples import Shard
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.training.config import TrainingConfig
from harmonica.training.sdt import SdtConfig

CONFIG = TrainingConfig(
    trajectories=3,
    batch_size=4,
    target_cur=0.4,
    initial="even",
    initial_logit=1.0,
    iepo="sensitivity",
    iepo_every=2,
    sdt=SdtConfig(reuse="forecast", threshold=0.5, learning_rate=0.1),
)
Average = Callable[[Tensor], None]


def alone(tensor: Tensor) -> None:
    """The average of one worker."""


def make_trainer(config: TrainingConfig = CONFIG, shard: Shard | None = None) -> PipelineTrainer:
    """A PixArt of random weights in float64, guided, and four prompts."""
    case = tiny_attached.make_case("alpha 1024", None)
    noise, condition = tiny_pixart.make_batch("alpha 1024", 4)
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
    return PipelineTrainer(case.pipe, prompts, config, call=call, shard=shard)


def train(trainer: PipelineTrainer, average: Average = alone) -> list[dict[str, float]]:
    """Train all trajectories that are left; the metrics without times."""
    found = [trainer.train_one(average) for _ in trainer.next_trajectories]
    return [{name: value for name, value in one.items() if "seconds" not in name} for one in found]


@pytest.mark.parametrize("stop", range(CONFIG.all_trajectories + 1))
def test_a_training_goes_on_from_any_trajectory(stop):
    with make_trainer() as whole:
        expected, theirs = train(whole), whole.artifact()
    with make_trainer() as first:
        done = [first.train_one(alone) for _ in range(stop)]
        state = first.state()
    with make_trainer() as second:
        second.load_state(state)
        assert second.trajectory == stop
        rest, ours = train(second), second.artifact()
    assert len(done) + len(rest) == CONFIG.all_trajectories and rest == expected[stop:]
    assert torch.equal(ours.logits_TB, theirs.logits_TB) and ours.threshold == theirs.threshold


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
        expected = train(whole)
    shared, trainers = averages(2), [make_trainer(config, Shard(4, rank, 2)) for rank in range(2)]
    found: list[list[dict[str, float]]] = [[], []]

    def work(rank: int) -> None:
        with trainers[rank] as trainer:
            found[rank] = train(trainer, shared[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and torch.equal(trainers[0].router.logits(), trainers[1].router.logits())
    near = of_training(config.sdt.learning_rate, config.trajectories)
    torch.testing.assert_close(trainers[0].router.logits(), whole.router.logits(), **near)
    for ours, theirs in zip(found[0], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    rows = [trainers[rank]._batch(1)[1] for rank in range(2)]
    assert rows == [[4, 5], [6, 7]]
