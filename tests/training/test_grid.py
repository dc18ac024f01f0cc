"""The grid of the benchmarks: what its points share, resumption, and the tables."""

import json
from dataclasses import replace

import pytest
from all_phases import ALL_PHASES
from tiny_dit import write_model

from harmonica.core.plan_builders import even_plan
from harmonica.models.loading import load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.presets import RECIPES, Recipe
from harmonica.training.trainer import RouterTrainer
from pipelines.compare.published import FORECASTS
from pipelines.evaluation.metric_networks import classifier_folder
from pipelines.pretrain import emoji_data
from tests.benchmarks import cross_attention, ideas
from tests.benchmarks.grid.__main__ import measure
from tests.benchmarks.grid.judging import Judge
from tests.benchmarks.grid.points import (
    EVEN,
    LEARNED,
    UNTRAINED,
    Drawn,
    RememberedImages,
    Series,
    first_judged,
)
from tests.benchmarks.grid.table import LOG, PRESETS, PointResults, read_lines, table, with_tables

KINDS = {"has_published": False, "has_calibrated": False}
IMAGES = 4


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    recipe = Recipe(model=model, sampler=SamplerConfig(num_inference_steps=9), train=ALL_PHASES)
    loaded = load_model(model)
    return lambda seed=0: Series(recipe, loaded.model, ideas.rows, 9, seed)


def test_each_speed_learns_what_it_would_alone(make, monkeypatch):
    series = make()
    starts, sketch = [], RememberedImages.step_sketch
    monkeypatch.setattr(
        RememberedImages, "step_sketch", lambda *of, **how: starts.append(0) or sketch(*of, **how)
    )
    plans = {speedup: series.learned(speedup).plan for speedup in (1.3, 1.7)}
    assert len(starts) == ALL_PHASES.start_trajectories, "the start is measured once"
    for speedup, plan in plans.items():
        still = replace(ALL_PHASES, trajectories=1, sdt=replace(ALL_PHASES.sdt, learning_rate=1e-9))
        config = still.for_target(target_speedup=speedup)
        alone = RouterTrainer(series.sampler, config, seed=0)
        while alone.trajectory < config.all_trajectories:
            alone.train_one(series.batch(alone.trajectory))
        assert alone.artifact().plan == plan, "with the router's own phase, and nothing remembered"


def test_even_steps_are_fitted_as_learned_ones_are(make):
    plan = make().even_fitted(1.5).plan
    series = make()
    series.learned = None  # a point that is begun again has its learned steps already
    assert series.even_fitted(1.5).plan == plan
    assert plan.forecast != series.even(1.5).forecast and plan.compute == series.even(1.5).compute
    learned = make()
    learned.even = lambda speedup: replace(learned.learned(speedup).plan, forecast=None)
    assert learned.even_fitted(1.5).plan.forecast == make().learned(1.5).plan.forecast


def test_a_point_that_is_begun_again_measures_what_it_lacks(make, tmp_path, monkeypatch):
    path, judge = tmp_path / "results.jsonl", Judge(ideas.rows, IMAGES)
    series = make()
    first = measure(series, 1.5, judge, path, **KINDS)
    assert read_lines(path) == first and len(first) == 6
    assert [line["seed"] for line in first] == [0, 0, None, None, None, None]
    assert not measure(make(), 1.5, judge, path, **KINDS)
    assert [line["method"] for line in measure(make(1), 1.5, judge, path, **KINDS)] == [LEARNED, EVEN]

    path.write_text("".join(f"{json.dumps(line)}\n" for line in first if line["method"] != EVEN))
    (again,) = measure(make(), 1.5, Judge(ideas.rows, IMAGES), path, **KINDS)
    metrics = {"psnr", "worst", "ssim", "features", "frechet"}
    assert {name: again[name] for name in again.keys() - metrics - {"cpu_s"}} == {
        name: first[1][name] for name in first[1].keys() - metrics - {"cpu_s"}
    }
    # Sums of another order differ by roundings, which a Frechet distance of few images cancels down to.
    assert [again[name] for name in metrics] == pytest.approx(
        [first[1][name] for name in metrics], rel=1e-4, abs=1e-6
    )
    # One that was fitted in another way is measured again, and counts.
    older = [{**line, "psnr": 1.0, "fit": "1 rounds"} if "fit" in line else line for line in first]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in older))
    newer = measure(make(), 1.5, Judge(ideas.rows, IMAGES), path, **KINDS)
    assert [line["method"] for line in newer] == [LEARNED, EVEN]
    counted = PointResults(9, 1.5, read_lines(path)).of
    assert [line["psnr"] for line in counted[LEARNED]] == [newer[0]["psnr"]]
    other = [{**older[0], "seed": 1}, *newer]
    assert PointResults(9, 1.5, other).of[LEARNED] == newer[:1], "a seed of another fit is no spread of this"
    with pytest.raises(ValueError, match=r"has \{4\} judged images and --images is 3"):
        measure(make(), 1.5, Judge(ideas.rows, 3), path, **KINDS)


def test_full_images_are_drawn_once_and_are_nothing_apart(make, monkeypatch):
    judge, drawn = Judge(ideas.rows, IMAGES), []
    images = Judge._images
    monkeypatch.setattr(
        Judge, "_images", lambda self, *of: drawn.append(of[0].num_steps) or images(self, *of)
    )
    for series in (make(), make(1)):
        for arm in list(series.arms(1.5, **KINDS))[2:]:
            judge.line(series.sampler, arm.make())
    assert sorted(drawn) == [6, 9, 9, 9, 9], (
        "of 6 and of 9 steps, and of the even plan held, with forecasts and corrected"
    )
    full_NCHW = judge.full(series.sampler)
    found = judge.metrics(full_NCHW, full_NCHW)
    assert found["features"] == found["frechet"] == 0 and found["ssim"] == 1
    other = judge.metrics(full_NCHW.flip(0), full_NCHW)
    assert other["features"] > 0 and other["frechet"] == pytest.approx(0, abs=1e-6), "the same set"


def line(method, psnr, seed=None, *, speed=1.6, worst=30.0, frechet=1e-2):
    place = {"steps": 20, "speedup": 1.6, "seed": seed, "method": method, "speed": speed}
    return place | {
        "psnr": psnr,
        "worst": worst,
        "ssim": psnr / 100,
        "features": 1 / psnr,
        "frechet": frechet,
    }


LINES = [
    *(line(LEARNED, psnr, seed, frechet=2e-3) for seed, psnr in enumerate((49.0, 50.0, 51.0))),
    *(line(EVEN, psnr, seed, worst=31.0) for seed, psnr in enumerate((48.8, 49.0))),
    line(UNTRAINED, 60.0, worst=33.0),
    line("FoCa", 47.0, worst=32.0),
    line("linear forecast", 48.5, frechet=1e-3),
    line("too slow", 60.0, speed=1.5),
    *(line(name, 40.0, worst=20.0) for name in FORECASTS if name != "FoCa"),
]


def test_a_point_says_whether_ours_is_first_and_by_more_than_the_spread():
    (row,) = table(LINES).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "T = 20, 1.6x",
        "**50.0 (49.0 to 51.0)**, worst 30.0 (30.0 to 30.0)",
        "48.9 (48.8 to 49.0), worst 31.0 (31.0 to 31.0)",
        "60.0, worst 33.0",
        "linear forecast 48.5",
        "first, within the spread",
        "no: FoCa 32.0",
        "first, within the spread",
        "first, within the spread",
        "no: linear forecast 0.001",
        "+0.6 dB over even steps; worst tenth behind FoCa; worst tenth behind even steps",
    ]
    higher = [each | {"psnr": each["psnr"] + (each["method"] == LEARNED)} for each in LINES]
    assert str(PointResults(20, 1.6, higher).row()[5]) == "**yes**"
    alone = [each for each in LINES if not each["seed"]]
    assert PointResults(20, 1.6, alone).row()[5] == "first, one seed"
    lower = [each | {"psnr": each["psnr"] - 5 * (each["method"] == LEARNED)} for each in LINES]
    assert PointResults(20, 1.6, lower).row()[5] == "no: linear forecast 48.5"
    assert "not first" in PointResults(20, 1.6, lower).disappointments()
    begun = [each for each in LINES if each["method"] != "Spectrum"]
    assert PointResults(20, 1.6, begun).row()[4:10] == [""] * 6, "not all that compete are measured"


def test_the_colour_model_is_judged_with_its_own_classes_and_classifier():
    recipe = RECIPES["emoji"]()
    sampler = make_sampler(load_model(recipe.model).model, SamplerConfig(num_inference_steps=2))
    labels = set(ideas.rows(sampler, 0, 0, 200).condition_N.tolist())
    assert labels == set(range(len(emoji_data.CLASS_NAMES)))  # 200 of them, of a fixed seed
    judge = Judge(ideas.rows, 2, classifier_folder(recipe.model))
    assert judge.classifier.head.out_features == len(emoji_data.CLASS_NAMES)
    line = judge.line(sampler, Drawn(sampler, even_plan(2, sampler.model.macs(), 1.5), "hold"))
    assert line["psnr"] < 60 and line["features"] > 0 and line["frechet"] > 0


def test_no_training_sees_a_judged_caption():
    recipe = RECIPES["fashion-text"]()
    trained = cross_attention.captions_of(0, recipe.train.all_trajectories * recipe.train.batch_size)
    judged = cross_attention.captions_of(first_judged(recipe), 64)
    assert len({*judged}) == 64 and not {*judged} & {*trained}


def test_the_log_has_the_tables_of_the_recorded_results():
    log = LOG.read_text()
    assert with_tables(log) == log, "python -m tests.benchmarks.grid --write"
    assert all(f"[start:grid-{preset}]" in log for preset in PRESETS)
