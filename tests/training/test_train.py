"""Router training: resumable bit for bit, and the same router from one worker and from two."""

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from router_only import ROUTER_ONLY
from tiny_dit import write_model, write_overflowing
from tolerances import of_training

from harmonica.data.samples import make_samples
from harmonica.training.budget import with_used_numbers
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.trainer import RouterTrainer
from harmonica.validation.finite import NotFinite
from harmonica.validation.settings import SettingError
from pipelines.config.workflow import TrainConfig, WorkflowConfig
from pipelines.presets import fashion
from pipelines.run_state.storage import RunStorage
from pipelines.tracking.mlflow_runs import find_or_create, make_client, tracking_uri
from pipelines.tracking.worker_times import WorkerTimes
from pipelines.training.jobs import start_run
from pipelines.training.stage import log_numbers, train

TRAJECTORIES = 4


@pytest.fixture
def config(tmp_path: Path) -> WorkflowConfig:
    base = fashion()
    return dataclasses.replace(
        base,
        run_id="r1",
        storage_path=str(tmp_path / "runs"),
        model=write_model(tmp_path / "model"),
        sampler=dataclasses.replace(base.sampler, num_inference_steps=6),
        train=dataclasses.replace(
            base.train,
            **ROUTER_ONLY | {"trajectories": TRAJECTORIES, "batch_size": 4},
            iepo_every=2,
            checkpoint_interval_s=0.0,
        ),
    )


def trained_here(
    config: WorkflowConfig, run: RouterTrainer | None = None, until: int = TRAJECTORIES
) -> RouterTrainer:
    """The same training without Ray, all rows on one worker."""
    fresh, spec = start_run(config, torch.device("cpu"))
    run, size = run or fresh, config.train.batch_size
    while run.trajectory < until:
        indices = torch.arange(run.trajectory * size, (run.trajectory + 1) * size).numpy()
        run.train_one(spec.to_batch(make_samples(indices, spec), "cpu"))
    return run


def test_training_moves_the_router(config: WorkflowConfig) -> None:
    before = start_run(config, torch.device("cpu"))[0].router.logits()
    after = trained_here(config).router.logits()
    assert (after[:-1] != before[:-1]).any(dim=1).all(), "every trained row has moved"
    assert torch.equal(after[-1], before[-1]), "row T-1 never moves"


def test_a_trajectory_says_what_its_time_went_into(config: WorkflowConfig) -> None:
    run, spec = start_run(config, torch.device("cpu"))
    batch = spec.to_batch(make_samples(np.arange(4), spec), "cpu")
    started = time.perf_counter()
    first = run.train_one(batch)
    second = run.train_one(batch)
    took = time.perf_counter() - started
    kinds = {f"seconds.{name}" for name in ("teacher", "student", "backward", "reduce")}
    assert {name for name in first if name.startswith("seconds.")} == kinds | {"seconds.lambda"}
    assert {name for name in second if name.startswith("seconds.")} == kinds, "lambda every iepo_every"
    seconds = [value for each in (first, second) for name, value in each.items() if "seconds." in name]
    assert min(seconds) > 0 and sum(seconds) < took


def test_whatever_a_phase_is_called_its_time_is_told() -> None:
    times = WorkerTimes()
    for seconds in (1.0, 2.0):
        metrics = {"seconds.distillation": seconds, "loss": 0.5}
        times.add(metrics)
        assert metrics == {"loss": 0.5}, "times are told of checkpoints, not of trajectories"
    assert times.gather(0) == {"worker.0.data_s": 0.0, "worker.0.distillation_s": 1.5}
    times.add({"seconds.forecast": 4.0})
    told = {"worker.0.data_s": 0.0, "worker.0.distillation_s": 0.0, "worker.0.forecast_s": 4.0}
    assert times.gather(0) == told, "a phase that has ended has no time left, and is not silent"


def test_a_resumed_run_is_bit_identical(config: WorkflowConfig, tmp_path: Path) -> None:
    whole = trained_here(config)
    torch.save(trained_here(config, until=3).state(), tmp_path / "state.pt")
    resumed = start_run(config, torch.device("cpu"))[0]
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    trained_here(config, resumed)
    assert torch.equal(resumed.router.logits(), whole.router.logits())
    assert resumed.current.context.target.beta == whole.current.context.target.beta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3, "num_workers": 2}, r"train.batch_size is 3: give a multiple of .*\(2\)"),
        ({"batch_size": 4, "num_workers": 4, "min_workers": 2}, r"multiple of every .*\(2\) to .*\(4\)"),
        ({"min_workers": 3}, r"train.min_workers is 3: give 1 to train.num_workers \(2\), or 0 for all"),
        ({"min_workers": 1, "placement_strategy": "STRICT_SPREAD"}, "give SPREAD or PACK with train.min_w"),
        ({"resize_interval_s": 0}, "train.resize_interval_s is 0: give seconds"),
        ({"min_workers": 1, "shard_model": True}, "train.shard_model is True: give False, or train.min_w"),
        ({"shard_model": True, "num_workers": 1}, "train.shard_model is True: give False, or train.num_w"),
        ({"trajectories": 0}, "train.trajectories is 0: give 1 or more"),
        ({"iepo": "sometimes"}, "train.iepo is 'sometimes': give one of leave_one_out"),
        ({"target_cur": 1.5}, "train.target_cur is 1.5: give 0 to below 1"),
    ],
)
def test_bad_settings_name_field_value_and_cure(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_mlflow_keeps_the_numbers_that_a_budget_chose(config: WorkflowConfig) -> None:
    stage = find_or_create("train", config.run_id, config.storage_path, {"budget": 9.0, "trajectories": 4})
    numbers = {"start": 1, "router": 7, "choice": 2, "forecast": 12}
    main, other = (
        SimpleNamespace(training=with_used_numbers({"forecast": {"probes": 4}}, one))
        for one in (numbers, numbers | {"router": 5})
    )
    for _ in range(2):  # a run whose driver was lost after it
        log_numbers(stage, (main, {"1.5x": other}))
    params = make_client(tracking_uri(config.storage_path)).get_run(stage.mlflow_run_id).data.params
    assert (params["trajectories"], params["used.router_trajectories"]) == ("4", "7")
    assert params["used.forecast.trajectories"] == "12" and params["used.start_trajectories"] == "1"
    assert params["used.1.5x.router_trajectories"] == "5"


@pytest.mark.cluster
def test_two_workers_train_the_router_of_one_and_resume(
    config: WorkflowConfig, private_cluster: None, tmp_path: Path
) -> None:
    storage = RunStorage(config.storage_path, config.run_id)
    stage = find_or_create("train", config.run_id, config.storage_path, {})
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, trajectories=2))
    train(half, storage, stage)
    whole = dataclasses.replace(config.train, forecast=ForecastConfig(trajectories=4, probes=1))
    config = dataclasses.replace(config, train=whole)
    artifact, family = train(config, storage, stage)  # same run id: goes on after trajectory 2
    alone = trained_here(config, until=TRAJECTORIES + 4)
    assert not family
    # Two halves of a batch are summed in another order than one whole: equal up to that.
    near = of_training(config.train.sdt.learning_rate, TRAJECTORIES)
    torch.testing.assert_close(artifact.logits_TB, alone.router.logits(), **near)
    assert artifact.forecast_TBK is not None
    torch.testing.assert_close(artifact.forecast_TBK, alone.artifact().forecast_TBK, rtol=1e-3, atol=1e-3)
    client = make_client(tracking_uri(config.storage_path))
    curve = client.get_metric_history(stage.mlflow_run_id, "loss")
    assert [point.step for point in curve] == [1, 2, 3, 4, 5, 6, 7, 8], "one point a trajectory, none twice"
    lambdas = client.get_metric_history(stage.mlflow_run_id, "lambda.step_000")
    assert [point.step for point in lambdas] == [1, 3], "lambda is refreshed every iepo_every trajectories"

    # Too short a budget is refused by the workers, who have timed a full sampling, with the settings' error.
    hasty = dataclasses.replace(config.train, budget=1e-6, num_workers=1)
    short = dataclasses.replace(config, run_id="r3", train=hasty)
    with pytest.raises(SettingError, match=r"^train\.budget is 1e-06: the shortest training .* takes"):
        train(short, RunStorage(config.storage_path, "r3"), stage)

    # What is not finite stops all workers at once, and is not tried again.
    broken = dataclasses.replace(config, run_id="r2", model=write_overflowing(tmp_path / "overflowing"))
    with pytest.raises(NotFinite, match=r"^trajectory 0: [\w.]+ is nan, since the full sampler's images are"):
        train(
            broken,
            RunStorage(config.storage_path, "r2"),
            find_or_create("train", "r2", config.storage_path, {}),
        )
