"""The pipeline that trained the built-in model: it runs, resumes, and exports what the code loads."""

import dataclasses
from pathlib import Path

import pytest
import ray

from harmonica import fashion
from harmonica.models.loading import ModelConfig, load_model
from harmonica.pretraining import learning_rate_factor
from pipelines.pretrain import FASHION_DIT, PretrainConfig, export, pretrain


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, warmup=10, total=100, decay=20) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[50] == 1
    assert factors[80] == 1 and factors[90] == 0.5 and factors[99] == pytest.approx(0.05)


@pytest.mark.slow
@pytest.mark.cluster
def test_pretraining_resumes_and_exports(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not fashion.DEFAULT_FOLDER.exists():
        pytest.skip("wants Fashion-MNIST: install Debian's package dataset-fashion-mnist")
    config = PretrainConfig(
        storage_path=str(tmp_path),
        model=dataclasses.replace(FASHION_DIT, num_layers=2),
        batch_size=8,
        steps=3,
        compile=False,
        checkpoint_interval_s=0.0,
        export=str(tmp_path / "model"),
    )
    request.addfinalizer(ray.shutdown)
    pretrain(config)
    pretrain(dataclasses.replace(config, steps=5))
    loaded = load_model(ModelConfig(path=str(export(config))))
    assert loaded.class_names == fashion.CLASS_NAMES
    assert '"steps_done": 5' in (tmp_path / "model" / "config.json").read_text()
