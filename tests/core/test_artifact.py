"""A router artifact comes back as it was saved, and refuses what it was not made for."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dit import SAMPLER, make_artifact, write_model

from harmonica.builtin import CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.models.dit.model import DiT
from harmonica.models.loading import load_model
from harmonica.samplers import Ddim, SamplerConfig


@pytest.fixture
def artifact(tiny_sampler) -> RouterArtifact:
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    logits[-1] = 5.0
    return RouterArtifact.build(
        logits, tiny_sampler, threshold=0.5, reuse="forecast", training={"run_id": "a", "seed": 3}
    )


@pytest.fixture
def folder(artifact, tmp_path) -> Path:
    return artifact.save(tmp_path / "router")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(artifact, folder):
    loaded = RouterArtifact.load(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "router.safetensors"]
    assert torch.equal(loaded.logits_TB, artifact.logits_TB)
    for field in dataclasses.fields(artifact):
        if field.name != "logits_TB":
            assert getattr(loaded, field.name) == getattr(artifact, field.name), field.name
    assert loaded.plan == artifact.plan


@pytest.mark.parametrize(
    ("reuse", "is_fitted", "training", "method"),
    [
        ("forecast", True, {"initial": "measured", "chosen": "measured"}, "learned steps + fitted forecast"),
        ("forecast", True, {"initial": "measured", "chosen": "even"}, "even steps + fitted forecast"),
        (
            "forecast",
            True,
            {"initial": "measured", "chosen": "trained"},
            "learned steps + fitted forecast + trained router",
        ),
        ("forecast", False, {"initial": "measured"}, "learned steps + linear forecast + trained router"),
        ("forecast", False, {"initial": "even", "chosen": "even"}, "even steps + linear forecast"),
        ("hold", False, {"initial": "normal"}, "held values + trained router"),
        ("hold", False, {}, "held values + trained router"),
    ],
)
def test_the_method_says_what_was_searched_fitted_and_trained(artifact, reuse, is_fitted, training, method):
    fitted = torch.zeros(*artifact.logits_TB.shape, 2) if is_fitted else None
    made = dataclasses.replace(artifact, reuse=reuse, forecast_TBK=fitted, training=training)
    assert made.method == method


def test_the_built_in_champion_has_learned_steps():
    """What README says of it: the scores that SDT trained were discarded."""
    assert RouterArtifact.load(CHAMPION).method == "learned steps + fitted forecast"


def test_others_may_read_what_is_saved(folder):
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777, path.name


def test_config_says_what_people_ask_for(artifact, folder, tiny_dit):
    config = json.loads((folder / "config.json").read_text())
    plan = artifact.plan
    assert 0.2 < config["cur"] == plan.cur < 0.8
    assert config["plan"] == plan.to_strings()
    assert config["macs_full"] == 6 * tiny_dit.macs().full
    assert config["macs_planned"] == plan.macs(tiny_dit.macs())
    assert config["ideal_speedup"] == plan.ideal_speedup(tiny_dit.macs())
    assert config["model"]["num_layers"] == 3
    assert set(config["versions"]) == {"harmonica", "torch", "python"}


def test_its_own_model_and_sampler_are_accepted(folder, tiny_sampler):
    RouterArtifact.load(folder).check(tiny_sampler.model, tiny_sampler.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 20}, r"num_inference_steps is 20 and the router was made for 6"),
        ({"guidance_scale": 4.0}, r"guidance_scale is 4.0 and the router was made for 1.5"),
        ({"guidance_channels": "all"}, r"guidance_channels is all and the router was made for first_three"),
        ({"clip_sample": True}, r"clip_sample is True and the router was made for False"),
    ],
)
def test_another_sampler_is_refused(folder, tiny_sampler, change, message):
    config = dataclasses.replace(tiny_sampler.config, **change)
    with pytest.raises(ValueError, match=rf"^sampler\.{message}: use it as it was trained"):
        RouterArtifact.load(folder).check(tiny_sampler.model, config)


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", 4), ("attention_head_dim", 8), ("sample_size", 4)]
)
def test_another_model_is_refused(folder, tiny_sampler, tiny_shape, name, value):
    model = DiT(dataclasses.replace(tiny_shape, **{name: value}))
    with pytest.raises(ValueError, match=rf"^model\.{name} is {value} and the router was made for"):
        RouterArtifact.load(folder).check(model, tiny_sampler.config)


def test_another_training_of_the_same_shape_is_refused(folder, tiny_sampler, tiny_shape):
    model = DiT(tiny_shape)
    model.initialize(torch.Generator().manual_seed(99), zero=False)
    with pytest.raises(
        ValueError, match=r"^model\.weights is sha256:\w+ and the router was made for sha256:"
    ):
        RouterArtifact.load(folder).check(model, tiny_sampler.config)


def test_a_plan_that_is_not_the_logits_is_refused(folder):
    rows = json.loads((folder / "config.json").read_text())["plan"]
    rows[2] = rows[2].translate(str.maketrans("01", "10"))
    edit(folder, plan=rows)
    with pytest.raises(ValueError, match=r"not that of router.safetensors at threshold 0.5: .* was altered"):
        RouterArtifact.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.neg, r"not that of router.safetensors at threshold 0.5: the folder was altered"),
        (torch.flatten, r"give a T x B table"),
    ],
)
def test_logits_that_are_not_the_plan_are_refused(folder, change, words):
    path = folder / "router.safetensors"
    save_file({"logits": change(load_file(path)["logits"])}, path)
    with pytest.raises(ValueError, match=words):
        RouterArtifact.load(folder)


def test_another_threshold_is_refused(folder):
    edit(folder, threshold=0.9)
    with pytest.raises(ValueError, match=r"at threshold 0.9: the folder was altered"):
        RouterArtifact.load(folder)


def test_a_truncated_router_is_refused(folder):
    path = folder / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"router.safetensors cannot be read, it may be truncated"):
        RouterArtifact.load(folder)


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf"), "1.5", True, None, [2]])
@pytest.mark.parametrize("name", ["threshold", "ideal_speedup", "macs_full"])
def test_what_is_no_number_above_0_is_refused(folder, name, value):
    if (name, value) == ("threshold", 0):
        value = -0.5  # 0 computes everything
    edit(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"{name} in config.json is .* and no number above 0"):
        RouterArtifact.load(folder)


@pytest.mark.parametrize("text", [None, "{", '{"format_version": 1', "[" * 100_000])
def test_a_missing_or_broken_config_is_refused(folder, text):
    path = folder / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=r"no readable config.json .*give a router artifact folder"):
        RouterArtifact.load(folder)


def test_a_config_without_a_field_names_it(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["sampler"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks or misnames 'sampler'"):
        RouterArtifact.load(folder)


def test_a_future_format_says_what_to_install(folder):
    edit(folder, format_version=5, versions={"harmonica": "9.1"})
    with pytest.raises(ValueError, match=r"format_version 5, this version reads 1 to 4: install .*\(9\.1\)"):
        RouterArtifact.load(folder)


def test_it_is_made_for_the_samplers_configuration(artifact, tiny_dit):
    assert artifact.sampler == SamplerConfig(
        num_inference_steps=6, guidance_scale=1.5, guidance_channels="first_three", clip_sample=False
    )
    assert Ddim(tiny_dit, artifact.sampler).num_steps == artifact.plan.num_steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_saved_in_half_precision_is_the_same_model(tmp_path, dtype):
    folder = make_artifact(write_model(tmp_path / "model")).save(tmp_path / "router")
    half = write_model(tmp_path / "half")
    path = tmp_path / "half" / "model.safetensors"
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(rounded, path)
    RouterArtifact.load(folder).check(load_model(half).model, SAMPLER)
    name = next(iter(rounded))
    rounded[name].view(-1)[0] += 1
    save_file(rounded, path)
    with pytest.raises(ValueError, match=r"model.weights is sha256:\w+ and the router was made for sha256"):
        RouterArtifact.load(folder).check(load_model(half).model, SAMPLER)
