"""Points of a comparison: who is first, what was not measured, their names, and what plans they have."""

from pathlib import Path

import pytest

from harmonica.models.base import Macs
from harmonica.samplers import SamplerConfig
from pipelines.compare.methods import learned_methods, untrained_entries, untrained_variant
from pipelines.compare.names import OURS, OURS_LABEL, PAPER, shown_name
from pipelines.compare.plot import comparison_picture, line
from pipelines.compare.ranking import leaders, ranking_summary
from pipelines.presets import fashion
from pipelines.report.html_report import render
from pipelines.report.terminal import comparison_table
from pipelines.run_state.storage import RunStorage

MACS = Macs(branches=(30, 60) * 6, rest=12)


def point(method: str, psnr: float, target: float | None = 1.4, **others: float) -> dict:
    made_for = {} if target is None else {"target_speedup": target}
    return {"method": method, "psnr_to_full": psnr, "num_inference_steps": 20} | made_for | others


def test_first_is_who_is_nearer_than_every_rival_as_fast() -> None:
    points = [
        point(OURS, 44.0, seed=0),
        point(OURS, 46.0, seed=1),
        point("fewer steps", 44.5),
        point("random plan", 60.0, target=1.2),
        point("cache-dit DBCache", 50.0, target=None, speedup=1.1, setting=0.05),
        point("cache-dit DBCache", 44.9, target=None, speedup=1.39, setting=0.08),
    ]
    (said,) = leaders(points, (1.4,))
    assert said["psnr_to_full"] == 45.0 and said["is_first"]
    assert (said["rival"], said["rival_psnr_to_full"]) == ("cache-dit DBCache 0.08", 44.9)
    (said,) = leaders([*points, point("fewer steps", 47.0)], (1.4,))
    assert not said["is_first"] and said["rival"] == "fewer steps", "the mean of its points"
    words = "is first at 0 of 1 speeds, not at 1.4x (fewer steps: 45.8 dB, ours 45.0)."
    assert ranking_summary([said]) == f"Learned steps + fitted forecast {words}"


MISSING = [
    {"method": PAPER, "label": "HarmoniCa (paper)", "target_speedup": 1.4, "seed": 1, "reason": "<b>no room"},
    {"method": "diffusers TaylorSeer", "setting": 2.0, "reason": "<b>no room"},
]


def test_variants_that_were_not_measured_are_told_and_the_others_count() -> None:
    points = [
        point(OURS, 44.0, label=OURS_LABEL, speedup=1.4),
        point("fewer steps", 40.0, speedup=1.3),
        point("fewer steps", 50.0, target=1.2, speedup=1.2),
    ]
    speeds = leaders(points, (1.2, 1.4))
    assert [said["is_first"] for said in speeds] == [None, True] and speeds[0]["psnr_to_full"] is None
    words = ranking_summary(speeds, points, MISSING)
    assert words == (
        "Learned steps + fitted forecast is first at 1 of 1 speeds. It was not measured at 1.2x. 2 variants "
        "were not measured: HarmoniCa (paper) at 1.4x seed 1, diffusers TaylorSeer 2 (<b>no room)."
    )
    assert "first at 0 of 0 speeds. It was not measured at 1.4x." in ranking_summary(
        leaders([], (1.4,)), [], MISSING
    )


@pytest.mark.parametrize("measured", [True, False])
def test_what_was_not_measured_is_in_the_table_the_picture_and_on_the_page(
    measured: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [point(OURS, 44.0, label=OURS_LABEL, speedup=1.4)] if measured else []
    made = {"sampler": "ddim", "num_inference_steps": 20, "points": points, "not_measured": MISSING}
    comparison_table(made)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "2 variants were not measured: HarmoniCa (paper) at 1.4x seed 1, diffusers TaylorSeer 2 (<b>no"
        in printed
    )
    legend = comparison_picture(points, MISSING).axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    not_there = ["HarmoniCa (paper): 1 not measured", "diffusers TaylorSeer: 1 not measured"]
    assert sorted(labels) == sorted(not_there + [OURS_LABEL] * measured)
    storage = RunStorage(str(tmp_path), "r1")
    storage.write_json("comparison.json", made | {"verdict": "none"})
    page = render(fashion(), storage, {}, {})
    assert "HarmoniCa (paper) at 1.4x seed 1" in page and "&lt;b&gt;no room" in page
    assert (OURS_LABEL in page) == measured


def test_points_of_versions_before_this_one_get_names() -> None:
    assert shown_name({"method": OURS}) == "learned steps + fitted forecast"
    assert shown_name({"method": PAPER}) == "HarmoniCa (paper)"
    assert shown_name({"method": "random plan"}) == "random plan"


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
    settings = learned_methods(fashion().train, 1.6, with_baselines=True)
    assert len({train.all_trajectories for train in settings.values()}) == 1
    assert {train.target_speedup for train in settings.values()} == {1.6}
    paper = settings[PAPER]
    assert (paper.sdt.reuse, paper.sdt.student, paper.iepo) == ("hold", "soft", "leave_one_out")
    assert list(learned_methods(fashion().train, 1.6, with_baselines=False)) == [OURS]


def test_plans_that_nobody_learns_meet_the_speed() -> None:
    sampler = SamplerConfig(num_inference_steps=20)
    variants = [untrained_variant(sampler, MACS, entry) for entry in untrained_entries(1.6, seeds=2)]
    assert variants[0].num_inference_steps == 12
    for variant in variants[1:]:
        assert variant.plan is not None
        assert abs(variant.plan.ideal_speedup(MACS) / 1.6 - 1) < 0.02, variant.name
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names)
    assert [name for name, one in zip(names, variants) if one.plan and one.plan.correction] == [
        "fixed-intervals-and-linear-forecast-and-fixed-correction-EvenSteps_1.6x_seed0"
    ]
