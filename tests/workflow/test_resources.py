"""What Ray could never place on this machine is refused before any work, on a private cluster."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data import ActorPoolStrategy
from tiny_dit import make_artifact, write_model

from pipelines import serve, workflow
from pipelines.config.workflow import WorkflowConfig
from pipelines.runtime import resources
from pipelines.runtime.resources import check_resources, needs_of, say_shortage

ALL = ("train", "evaluate", "sweep", "compare", "register", "serve")
NONE, ONE = {"CPU": 6.0}, {"CPU": 6.0, "GPU": 1.0}


def config_of(*arguments: str, preset: str = "fashion") -> WorkflowConfig:
    return workflow.parse([preset, *arguments], workflow.PRESETS, "workflow.py")


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def has(monkeypatch: pytest.MonkeyPatch, machine: dict[str, float]) -> None:
    monkeypatch.setattr(resources, "_this_machine", lambda: machine)


REFUSED = [
    (
        NONE,
        "train",
        ["--train.use-gpu"],
        "train.use_gpu is True and train.num_workers is 2, which takes 2 GPUs, ",
    ),
    (NONE, "evaluate", ["--evaluate.use-gpu"], "evaluate.use_gpu is True and this machine has no GPU: give "),
    (
        NONE,
        "sweep",
        ["--train.use-gpu"],
        "train.use_gpu is True and this machine has no GPU: give --train.no-use",
    ),
    (NONE, "compare", ["--evaluate.use-gpu"], "evaluate.use_gpu is True and this machine has no GPU"),
    (NONE, "register", ["--evaluate.use-gpu"], "evaluate.use_gpu is True and this machine has no GPU"),
    (
        NONE,
        "serve",
        ["--serve.use-gpu"],
        "serve.use_gpu is True and serve.min_replicas is 1 and this machine has",
    ),
    (
        NONE,
        "prompts",
        ["--prompts.use-gpu"],
        "prompts.use_gpu is True and this machine has no GPU: give --prompts.",
    ),
    (
        ONE,
        "train",
        ["--train.use-gpu"],
        "and this machine has 1 GPU: give less for train.num_workers, or RAY_ADDR",
    ),
    (
        ONE,
        "serve",
        ["--serve.use-gpu", "--serve.min-replicas=2", "--serve.max-replicas=2"],
        "has 1 GPU: give less",
    ),
    (
        ONE,
        "train",
        ["--train.num-workers=8", "--train.batch-size=8"],
        "train.num_workers is 8, which takes 8 CPUs",
    ),
    (
        ONE,
        "serve",
        ["--serve.num-cpus=6"],
        "serve.num_cpus is 6.0, which takes 6.1 CPUs, and this machine has 6",
    ),
    (
        ONE,
        "train",
        ["--train.placement-strategy=STRICT_SPREAD"],
        "'STRICT_SPREAD' and train.num_workers is 2, each",
    ),
]


@pytest.mark.parametrize(("machine", "stage", "arguments", "words"), REFUSED)
def test_what_no_private_cluster_can_place_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    machine: dict[str, float],
    stage: str,
    arguments: list[str],
    words: str,
) -> None:
    has(monkeypatch, machine)
    config = config_of("--stages", stage, *arguments)
    with pytest.raises(ValueError, match="or RAY_ADDRESS of a cluster that has") as refused:
        check_resources(config, [stage])
    assert words in str(refused.value)
    check_resources(config, [other for other in ALL if other != stage])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # which may get more nodes
    check_resources(config, [stage])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--train.use-gpu", "--train.min-workers=1"],
        ["--train.use-gpu", "--train.num-workers=1"],
        ["--evaluate.use-gpu", "--evaluate.num-actors=8"],
        ["--evaluate.num-actors=64", "--serve.use-gpu", "--serve.max-replicas=9"],
        ["--train.num-workers=1", "--train.placement-strategy=STRICT_SPREAD"],
    ],
)
def test_what_one_gpu_and_six_cpus_can_do_one_after_another_is_not(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    has(monkeypatch, ONE)
    check_resources(config_of("--stages", *ALL, *arguments), ALL)


def test_the_command_refuses_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    has(monkeypatch, NONE)
    for module, step in ((workflow.Workflow, "claim"), (serve, "choose_routers")):  # what comes next
        monkeypatch.setattr(module, step, lambda *_: pytest.fail("was not refused"))
    model = write_model(tmp_path / "model")
    run = [f"--storage-path={tmp_path}", f"--model.path={model.path}", "--run-id=r1", "--evaluate.use-gpu"]
    assert workflow.main(["fashion", *run]) == 2
    error = capsys.readouterr().err
    cure = "give --evaluate.no-use-gpu, or RAY_ADDRESS of a cluster that has one"
    assert error == f"error: evaluate.use_gpu is True and this machine has no GPU: {cure}\n"
    # What is done asks for nothing.
    make_artifact(model).save(tmp_path / "r1" / "router")
    steps = ["--stages", "train", "--train.use-gpu", "--sampler.num-inference-steps=8"]
    workflow.Workflow(config_of(*run, *steps)).check()
    (tmp_path / "r1" / "router" / "config.json").unlink()
    assert workflow.main(["fashion", *run, *steps]) == 2
    assert serve.main([f"--storage-path={tmp_path}", "--serve.use-gpu"]) == 2
    assert "give --serve.no-use-gpu, or RAY_ADDRESS" in capsys.readouterr().err
    assert not ray.is_initialized()


def test_a_joined_cluster_is_waited_for_and_it_is_said_for_what(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: NONE)
    config = config_of("--evaluate.use-gpu", "--train.num-workers=8", "--train.batch-size=8")
    say_shortage(config, ["evaluate"])
    assert capsys.readouterr().out == "", "a private cluster's were refused"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    say_shortage(config, ["train", "evaluate"])
    assert capsys.readouterr().out.splitlines() == [
        "train.num_workers is 8, which takes 8 CPUs, and the cluster has 6 CPUs: it waits until nodes are "
        "added, or give less for train.num_workers",
        "evaluate.use_gpu is True and the cluster has no GPU: it waits until nodes are added, or give "
        "--evaluate.no-use-gpu",
    ]


def test_the_presets_of_public_models_ask_for_their_gpus() -> None:
    needs = list(
        needs_of(config_of(preset="pixart-alpha-256"), workflow.PRESETS["pixart-alpha-256"]().stages)
    )
    assert [need.amount for need in needs if need.kind == "GPU"] == [1, 4, 1, 1, 1]


@pytest.mark.cluster
def test_a_private_cluster_has_what_is_counted(private_cluster: None) -> None:
    has, counted = ray.cluster_resources(), resources._this_machine()
    assert (has["CPU"], has.get("GPU")) == (counted["CPU"], counted.get("GPU"))

    class Same:
        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return batch

    # Actors for which there is no room are done without, so that their number is not refused.
    each = int(counted["CPU"]) // 2 + 1
    rows = ray.data.from_blocks([pa.table({"row": [i]}) for i in range(4)])
    same = rows.map_batches(Same, compute=ActorPoolStrategy(size=2), batch_size=1, num_cpus=each)
    assert sum(len(batch["row"]) for batch in same.iter_batches(batch_size=None)) == 4
