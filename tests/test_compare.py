"""The stage `compare`: who is ahead, and a small comparison for real."""

import json
from pathlib import Path

import pytest
from tiny_dit import write_model

import workflow
from harmonica.models.base import Macs
from harmonica.samplers import SamplerConfig
from pipelines.compare import ahead, verdict
from pipelines.compare_config import CompareConfig
from pipelines.comparing.comparison_picture import line
from pipelines.comparing.contenders import OURS, PAPER, learners, unlearned
from pipelines.presets import fashion

MACS = Macs(branches=(30, 60) * 6, rest=12)


def point(method: str, psnr: float, target: float | None = 1.4, **others: float) -> dict:
    made_for = {} if target is None else {"target_speedup": target}
    return {"method": method, "psnr_to_full": psnr} | made_for | others


def test_first_is_who_is_nearer_than_every_rival_as_fast() -> None:
    points = [
        point(OURS, 44.0, seed=0),
        point(OURS, 46.0, seed=1),
        point("fewer steps", 44.5),
        point("random plan", 60.0, target=1.2),
        point("cache-dit DBCache", 50.0, target=None, speedup=1.1, setting=0.05),
        point("cache-dit DBCache", 44.9, target=None, speedup=1.39, setting=0.08),
    ]
    (said,) = ahead(points, (1.4,))
    assert said["psnr_to_full"] == 45.0 and said["is_first"]
    assert (said["rival"], said["rival_psnr_to_full"]) == ("cache-dit DBCache 0.08", 44.9)
    (said,) = ahead([*points, point("fewer steps", 47.0)], (1.4,))
    assert not said["is_first"] and said["rival"] == "fewer steps", "the mean of its points"
    assert "first at 0 of 1 speeds, not at 1.4x (fewer steps: 45.8 dB, ours 45.0)" in verdict([said])


def test_a_line_goes_through_the_mean_of_a_speeds_seeds() -> None:
    points = [
        {"speedup": 1.9, "psnr_to_full": 40.0, "target_speedup": 2.0},
        {"speedup": 1.3, "psnr_to_full": 50.0, "target_speedup": 1.4},
        {"speedup": 2.1, "psnr_to_full": 44.0, "target_speedup": 2.0},
    ]
    assert line(points) == [(1.3, 50.0), (2.0, 42.0)]
    alone = [{name: value for name, value in p.items() if name != "target_speedup"} for p in points]
    assert len(line(alone)) == 3, "a library's settings"


def test_all_learners_take_as_many_trajectories_and_aim_at_the_speed() -> None:
    settings = learners(fashion().train, 1.6, rivals=True)
    assert len({train.all_trajectories for train in settings.values()}) == 1
    assert {train.target_speedup for train in settings.values()} == {1.6}
    paper = settings[PAPER]
    assert (paper.sdt.reuse, paper.sdt.student, paper.iepo) == ("hold", "soft", "leave_one_out")
    assert list(learners(fashion().train, 1.6, rivals=False)) == [OURS]


def test_plans_that_nobody_learns_meet_the_speed() -> None:
    arms = unlearned(SamplerConfig(num_inference_steps=20), MACS, 1.6, seeds=2)
    assert arms[0][1].num_inference_steps == 12
    for entry, arm in arms[1:]:
        assert arm.plan is not None
        assert abs(arm.plan.ideal_speedup(MACS) / 1.6 - 1) < 0.02, entry
    names = [arm.name for _, arm in arms]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"targets": (0.9,)}, r"compare.targets is \(0.9,\)"),
        ({"targets": ()}, r"compare.targets is \(\)"),
        ({"seeds": 0}, "compare.seeds is 0"),
        ({"samples": 3}, "compare.samples is 3"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CompareConfig(**changes)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_small_comparison_with_every_rival(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    arguments = [
        "fashion",
        "--run-id=c1",
        f"--storage-path={tmp_path / 'runs'}",
        f"--model.path={model.path}",
    ]
    arguments += ["--stages", "compare", "--compare.targets", "1.3", "--compare.samples=16"]
    arguments += ["--sampler.num-inference-steps=8", "--train.trajectories=2", "--train.batch-size=4"]
    arguments += ["--train.choice-trajectories=1", "--train.forecast.trajectories=4"]
    arguments += ["--evaluate.timing-rounds=1", "--evaluate.batch-size=8"]
    assert workflow.main(arguments) == 0
    run = tmp_path / "runs" / "c1"
    comparison = json.loads((run / "comparison.json").read_text())
    methods = {point["method"] for point in comparison["points"]}
    assert {OURS, PAPER, "Learning-to-Cache", "fewer steps", "random plan", "diffusers TaylorSeer"} <= methods
    assert all(0 < point["psnr_to_full"] <= 100 for point in comparison["points"])
    made_for = [point for point in comparison["points"] if "ideal_speedup" in point]
    assert len(made_for) == 8 and all(abs(p["ideal_speedup"] / 1.3 - 1) < 0.02 for p in made_for)
    assert (run / "comparison.png").stat().st_size > 1000
    assert [said["target_speedup"] for said in comparison["speeds"]] == [1.3]
    out = capfd.readouterr().out
    assert "HarmoniCa is first at" in out and "diffusers FirstBlockCache 0.05" in out
    (run / "comparison.json").unlink()
    before = (run / "compare").stat().st_mtime_ns
    assert workflow.main(arguments) == 0, "routers that are there are not trained again"
    assert (run / "compare").stat().st_mtime_ns == before
