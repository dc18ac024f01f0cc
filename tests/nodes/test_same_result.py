"""The same seed and global batch give the same curves and router, wherever trained, whatever else runs.

Three runs are done at once, so that it is also shown that workflows on one cluster, one storage path and one
registry leave each other alone.
"""

from pathlib import Path

import pytest
from cluster_runs import TrainingRun, check_close, check_same, closing, trained_alone
from tiny_dit import write_model

from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import make_client

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = "shared"


def trained_at_once(make_run, **placed: tuple[int, str]) -> list[TrainingRun]:
    """Runs of (workers, placement) beside each other, each registered."""
    runs = [make_run(name.replace("_", "-")) for name in placed]
    for run, (workers, placement) in zip(runs, placed.values()):
        run.start(
            f"--train.num-workers={workers}",
            f"--train.placement-strategy={placement}",
            f"--registered-model={MODEL}",
            "--promote=always",
            stages=("train", "register"),
        )
    for run in runs:
        with closing(run):
            assert run.wait() == 0, run.said
    return runs


def test_one_two_and_four_workers_on_one_node_and_on_several(
    make_run, folder: Path, unbroken: TrainingRun
) -> None:
    one, two_packed, four = trained_at_once(
        make_run, one=(1, "PACK"), two_packed=(2, "PACK"), four=(4, "SPREAD")
    )
    assert (one.nodes, two_packed.nodes) == (1, 1)
    assert unbroken.nodes == 2 and four.nodes >= 2

    curves, router = trained_alone(write_model(folder / "alone"))
    assert curves.keys() >= {"loss", "mse", "l1", "cur", "beta", "lambda.step_000"}
    runs = (one, two_packed, four)
    for run in (unbroken, *runs):
        check_close(run, curves, router)
    check_same(two_packed, unbroken)

    uri = f"sqlite:///{one.database}"
    versions = make_client(uri).search_model_versions(f"name = '{MODEL}'")
    made_by = {version.tags["run_id"]: str(version.version) for version in versions}
    assert made_by.keys() == {run.storage.run_id for run in runs} and len(versions) == 3
    for run in runs:
        registered = registry.load_version(MODEL, made_by[run.storage.run_id], uri)
        assert registered.logits_TB.equal(run.router)
        assert run.storage.names("train/checkpoints")
    assert registry.resolve(MODEL, "champion", uri) in made_by.values()
