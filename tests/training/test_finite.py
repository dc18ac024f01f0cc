"""What is not finite stops: training in each of its phases, evaluation, sweeps, samples and pictures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dit import HUGE, SAMPLER, make_artifact, write_model, write_overflowing
from tiny_text import make_encoder, write_text_folder
from torch import Tensor

from harmonica.cli import sample as sample_command
from harmonica.cli import train as train_command
from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import check_sample, record_sample
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.data.samples import SampleSpec, make_samples
from harmonica.data.text_encoder import TextEncoder
from harmonica.evaluation.plots import encode_picture, to_uint8
from harmonica.models.loading import ModelConfig, load_model
from harmonica.models.vae import decode_latents
from harmonica.samplers import make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.sdt_config import SdtConfig
from harmonica.training.trainer import RouterTrainer
from harmonica.validation.finite import NotFinite, check_finite, not_finite
from pipelines.config.workflow import EvaluateConfig, WorkflowConfig
from pipelines.evaluation.latency import measure
from pipelines.evaluation.quality import VariantSampler
from pipelines.evaluation.variants import Variant
from pipelines.presets import fashion
from pipelines.runtime.ray_runtime import plainly
from pipelines.sweep.trial import _Probe


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return write_overflowing(tmp_path_factory.mktemp("overflowing"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return write_model(tmp_path_factory.mktemp("good"))


def broken_router(model: ModelConfig) -> RouterArtifact:
    """Its plan is a router's, its forecasts overflow."""
    artifact = dataclasses.replace(make_artifact(model), reuse="forecast")
    shape = (*artifact.logits_TB.shape, 1)
    return dataclasses.replace(artifact, forecast_TBK=torch.full(shape, 3e38))


def test_how_many_rows_are_not_finite_is_said() -> None:
    rows = torch.zeros(4, 2, 3)
    check_finite(rows, "rows are")
    rows[1, 0, 0], rows[3, 1, 2] = torch.nan, -torch.inf
    with pytest.raises(
        NotFinite, match=r"^rows are not finite \(2 of 4\): the weights or the router are damaged"
    ):
        check_finite(rows, "rows are")
    assert not_finite({"loss": 1.0, "psnr": float("inf"), "mse": float("nan")}) == "psnr is inf"
    assert not_finite({"loss": 1.0}) == ""


# Training


PHASES: dict[str, dict[str, Any]] = {
    "start": {"initial": "measured", "target_speedup": 1.5, "start_trajectories": 1},
    "start for a quality": {"initial": "measured", "target_psnr": 30.0, "start_trajectories": 1},
    "router": {"sdt": SdtConfig(beta=1e-3)},
    "router, hard": {"sdt": SdtConfig(beta=1e-3, student="hard"), "iepo": "none"},
}


def one_trajectory(model: ModelConfig, settings: dict[str, Any]) -> tuple[RouterTrainer, Batch]:
    plain = {"trajectories": 1, "start_trajectories": 0, "choice_trajectories": 0, "batch_size": 2}
    config = TrainingConfig(**plain | settings)
    run = RouterTrainer(make_sampler(load_model(model).model, SAMPLER), config, seed=0)
    spec = SampleSpec.of(run.sampler.model, 0, None)
    return run, spec.to_batch(make_samples(np.arange(2), spec), "cpu")


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_of_training_stops(overflowing: ModelConfig, good: ModelConfig, phase: str) -> None:
    run, rows = one_trajectory(overflowing, PHASES[phase])
    words = r"^trajectory 0: [\w.]+ is (nan|inf), since the full sampler's images are not finite \(2 of 2\)"
    with pytest.raises(NotFinite, match=words):
        run.train_one(rows)
    assert run.trajectory == 0
    run, rows = one_trajectory(good, PHASES[phase])
    run.train_one(rows)
    assert run.trajectory == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"target_speedup": 1.5, "initial": "even", "choice_trajectories": 1},
        {
            "target_speedup": 1.5,
            "initial": "even",
            "forecast": ForecastConfig(trajectories=4, probes=1),
            "sdt": SdtConfig(reuse="forecast"),
        },
    ],
    ids=["choice", "forecasts"],
)
def test_what_follows_the_router_s_training_stops_too(
    overflowing: ModelConfig, good: ModelConfig, settings: dict[str, Any]
) -> None:
    run, rows = one_trajectory(overflowing, settings)
    run.load_state(run.state() | {"trajectory": 1})
    with pytest.raises(NotFinite, match=r"^trajectory 1: [\w.]+ is nan, since the full"):
        run.train_one(rows)
    run, rows = one_trajectory(good, settings)
    run.load_state(run.state() | {"trajectory": 1})
    run.train_one(rows)


def test_a_router_that_diverges_by_itself_is_told_apart(good: ModelConfig) -> None:
    run, rows = one_trajectory(good, {"sdt": SdtConfig(beta=1e-3), "iepo": "none"})
    with torch.no_grad():
        run.router.rows[3].fill_(torch.nan)
    with pytest.raises(NotFinite, match=r"though the full sampler's images are finite: .*learning_rate"):
        run.train_one(rows)


def test_the_command_stops_with_one_line_and_keeps_no_state(
    overflowing: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "fashion",
        f"--model.path={overflowing.path}",
        f"--output={tmp_path / 'out'}",
        "--device=cpu",
    ]
    assert train_command.main([*arguments, "--train.batch-size=2", "--sampler.num-inference-steps=4"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: trajectory 0: loss is nan") and "\n" not in error
    assert not (tmp_path / "out").exists()


# Evaluation, sweeps, samples


SPEC = SampleSpec(seed=5, num_classes=10, shape=(1, 28, 28))


def workflow(model: ModelConfig) -> WorkflowConfig:
    base = fashion()
    evaluate = EvaluateConfig(
        samples=16, batch_size=4, num_actors=1, resamples=0, timing_rounds=1, timing_batch_size=2
    )
    return dataclasses.replace(base, model=model, sampler=SAMPLER, evaluate=evaluate)


def arms_of(artifact: RouterArtifact) -> list[Variant]:
    return [Variant("full", SAMPLER), Variant("cached", SAMPLER, artifact.plan, artifact.reuse)]


def test_evaluation_stops_at_the_variant_that_is_not_finite(
    overflowing: ModelConfig, good: ModelConfig
) -> None:
    batch = make_samples(np.arange(4), SPEC)
    for model, artifact, variant in (
        (overflowing, make_artifact(overflowing), "full"),
        (good, broken_router(good), "cached"),
    ):
        sampler = VariantSampler(workflow(model), SPEC, arms_of(artifact))
        with pytest.raises(NotFinite, match=rf"^images of variant '{variant}' are not finite \(4 of 4\)"):
            sampler(batch)
    VariantSampler(workflow(good), SPEC, arms_of(make_artifact(good)))(batch)


def test_timing_stops_too_before_anything_is_evaluated(good: ModelConfig) -> None:
    with pytest.raises(NotFinite, match=r"^images of variant 'cached' are not finite \(10 of 10\)"):
        measure(workflow(good), broken_router(good), {})


def test_a_trial_of_a_sweep_stops(overflowing: ModelConfig) -> None:
    config = workflow(overflowing)
    run, _ = one_trajectory(overflowing, {})
    with pytest.raises(NotFinite, match=r"^the full sampler's images are not finite"):
        _Probe(config, run, run.sampler.model)  # type: ignore[arg-type]


def test_what_a_worker_met_is_told_without_ray_s_account_of_it() -> None:
    class OfATask(NotFinite):
        """As Ray makes it: of both classes, the text a stack, the error itself inside."""

        def __init__(self) -> None:
            super().__init__("Traceback ... NotFinite: loss is nan")
            self.cause = NotFinite("loss is nan")

    class OfRayData(Exception):
        pass

    inside = OfRayData("user code failed")
    inside.__cause__ = OfATask()
    for error in (OfATask(), inside, NotFinite("loss is nan")):
        with pytest.raises(NotFinite) as caught, plainly():
            raise error
        assert str(caught.value) == "loss is nan"
    with pytest.raises(RuntimeError, match="other"), plainly():
        raise RuntimeError("other")


def test_a_router_s_sample_is_recorded_only_where_it_is_finite(
    overflowing: ModelConfig, good: ModelConfig
) -> None:
    for model, artifact in ((overflowing, make_artifact(overflowing)), (good, broken_router(good))):
        sampler = make_sampler(load_model(model).model, SAMPLER)
        with pytest.raises(NotFinite, match=r"^the router's sample is not finite"):
            record_sample(artifact, sampler)
        with pytest.raises(ValueError, match="the router's sample is not finite"):
            check_sample(artifact, sampler)


@pytest.mark.parametrize("name", ["logits", "forecast"])
def test_a_router_that_is_not_finite_does_not_load(good: ModelConfig, tmp_path: Path, name: str) -> None:
    artifact = make_artifact(good)
    artifact = dataclasses.replace(artifact, forecast_TBK=torch.zeros(*artifact.logits_TB.shape, 1))
    artifact.save(tmp_path)
    RouterArtifact.load(tmp_path)
    tensors = load_file(tmp_path / "router.safetensors")
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, tmp_path / "router.safetensors")
    plan = json.loads((tmp_path / "config.json").read_text())
    plan["plan"] = None
    with pytest.raises(ValueError, match=f"{name} in router.safetensors is not finite"):
        RouterArtifact.load(tmp_path)


def test_the_sampling_command_draws_no_black_picture(
    overflowing: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--model.path={overflowing.path}", "--classes=1", "--rounds=1", "--num-inference-steps=3"]
    assert sample_command.main([*arguments, f"--output={tmp_path / 'x.png'}", "--device=cpu"]) == 1
    assert "error: the full samples are not finite (1 of 1)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Pictures, decoders, prompts


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_picture_is_made_of_what_is_not_finite(value: float) -> None:
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 3] = value
    with pytest.raises(NotFinite, match=r"images are not finite \(1 of 2\)"):
        to_uint8(images)
    assert encode_picture(images[0]).startswith(b"\x89PNG")
    with pytest.raises(NotFinite):
        encode_picture(images[1], "jpeg")


class _Overflowing(torch.nn.Module):
    """A decoder whose second image has a value that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = type("Config", (), {"scaling_factor": 1.0})()

    def decode(self, latents: Tensor) -> Any:
        images = latents * 3
        images[1, 0, 0, 0] = torch.inf
        return type("Decoded", (), {"sample": images})()


def test_an_overflow_in_the_decoder_is_not_clamped_away() -> None:
    images = decode_latents(_Overflowing(), torch.ones(2, 3, 4, 4))
    assert torch.equal(images[0], torch.ones(3, 4, 4))
    assert images[1].isnan().sum() == 1


def test_a_text_encoder_that_overflows_is_told_with_its_precision(tmp_path: Path) -> None:
    folder = write_text_folder(tmp_path)
    encoder = make_encoder()
    with torch.no_grad():
        encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(HUGE)
        encoder.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(torch.nan)
    encoder.save_pretrained(folder / "text_encoder")
    loaded = TextEncoder.load(folder, dtype="float32")
    with pytest.raises(
        NotFinite, match=r"are not finite \(1 of 1\): it runs in float32, whose range a T5 may leave"
    ):
        loaded.encode(["a red cat"], 7)


def test_no_value_is_looked_at_inside_a_trajectory(good: ModelConfig, monkeypatch: Any) -> None:
    """Each look would make the device wait for the host."""
    sampler = make_sampler(load_model(good).model, SAMPLER)
    looked: list[str] = []
    for name in ("isfinite", "item", "tolist", "__bool__", "__float__"):
        own = getattr(Tensor, name)

        def counting(self: Tensor, *args: Any, name: str = name, own: Any = own) -> Any:
            looked.append(name)
            return own(self, *args)

        monkeypatch.setattr(Tensor, name, counting)
    rows = make_samples(np.arange(2), SPEC)
    batch = SPEC.to_batch(rows, "cpu")
    plan = make_artifact(good).plan
    looked.clear()
    sample(sampler, batch.noise_NCHW, batch.condition_N, plan, keys=batch.keys)
    assert looked == []
