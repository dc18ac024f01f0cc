"""Stages done again: nothing that was there goes before its successor is there, however often it breaks."""

import json
from pathlib import Path

import pytest
from processes import free_port
from tiny_dit import make_artifact, write_model

from pipelines import workflow
from pipelines.run_state import resume
from pipelines.run_state.resume import (
    CONFIG,
    WORKFLOW,
    is_current,
    is_finished,
    mark_done,
    recorded,
    work_folder,
)
from pipelines.run_state.routers import load_router
from pipelines.run_state.storage import RunStorage
from pipelines.tracking.mlflow_runs import find_or_create, find_run, stage_run
from pipelines.training.checkpoints import Checkpoints

STAGES = ("train", "evaluate", "register")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


class Run:
    """A run id and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage = folder / "r1", RunStorage(str(folder), "r1")
        self.model = write_model(folder / "model")
        self.config = self.prepared().config

    def arguments(self, *arguments: str) -> list[str]:
        given = ["fashion", "--run-id=r1", f"--storage-path={self.storage.root}", *arguments]
        steps = "--sampler.num-inference-steps=8"
        return [*given, f"--model.path={self.model.path}", steps, "--stages", *STAGES]

    def prepared(self, *arguments: str) -> workflow.Workflow:
        """As far as nothing is changed."""
        given = self.arguments(*arguments)
        prepared = workflow.Workflow(workflow.parse(given, workflow.PRESETS, "workflow.py"))
        prepared.check()
        return prepared

    def begin(self, *arguments: str) -> None:
        """As far as the first stage; then it breaks off."""
        self.config = resume.begin(self.prepared(*arguments).config, self.storage)
        assert self.config.done_again_from is None

    def finish(self, *arguments: str) -> None:
        """A whole run, by what it leaves."""
        self.begin(*arguments)
        save(self, "old")
        artifact = make_artifact(self.model)
        self.storage.replace_folder(artifact.save(self.folder.parent / "made"), resume.ROUTER)
        for name in (resume.REPORT, resume.PROMOTION):
            self.storage.write_json(name, {"of": "old"})
        for name in (resume.SHEET, resume.HEAT_MAP, resume.SERVED):
            self.storage.write_bytes(name, b"old")

    @property
    def finished(self) -> list[str]:
        return [stage for stage in resume.STAGES if is_finished(stage, self.config, self.storage)]

    def contents(self) -> dict[str, tuple[bytes, int]]:
        files = [path for path in self.folder.parent.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def save(run: Run, name: str) -> None:
    Checkpoints.of_training(run.storage).save(1, {"of": name})


def saved(run: Run) -> str:
    """Which training the checkpoints are of that training would go on from."""
    checkpoints = Checkpoints.of_training(run.storage)
    found = checkpoints.last()
    return checkpoints.load(found)["of"] if found else ""


def test_a_check_changes_nothing(run, monkeypatch, capsys):
    assert not run.folder.exists(), "a new run has not begun"
    run.finish()
    find_or_create("evaluate", "r1", run.storage.root, {})
    before = run.contents()
    run.prepared("--from=evaluate", "--evaluate.samples=32")
    run.prepared("--from=train", "--train.trajectories=31")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    capsys.readouterr()
    assert workflow.main(run.arguments("--from=train")) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: RAY_ADDRESS is 127.0.0.1:") and "\n" not in error
    assert run.contents() == before
    assert load_router(run.storage, resume.ROUTER)
    assert run.finished == ["train", "evaluate", "register", "serve"]


def test_stages_done_again_are_undone_until_they_are_done(run):
    run.finish()
    before = run.contents()
    run.begin("--from=evaluate", "--evaluate.samples=32")
    del before[str(run.folder / CONFIG)]
    assert run.contents().items() >= before.items(), "the old results are all there"
    assert run.finished == ["train"]
    assert json.loads((run.folder / CONFIG).read_text())["evaluate"]["samples"] == 32
    for name in (resume.REPORT, resume.SHEET, resume.HEAT_MAP, resume.PROMOTION, resume.SERVED):
        assert run.storage.exists(name) and not is_current(name, run.storage), "no news of what is new"

    record = (run.folder / CONFIG).read_bytes()
    for again in ((), ("--from=evaluate",)):  # it broke off: the same command, with and without --from
        run.begin("--evaluate.samples=32", *again)
        assert run.finished == ["train"] and (run.folder / CONFIG).read_bytes() == record
    with pytest.raises(ValueError, match=r"^evaluate.samples was 32 and is 64: resume run_id r1 with"):
        run.prepared("--evaluate.samples=64")

    mark_done("evaluate", run.storage)
    run.begin("--evaluate.samples=32", "--from=evaluate")  # and again: what is done since stays done
    assert run.finished == ["train", "evaluate"] and is_current(resume.REPORT, run.storage)
    assert not is_current(resume.PROMOTION, run.storage)
    for stage in ("register", "serve", WORKFLOW):
        mark_done(stage, run.storage)
    assert run.finished == ["train", "evaluate", "register", "serve"]
    run.begin("--evaluate.samples=32", "--from=evaluate")
    assert run.finished == ["train"], "the one before had come to its end"
    assert recorded(run.storage).generation("evaluate") == 3


def test_stages_that_have_made_nothing_take_other_settings(run):
    run.begin()
    given = ["--train.trajectories=31", "--seed=1", "--registered-model=other"]
    for _ in range(2):  # the second time they are the run's own
        run.begin(*given)
        settings = run.storage.read_json(CONFIG)
        assert (settings["train"]["trajectories"], settings["seed"]) == (31, 1)
        assert settings["registered_model"] == "other"
        assert recorded(run.storage).generation("train") == 2, "with an MLflow run of its own"
    run.begin()  # and back
    assert recorded(run.storage).generation(WORKFLOW) == 3
    save(run, "some")
    wrong = (
        r"^train.trajectories was \d+ and is 31: resume run_id r1 with its own settings, give --from train "
    )
    cure = "to do that stage and those after it again, or take a new run id"
    with pytest.raises(ValueError, match=wrong + cure):
        run.prepared("--train.trajectories=31")
    run.prepared("--train.trajectories=31", "--from=train")
    run.begin("--evaluate.samples=32", "--promotion.min-speedup=1.1")  # since training alone has begun
    assert run.storage.read_json(CONFIG)["evaluate"]["samples"] == 32
    assert saved(run) == "some" and recorded(run.storage).generation("train") == 3
    with pytest.raises(ValueError, match=r"^train.trajectories was \d+ and is 31: .* give --from train"):
        run.prepared("--train.trajectories=31", "--evaluate.samples=64")
    with pytest.raises(
        ValueError, match=r"^registered_model was .*: resume .* own settings, or take a new run"
    ):
        run.prepared("--registered-model=other")


def test_results_keep_the_settings_that_they_were_made_with(run):
    run.finish()
    for given, stage in (("--evaluate.samples=32", "evaluate"), ("--seed=1", "train")):
        with pytest.raises(ValueError, match=f"give --from {stage} to do that stage"):
            run.prepared(given)
        run.prepared(given, f"--from={stage}")


def test_training_that_is_done_again_begins_with_no_checkpoint_of_the_one_before(run):
    run.finish()
    assert saved(run) == "old"
    run.begin("--from=train", "--train.trajectories=31")
    assert saved(run) == "" and work_folder("train", run.storage) == "train-2"
    save(run, "new")
    for again in ((), ("--from=train",)):
        run.begin("--train.trajectories=31", *again)
        assert saved(run) == "new" and run.finished == []
    assert run.storage.exists("train/checkpoints"), "until the new router is there"

    run.begin("--train.trajectories=32", "--from=train")
    assert saved(run) == "", "of other settings"
    save(run, "newest")
    mark_done("train", run.storage)
    assert run.finished == ["train"] and saved(run) == "newest"
    assert {path.name for path in run.folder.iterdir() if path.is_dir()} == {"router", "train-3"}

    run.begin("--train.trajectories=32", "--from=evaluate")
    assert run.finished == ["train"] and saved(run) == "newest"


def test_what_was_undone_before_stays_so_when_less_is_asked_for(run):
    run.finish()
    run.begin("--from=train", "--train.trajectories=31")
    save(run, "new")
    run.begin("--from=evaluate", "--train.trajectories=31")
    assert run.finished == [] and saved(run) == "new"


def test_a_sweep_that_is_done_again_may_have_other_settings(run):
    run.finish()
    folders = []
    for samples in (8, 8, 9):
        given = [*run.arguments(), "sweep", "--from=sweep", f"--sweep.report-samples={samples}"]
        resume.begin(workflow.parse(given, workflow.PRESETS, "workflow.py"), run.storage)
        folders.append(work_folder("sweep", run.storage))
    assert folders == ["sweep-2", "sweep-2", "sweep-3"]


def test_mlflow_s_run_counts_until_its_successor_is_whole(tmp_path):
    place = str(tmp_path)
    with stage_run("evaluate", "r1", place, {}) as first:
        pass
    with pytest.raises(KeyError), stage_run("evaluate", "r1", place, {}, generation=2) as broken:
        raise KeyError
    assert find_run("evaluate", "r1", place) == first != broken
    with stage_run("evaluate", "r1", place, {}, generation=2) as second:
        assert second == broken, "gone on with"
        assert find_run("evaluate", "r1", place) == first
    assert find_run("evaluate", "r1", place) == second
    kept = first.client.get_run(first.mlflow_run_id)
    assert kept.data.tags["harmonica.stage"] == "evaluate (done again)" and kept.info.status == "FINISHED"
    with stage_run("evaluate", "r1", place, {}, generation=3) as third:
        pass
    assert find_run("evaluate", "r1", place) == third != second
