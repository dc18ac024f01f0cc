"""The pipeline that trained the built-in model: it runs, resumes, and exports what the code loads."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from harmonica.evaluation import fashion_mnist
from harmonica.models.loading import ModelConfig, load_model
from pipelines.pretrain.dit import FASHION_DIT, DiTPretrainConfig, LabelTask, export
from pipelines.pretrain.learning import (
    Learner,
    LearningConfig,
    learning_rate_factor,
    make_optimizers,
)
from pipelines.pretrain.loop import run


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, warmup=10, total=100, decay=20) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[50] == 1
    assert factors[80] == 1 and factors[90] == 0.5 and factors[99] == pytest.approx(0.05)


def make_learner(width: int = 3) -> Learner:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(width, width)])})
    model["out"] = torch.nn.Linear(width, 1)
    config = LearningConfig(
        steps=8, decay_steps=4, warmup_steps=2, learning_rate=0.1, weight_decay=0.01, ema_decay=0.9
    )
    return Learner(model, config)


def learn(learner: Learner) -> None:
    x = torch.full((2, 3), 1.0 + learner.step)
    learner.learn(learner.model["out"](learner.model["blocks"][0](x).relu()).square().mean())


def test_a_restored_learner_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    unbroken = make_learner()
    for step in range(6):
        if step == 3:
            torch.save(unbroken.state_dict(), tmp_path / "state.pt")
        learn(unbroken)
    resumed = make_learner()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        learn(resumed)
    assert resumed.step == unbroken.step == 6
    for name, p in unbroken.model.named_parameters():
        assert torch.equal(p, dict(resumed.model.named_parameters())[name]), name
        assert torch.equal(unbroken.averaged_parameters()[name], resumed.averaged_parameters()[name]), name


def test_muon_takes_the_matrices_of_blocks_and_nothing_that_only_looks_like_one() -> None:
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model.blocks[0].scale_shift_table = torch.nn.Parameter(torch.zeros(6, 2))
    model.table = torch.nn.Embedding(3, 2)
    muon, adamw = make_optimizers(model, 0.1, 0.01)
    assert [p is model.blocks[0].weight for p in muon.param_groups[0]["params"]] == [True]
    assert len(adamw.param_groups[0]["params"]) == 3


def test_ranks_share_a_global_batch_that_depends_on_seed_and_step_alone() -> None:
    images = np.zeros((50, 1, 28, 28), np.uint8)
    task = LabelTask(DiTPretrainConfig(batch_size=8, seed=5), images, np.zeros(50, np.int64))
    whole, _ = task.batch(3, 0, 1)
    halves = [task.batch(3, rank, 2) for rank in range(2)]
    assert np.array_equal(whole, np.concatenate([rows for rows, _ in halves]))
    assert halves[0][1].initial_seed() != halves[1][1].initial_seed()
    assert not np.array_equal(whole, task.batch(4, 0, 1)[0])


@pytest.mark.slow
@pytest.mark.cluster
def test_pretraining_resumes_and_exports(tmp_path: Path, private_cluster: None) -> None:
    if not fashion_mnist.DEFAULT_FOLDER.exists():
        pytest.skip("wants Fashion-MNIST: install Debian's package dataset-fashion-mnist")
    config = DiTPretrainConfig(
        storage_path=str(tmp_path),
        model=dataclasses.replace(FASHION_DIT, num_layers=2),
        batch_size=8,
        steps=3,
        compile=False,
        checkpoint_interval_s=0.0,
        export=str(tmp_path / "model"),
    )
    run(config, LabelTask)
    run(dataclasses.replace(config, steps=5, bfloat16=True), LabelTask)
    loaded = load_model(ModelConfig(path=str(export(config))))
    assert loaded.class_names == fashion_mnist.CLASS_NAMES
    assert '"steps_done": 5' in (tmp_path / "model" / "config.json").read_text()
