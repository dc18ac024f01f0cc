"""The gate: what it asks, whom it compares with, and what it leaves in the registry."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import ray
import torch
from tiny_dit import SAMPLER, make_artifact, write_model

from harmonica.core.golden_sample import record_sample
from harmonica.evaluation.evaluation_report import (
    Estimate,
    EvaluationReport,
    RouterSpeeds,
    VariantResult,
)
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines.config.promotion import PromoteConfig
from pipelines.config.workflow import WorkflowConfig
from pipelines.promotion.decision import Decision, apply_decision, decide, measurements, reproduction_error
from pipelines.promotion.gate import MEASURED_ON, compare_with_champion, finite_check, quality_checks, score
from pipelines.run_state.storage import RunStorage
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create

NAME = "tiny"
GATE = PromoteConfig(min_psnr_to_full=30, max_frechet_to_full=0.1, min_speedup=1.3)


def report(psnr=40.0, speedup=1.5, frechet=0.01, worth=True):
    metrics = {"psnr_to_full": Estimate(psnr), "frechet_to_full": Estimate(frechet)}
    words = "Worth having: nearer." if worth else "Not worth having as trained: fewer steps are nearer."
    return EvaluationReport(
        variants={"full": VariantResult(8), "cached": VariantResult(8, speedup=speedup, metrics=metrics)},
        speeds=RouterSpeeds(cur=0.5, ideal_speedup=1.6, measured_speedup=speedup, realised_share=0.9),
        samples=16,
        worth_having=worth,
        verdict=words,
    )


@pytest.mark.parametrize(
    ("made", "failed", "words"),
    [
        (report(), set(), ""),
        (report(psnr=29.9), {"psnr_to_full"}, "PSNR to full is 29.90 dB, at least 30 is asked"),
        (report(frechet=0.2), {"frechet_to_full"}, "Frechet distance to full is 0.2000, at most 0.1"),
        (report(speedup=1.2), {"speedup"}, "measured speedup is 1.20x, at least 1.3x is asked"),
        (report(worth=False), {"fewer_steps"}, "Not worth having as trained: fewer steps are nearer"),
        (report(psnr=1, speedup=1.0), {"psnr_to_full", "speedup"}, ""),
    ],
)
def test_every_bound_is_held_and_says_its_number(made, failed, words):
    checks = quality_checks(made, GATE)
    assert {check.name for check in checks if check.passed is False} == failed
    assert words in "; ".join(check.message for check in checks if check.passed is False)


def test_what_is_not_asked_or_not_measured_holds_nothing_up():
    nothing = PromoteConfig(min_psnr_to_full=0, min_speedup=1, beat_fewer_steps=False)
    bad = report(psnr=1, frechet=9, speedup=1.0, worth=False)
    assert [check.passed for check in quality_checks(bad, nothing)] == [None, None, True, None]
    cached = dataclasses.replace(bad.cached, metrics={"psnr_to_full": Estimate(1)})
    bad = dataclasses.replace(bad, variants={"cached": cached})
    by_name = {check.name: check for check in quality_checks(bad, GATE)}
    assert by_name["frechet_to_full"].passed is None
    assert by_name["frechet_to_full"].message == "Frechet distance to full is not measured"


def test_the_score_lets_the_nearer_or_the_faster_win():
    assert score(40, 1.5, 12) < score(40.1, 1.5, 12)
    assert score(40, 1.5, 12) < score(40, 1.51, 12)
    assert score(40, 2.0, 12) == pytest.approx(score(52, 1.0, 12))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@dataclasses.dataclass
class Champion:
    """What is read of a registered version."""

    tags: dict
    version: str = "7"


def compared(ours, theirs, new=None, old=None, **tags):
    settings = PromoteConfig()
    their_tags = measurements(theirs, old, use_gpu=False) | tags
    our_tags = measurements(ours, new or report(), use_gpu=False)
    return compare_with_champion(ours, our_tags, theirs, Champion(their_tags), settings)


@pytest.mark.parametrize(
    ("new", "old", "better"),
    [
        (report(40.5, 1.5), report(40.0, 1.5), True),
        (report(39.5, 1.5), report(40.0, 1.5), False),
        (report(40.0, 1.5), report(40.0, 1.5), False),  # better, not as good
        (report(40.0, 1.6), report(40.0, 1.5), True),
        (report(38.0, 1.8), report(41.5, 1.5), False),
        (report(38.0, 1.8), report(40.5, 1.5), True),
    ],
)
def test_the_champion_is_beaten_by_a_higher_score(model, new, old, better):
    check = compared(make_artifact(model, seed=1), make_artifact(model, seed=2), new, old)
    assert check.passed is better
    assert f"({old.cached.psnr_to_full:.2f} dB at {old.speeds.measured_speedup:.2f}x)" in check.message


def test_a_champion_for_something_else_holds_nothing_up(model):
    ours, theirs = make_artifact(model, seed=1), make_artifact(model, seed=2)
    much_better = report(90, 3.0)
    assert compared(ours, theirs, old=much_better).passed is False
    guided = dataclasses.replace(theirs, sampler=dataclasses.replace(SAMPLER, guidance_scale=3.0))
    other_weights = dataclasses.replace(theirs, model=theirs.model | {"weights": "others"})
    for champion, tags, words in (
        (guided, {}, "another sampler.guidance_scale"),
        (other_weights, {}, "another model"),
        (theirs, {MEASURED_ON: "gpu"}, "measured on a gpu, this one on a cpu"),
    ):
        check = compared(ours, champion, old=much_better, **tags)
        assert (check.passed, words in check.message) == (None, True), check.message
    assert "not recorded" in compared(ours, theirs, old=None).message


def test_the_champions_router_trained_again_is_no_worse_for_a_slower_moment(model):
    ours = make_artifact(model, seed=1)
    check = compared(ours, make_artifact(model, seed=1), report(speedup=1.4), report(speedup=1.5))
    assert check.passed and "the router of version 7" in check.message


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "store"


def make_config(model, store, **settings):
    promotion = dataclasses.replace(GATE, min_psnr_to_full=30)
    return WorkflowConfig(
        model=model,
        sampler=SAMPLER,
        registered_model=NAME,
        storage_path=str(store),
        **{"promotion": promotion} | settings,
    )


def add(config, store, run_id, artifact, made):
    """Register one and decide about it, as the stage does."""
    run = find_or_create("workflow", run_id, str(store), {})
    version = registry.register(artifact.save(store / run_id), name=NAME, run=run, alias=None)
    decision = decide(config, artifact, made, version, run)
    apply_decision(decision, run)
    return run, decision


def with_sample(model, seed):
    artifact = make_artifact(model, seed=seed)
    return record_sample(artifact, make_sampler(load_model(model).model, artifact.sampler))


def test_never_leaves_the_champion_and_always_takes_the_alias(model, store):
    never, always = (make_config(model, store, promote=mode) for mode in ("never", "always"))
    run, decision = add(never, store, "a", make_artifact(model, seed=1), report())
    assert not decision.is_promoted and not decision.is_rejected
    assert registry.current(NAME, "champion", run.uri) is None
    assert registry.newest_versions(NAME, run.uri, 9) == [], "nobody asked for it to be served"

    run, decision = add(always, store, "b", make_artifact(model, seed=2), None)
    assert decision.is_promoted
    assert registry.resolve(NAME, "champion", run.uri) == "2"
    assert registry.newest_versions(NAME, run.uri, 9) == ["2"]
    tags = run.client.get_model_version(NAME, "1").tags
    assert (tags["psnr_to_full"], tags["measured_speedup"], tags["harmonica.gate"]) == ("40", "1.5", "never")
    _, decision = add(never, store, "a", make_artifact(model, seed=1), report())
    assert (decision.version, decision.champion) == ("1", "2"), "no second version"


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (report(psnr=float("nan")), "psnr_to_full is nan"),
        (report(frechet=float("inf")), "frechet_to_full is inf"),
        (report(speedup=float("nan")), "measured_speedup is nan"),
        (None, "its recorded sample is not finite"),
    ],
)
@pytest.mark.parametrize("mode", ["always", "gate"])
def test_nothing_that_is_not_finite_is_promoted_in_any_way(model, mode, spoilt, words):
    artifact = make_artifact(model, seed=1)
    if spoilt is None:
        artifact = dataclasses.replace(artifact, sample_CHW=torch.full((1, 28, 28), torch.nan))
    decision = Decision(mode, NAME, "1", (finite_check(artifact, spoilt),))
    assert not decision.is_promoted and decision.is_rejected and decision.outcome == "refused"
    assert decision.message == f"version 1 of tiny is kept and not promoted, there is no champion: {words}"
    assert Decision("never", NAME, "1", decision.checks).outcome == "never"


def test_always_passes_over_the_gate_s_own_questions_alone(model, store):
    bad = report(psnr=1, worth=False)
    checks = (finite_check(make_artifact(model), bad), *quality_checks(bad, GATE))
    decision = Decision("always", NAME, "1", checks)
    assert decision.failed and decision.is_promoted and decision.outcome == "always"
    spoilt = report(psnr=float("nan"))
    run, decision = add(make_config(model, store, promote="always"), store, "a", make_artifact(model), spoilt)
    assert registry.current(NAME, "champion", run.uri) is None
    assert registry.newest_versions(NAME, run.uri, 9) == [], "what is refused is served to nobody"
    tags = run.client.get_model_version(NAME, "1").tags
    assert (tags["harmonica.gate"], tags["harmonica.gate.finite"]) == (
        "refused",
        "failed: psnr_to_full is nan",
    )


def test_numbers_that_are_not_finite_pass_no_bound(model):
    """Also where nothing is asked of them."""
    nan = float("nan")
    for made in (report(psnr=nan), report(frechet=nan), report(speedup=nan)):
        assert [check.passed for check in quality_checks(made, GATE)].count(False) == 1
        assert finite_check(make_artifact(model), made).passed is False
    assert finite_check(make_artifact(model), report()).passed
    assert finite_check(make_artifact(model), None).passed
    best = compared(make_artifact(model, seed=1), make_artifact(model, seed=2), report(psnr=nan), report())
    assert best.passed is False, "nor do they beat a champion"


def test_a_router_that_draws_otherwise_is_known(model, store):
    config = make_config(model, store)
    ours = with_sample(model, 1)
    assert reproduction_error(config, ours) == ""
    flipped = dataclasses.replace(ours, sample_CHW=ours.sample_CHW.flip(1))
    assert "sample differs by" in reproduction_error(config, flipped)
    assert "no recorded sample" in reproduction_error(config, dataclasses.replace(ours, sample_CHW=None))
    longer = dataclasses.replace(config, sampler=dataclasses.replace(SAMPLER, num_inference_steps=9))
    assert "sampler.num_inference_steps is 9" in reproduction_error(longer, ours)


@pytest.mark.cluster
def test_the_gate_promotes_what_passes_and_keeps_what_does_not(model, store, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = make_config(model, store)
    first, second = with_sample(model, 1), with_sample(model, 2)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        run, decision = add(config, store, "first", first, report(40, 1.5))
        assert decision.message == "version 1 of tiny is the champion"
        stored = run.client.get_model_version(NAME, "1").tags
        assert stored["harmonica.gate"] == "passed"
        assert stored["harmonica.gate.reproduces"].startswith("passed: it loads from the registry")
        assert stored["harmonica.gate.speedup"] == "passed: measured speedup is 1.50x, at least 1.3x is asked"

        run, decision = add(config, store, "worse", second, report(39, 1.5))
        assert [check.name for check in decision.failed] == ["champion"]
        assert "version 1 stays the champion" in decision.message
        assert run.client.get_model_version(NAME, "2").tags["harmonica.gate"] == "refused"
        assert registry.resolve(NAME, "champion", run.uri) == "1"
        assert registry.newest_versions(NAME, run.uri, 9) == ["1"], "what is refused is served to nobody"

        # Its files in the registry are not what was measured.
        run = find_or_create("workflow", "damaged", str(store), {})
        root = run.client.get_run(run.mlflow_run_id).info.artifact_uri.removeprefix("file://")
        folder = dataclasses.replace(second, sample_CHW=first.sample_CHW).save(store / "other")
        registry.register(folder, name=NAME, run=run, alias=None)
        run, decision = add(config, store, "damaged", second, report(50, 1.6))
        assert [check.name for check in decision.failed] == ["reproduces"]
        shutil.rmtree(Path(root) / "router")
        RunStorage(str(store), "damaged").upload_folder(second.save(store / "x"), "x")
        shutil.copytree(store / "x", Path(root) / "router")
        _, decision = add(config, store, "damaged", second, report(50, 1.6))
        assert decision.version == "3" and decision.is_promoted, "decided again until it was the champion"
    finally:
        ray.shutdown()
