"""Evaluating variants: settings that are refused, and numbers that no worker and no batch size changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text
import torch
from tiny_dit import SHAPE, write_model
from tiny_metric_networks import write_alexnet, write_clip, write_inception
from tiny_pipeline import write_pipeline
from tiny_text import write_store
from tolerances import NOISIEST, rounding

from harmonica.core.plan import Plan
from harmonica.data.samples import SampleSpec, make_samples
from harmonica.data.text_encoder import TextEncoder
from harmonica.evaluation.fashion_mnist import CLASS_NAMES
from harmonica.io.resolve import local_path
from harmonica.models.loading import BUILTIN_TEXT, ModelConfig, load_model
from harmonica.samplers import SamplerConfig
from pipelines.config.workflow import EvaluateConfig, WorkflowConfig
from pipelines.evaluation.metric_networks import check_metric_settings, feature_kind
from pipelines.evaluation.quality import NOISE_FLOOR, VariantSampler, evaluate_images
from pipelines.evaluation.variants import Variant

SAMPLER = SamplerConfig(num_inference_steps=3)
SPEC = SampleSpec(seed=5, num_classes=10, shape=(1, 28, 28))
NEAR = rounding(torch.float32, 3 * 2 * 12 * 1000, amplification=NOISIEST, is_random=True)
"""Three guided steps through twelve blocks, 1000 roundings in a row each: 128 wide, 49 tokens, MLP of 512."""


def workflow(**settings: Any) -> WorkflowConfig:
    given = {"samples": 24, "batch_size": 8, "num_actors": 1, "resamples": 20} | settings
    return WorkflowConfig(sampler=SAMPLER, evaluate=EvaluateConfig(**given))


def variants() -> list[Variant]:
    branches = len(load_model(ModelConfig()).model.branches)
    every_second = tuple(bool(n % 2) for n in range(branches))
    plan = Plan(((True,) * branches, every_second, (True,) * branches))
    fewer = replace(SAMPLER, num_inference_steps=2)
    return [Variant("full", SAMPLER), Variant("cached", SAMPLER, plan), Variant("fewer", fewer)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": "clip"}, "evaluate.features is 'clip': give one of auto, classifier, inception"),
        ({"features": "inception"}, "evaluate.inception_path is ''"),
        ({"inception_path": "w.pth"}, "evaluate.inception_path is 'w.pth'"),
        ({"reference_statistics": "r.npz"}, "evaluate.reference_statistics is 'r.npz'"),
        ({"resamples": -1}, "evaluate.resamples is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluateConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": "classifier"}, "evaluate.features is 'classifier', which knows grey images"),
        ({"lpips_path": "a.pth"}, "model.vae is '' and .* makes latents"),
    ],
)
def test_what_a_model_of_latents_cannot_give_is_refused(settings, words, tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model", shape=replace(SHAPE, sample_size=8, in_channels=4, out_channels=4)
    )
    config = replace(workflow(**settings), model=model)
    with pytest.raises(ValueError, match=words):
        check_metric_settings(config, load_model(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clip_path": "clip"}, "evaluate.clip_path is 'clip' and the model takes labels"),
        ({"lpips_path": "/no/such.pth"}, "checkpoint /no/such.pth does not exist"),
        ({"features": "inception", "inception_path": "/no/such.pth"}, "/no/such.pth does not exist"),
        (
            {"features": "inception", "inception_path": "w", "reference_statistics": "/no/such.npz"},
            "evaluate.reference_statistics /no/such.npz cannot be read",
        ),
    ],
)
def test_files_that_are_not_there_are_refused_before_any_work(settings, words) -> None:
    config = workflow(**settings)
    with pytest.raises(ValueError, match=words):
        check_metric_settings(config, load_model(config.model))


def test_auto_is_the_classifier_for_built_in_models_alone() -> None:
    assert feature_kind(EvaluateConfig(), ModelConfig()) == "classifier"
    assert feature_kind(EvaluateConfig(), ModelConfig(path="org/other")) is None
    check_metric_settings(workflow(), load_model(ModelConfig()))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (("cached", "full"), "^variant 'cached' comes before its reference 'full': put it after"),
        (("full", "full"), "^two variants are named 'full': give each its own name"),
        (("full", NOISE_FLOOR), f"^two variants are named '{NOISE_FLOOR}': give each its own name"),
    ],
)
def test_variants_out_of_order_or_of_one_name_are_refused(order: tuple[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate_images(workflow(), SPEC, [Variant(name, SAMPLER) for name in order])


def test_an_actor_s_columns_do_not_depend_on_the_batch() -> None:
    rows = make_samples(np.arange(6), SPEC)
    actor = VariantSampler(workflow(), SPEC, variants())
    whole = actor(rows)
    parts = [actor({name: column[i : i + 2] for name, column in rows.items()}) for i in (0, 2, 4)]
    names = ("full", "cached", "fewer")
    assert set(whole) == {"index", "label"} | {
        *(
            f"{variant}.{name}"
            for variant in ("full", "cached", "fewer")
            for name in ("pooled", "spatial", "logits")
        ),
        *(f"{variant}.{name}" for variant in ("cached", "fewer") for name in ("psnr", "ssim")),
        *(f"{variant}.class" for variant in (*names, NOISE_FLOOR)),
        *(f"{NOISE_FLOOR}.{name}" for name in ("pooled", "spatial", "logits")),
    }
    for name, column in whole.items():
        found = np.concatenate([part[name] for part in parts])
        assert np.linalg.norm(found - column) <= NEAR * np.linalg.norm(column), name
    assert not np.allclose(whole[f"{NOISE_FLOOR}.pooled"], whole["full.pooled"])


def test_inception_and_lpips_look_at_images(tmp_path: Path) -> None:
    config = workflow(
        features="inception",
        inception_path=str(write_inception(tmp_path / "w.pth")),
        lpips_path=str(write_alexnet(tmp_path / "a.pth")),
        noise_floor=False,
    )
    check_metric_settings(config, load_model(config.model))
    out = VariantSampler(config, SPEC, variants()[:2])(make_samples(np.arange(2), SPEC))
    assert out["cached.pooled"].shape == (2, 2048) and out["cached.spatial"].shape == (2, 2023)
    assert (out["cached.lpips"] > 0).all() and "cached.class" not in out
    assert not any(name.startswith(NOISE_FLOOR) for name in out)


def test_latents_are_decoded_where_somebody_looks_at_pictures(tmp_path: Path) -> None:
    model = ModelConfig(path=str(write_pipeline(tmp_path / "pipeline")))
    spec = SampleSpec(seed=5, num_classes=1000, shape=(4, 8, 8))
    rows, two = make_samples(np.arange(2), spec), [Variant("full", SAMPLER), Variant("full 2", SAMPLER)]
    plain = replace(workflow(), model=model)
    out = VariantSampler(plain, spec, two)(rows)
    assert set(out) == {"index", "label", "full 2.psnr"}, "latents: no windows over them, no features"
    assert (out["full 2.psnr"] == 100).all()
    looked_at = replace(workflow(lpips_path=str(write_alexnet(tmp_path / "a.pth"))), model=model)
    check_metric_settings(looked_at, load_model(model))
    actor = VariantSampler(looked_at, spec, two)
    assert actor.metrics.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    out = actor(rows)
    assert (out["full 2.ssim"] == 1).all() and (out["full 2.lpips"] == 0).all()


def test_pictures_are_held_against_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_text, "TOKENS", 16)
    encoder = TextEncoder.load(local_path(BUILTIN_TEXT), dtype="float32")
    store = write_store(
        tmp_path / "store", encoder, ["a dark bag", "a photo of a pale dress", "no such thing"]
    )
    config = replace(
        workflow(clip_path=str(write_clip(tmp_path / "clip"))),
        model=ModelConfig(path=BUILTIN_TEXT, text_tokens=16),
        sampler=replace(SAMPLER, name="dpm-solver++"),
    )
    loaded = load_model(config.model)
    check_metric_settings(config, loaded)
    spec = SampleSpec.of(loaded.model, 5, store)
    rows = make_samples(np.arange(6), spec)
    out = VariantSampler(config, spec, [Variant("full", config.sampler)])(rows)
    bag, dress = CLASS_NAMES.index("Bag"), CLASS_NAMES.index("Dress")
    np.testing.assert_array_equal(out["label"], np.array([bag, dress, -1])[rows["label"]])
    scores = out["full.clip_score"]
    assert scores.shape == (6,) and len(set(scores.tolist())) > 1


@pytest.mark.slow
@pytest.mark.cluster
def test_the_number_of_workers_does_not_change_the_report(private_cluster: None) -> None:
    plain = evaluate_images(workflow(), SPEC, variants())
    workers = evaluate_images(workflow(num_actors=2), SPEC, variants())
    assert workers == plain, "bit for bit"
    assert set(plain) == {"full", "cached", "fewer"}
    assert set(plain["full"][NOISE_FLOOR]) >= {"frechet_to_full", "kid_to_full", "kid_to_full_interval"}
