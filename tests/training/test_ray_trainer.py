"""Ray Train's callbacks whose actors would have nothing to do are left out, and no others."""

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines.training import ray_trainer


def callbacks_of(trainer: type[TorchTrainer]) -> set[str]:
    made = trainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))._create_default_callbacks()
    return {type(each).__name__ for each in made}


@pytest.mark.parametrize("is_private", [True, False])
def test_who_hands_out_no_data_sets_or_cleans_up_a_private_cluster_is_left_out(is_private, monkeypatch):
    monkeypatch.setattr(ray_trainer, "is_private", lambda: is_private)
    cleaner = {"PlacementGroupCleanerCallback"}
    left_out = {"DatasetsCallback"} | (cleaner if is_private else set())
    assert callbacks_of(TorchTrainer) - callbacks_of(ray_trainer.Trainer) == left_out
