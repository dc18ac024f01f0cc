"""A sweep: what is tried, what is on the front, and the whole of it on Ray Tune, begun again half way."""

import dataclasses
import json

import pytest
from router_only import ROUTER_ONLY, ROUTER_ONLY_FLAGS
from tiny_dit import write_model

from pipelines import workflow
from pipelines.config.sweep import SweepConfig
from pipelines.presets import fashion
from pipelines.report.html_report import render
from pipelines.run_state.storage import RunStorage
from pipelines.sweep.pareto import front_figure, on_front
from pipelines.sweep.stage import check_sweep
from pipelines.sweep.trial import Trial, evaluation_seed, reports_of, trials_of
from pipelines.tracking.mlflow_runs import find_run
from pipelines.tracking.registry import current


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 40.0)], [True]),
        ([(1.0, 40.0), (1.5, 38.0), (1.4, 37.0)], [True, True, False]),
        ([(1.0, 40.0), (1.0, 41.0), (0.9, 41.0)], [False, True, False]),
        ([(1.0, 40.0), (1.0, 40.0)], [True, True]),
        ([(1.3, 40.0), (1.2, 39.0), (1.4, 41.0)], [False, False, True]),
    ],
)
def test_on_the_front_is_what_no_other_beats(points, front):
    assert on_front(points) == front
    assert front_figure(points, [str(i) for i in range(len(points))]).axes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"search": "random"}, "sweep.search is 'random': give grid or asha"),
        ({"targets": ()}, "sweep.targets is"),
        ({"targets": (0.2, 0.2)}, "give each value once"),
        ({"over": "target_cur", "targets": (1.2,)}, "sweep.targets is .* above 0 and below 1"),
        ({"targets": (0.5,)}, "give values above 1"),
        ({"iepo": ("paper",)}, "sweep.iepo is .* give some of leave_one_out"),
        ({"report_every": 0}, "sweep.report_every is 0"),
        ({"max_concurrent": 0}, "sweep.max_concurrent is 0"),
        ({"seeds": (-1,)}, "sweep.seeds"),
        (
            {"over": "target_of_nothing"},
            "sweep.over is 'target_of_nothing': give target_cur or",
        ),
    ],
)
def test_settings_are_refused_with_their_cure(settings, words):
    with pytest.raises(ValueError, match=words):
        SweepConfig(**settings)


def config(**settings):
    base = fashion()
    train = dataclasses.replace(base.train, **ROUTER_ONLY)
    swept = SweepConfig(over="target_cur", **settings)
    return dataclasses.replace(base, run_id="r1", train=train, sweep=swept)


def test_trials_are_every_combination_and_are_evaluated_on_rows_of_none():
    ours = config(targets=(0.2, 0.4), iepo=("none", "sensitivity"), seeds=(0, 3))
    trials = trials_of(ours)
    assert len({trial.name for trial in trials}) == 8
    assert trials[0].name == "cur-0.2-none-seed-0"
    trained = trials[-1].settings(ours)
    assert (trained.train.target_cur, trained.train.iepo, trained.seed) == (0.4, "sensitivity", 3)
    assert trained.train.sdt == ours.train.sdt
    assert evaluation_seed(ours) > 3
    assert [trial.name for trial in trials_of(config(targets=(0.3,)))] == ["cur-0.3-sensitivity-seed-0"]


def test_a_sweep_goes_on_with_its_own_settings_only(tmp_path):
    storage = RunStorage(str(tmp_path), "r1")
    ours = config(targets=(0.2,))
    check_sweep(ours, storage)
    begun = json.loads(json.dumps(ours.to_dict()["sweep"]))
    begun.pop("max_concurrent")
    storage.write_json("sweep/settings.json", begun)
    check_sweep(config(targets=(0.2,), max_concurrent=9), storage)
    with pytest.raises(
        ValueError, match=r"^sweep.targets was \[0.2\] and is \[0.3\]: go on .* or give --from"
    ):
        check_sweep(config(targets=(0.3,)), storage)
    check_sweep(
        dataclasses.replace(config(targets=(0.3,)), stages=("sweep",), done_again_from="sweep"), storage
    )


SMALL = [
    "--sampler.num-inference-steps=4",
    "--train.batch-size=2",
    "--train.initial=constant",
    "--train.initial-logit=0.1",
    "--evaluate.samples=16",
    "--evaluate.batch-size=8",
    "--evaluate.timing-rounds=1",
    "--evaluate.num-actors=1",
    "--sweep.report-every=2",
    "--sweep.report-samples=2",
]


@pytest.fixture
def arguments(private_cluster, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    model = write_model(tmp_path / "model")
    command = ["fashion", "--run-id=r1", f"--storage-path={tmp_path / 'runs'}", *SMALL]
    command += [*ROUTER_ONLY_FLAGS, "--sweep.over=target_cur"]
    return [*command, f"--model.path={model.path}", "--stages", "sweep"]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_sweep_and_its_second_half(arguments, tmp_path, capsys):
    arguments += ["--train.trajectories=4", "--sweep.targets", "0.25", "0.5"]
    storage = RunStorage(str(tmp_path / "runs"), "r1")
    assert workflow.main(arguments) == 0, capsys.readouterr().err
    said, first = capsys.readouterr().out, storage.read_json("sweep.json")
    assert "2 trained routers on the front" in said
    assert len(first["points"]) == 2 and not first["stopped"]
    front = [point for point in first["points"] if point["on_front"]]
    assert front and all(point["version"] for point in front)
    places = [(point["speedup"], point["psnr_to_full"]) for point in first["points"]]
    assert [point["on_front"] for point in first["points"]] == on_front(places)

    parent = find_run("sweep", "r1", storage.root)
    assert current("harmonica-fashion", "champion", parent.uri) is None, "none is promoted"
    stored = parent.client.get_model_version("harmonica-fashion", front[0]["version"])
    assert float(stored.tags["psnr_to_full"]) == pytest.approx(front[0]["psnr_to_full"], rel=1e-4)
    assert stored.tags["sweep"] == front[0]["name"] and stored.tags["harmonica.gate"] == "never"
    logged = {file.path for file in parent.client.list_artifacts(parent.mlflow_run_id)}
    assert logged >= {"sweep.png", "sweep.json", "sweep_table.json"}
    assert storage.read_bytes("sweep.png").startswith(b"\x89PNG")
    page = render(dataclasses.replace(fashion(), run_id="r1"), storage, {}, {})
    assert first["verdict"] in page and front[0]["name"] in page

    # As if it had been killed: one trial half trained.
    half = first["points"][0]["name"]
    newest = storage.names(f"sweep/{half}/checkpoints")[-1]
    for name in ("sweep.json", f"sweep/{half}/report.json", f"sweep/{half}/checkpoints/{newest}"):
        storage.delete(name)
    storage.delete_all(f"sweep/{half}/router")
    assert workflow.main(arguments) == 0, capsys.readouterr().err
    second = storage.read_json("sweep.json")
    for before, after in zip(first["points"], second["points"]):
        assert (after["name"], after["psnr_to_full"]) == (before["name"], before["psnr_to_full"])
    told = reports_of(storage, Trial("target_cur", 0.25, "sensitivity", 0))
    assert [report["trajectory"] for report in told] == [2, 4], "from its last report on"
    versions = parent.client.search_model_versions("name = 'harmonica-fashion'")
    on_either = {p["name"] for made in (first, second) for p in made["points"] if p["on_front"]}
    assert len(versions) == len(on_either), "none twice"
    capsys.readouterr()
    assert workflow.main(arguments) == 0
    assert "[sweep] done before" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_asha_stops_what_falls_behind(arguments, tmp_path, capsys):
    arguments += ["--train.trajectories=8", "--sweep.search=asha", "--sweep.max-concurrent=1"]
    # Nothing is gained by reuse at this rate: the earlier trials are the better ones.
    arguments += ["--promotion.db-per-doubling=0", "--sweep.targets", "0.1", "0.7"]
    assert workflow.main(arguments) == 0, capsys.readouterr().err
    made = RunStorage(str(tmp_path / "runs"), "r1").read_json("sweep.json")
    assert [point["name"] for point in made["points"]] == ["cur-0.1-sensitivity-seed-0"]
    (stopped,) = made["stopped"]
    assert stopped["name"] == "cur-0.7-sensitivity-seed-0" and stopped["trajectory"] < 8
    assert "trials stopped early: 1" in made["verdict"]
