"""`model.compile`: the same model, its sub-layers compiled. On CUDA `auto` does so; that was not run here."""

from dataclasses import replace

import pytest
import torch
from tiny_dit import write_model

from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.sdt import SdtConfig, SdtTrainer


def drawn(model: BranchedTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Images under a plan, and the router after a trajectory of training."""
    sampler = make_sampler(model, SamplerConfig(num_inference_steps=4, guidance_scale=2.0))
    generator = torch.Generator().manual_seed(0)
    shape = (2, model.in_channels, model.sample_size, model.sample_size)
    noise, labels = torch.randn(shape, generator=generator), torch.tensor([1, 2])
    router = Router.alternating(4, len(model.branches), 1.0)
    images = sample(sampler, noise, labels, router.plan(0.5), reuse="forecast")
    SdtTrainer(sampler, router, SdtConfig(learning_rate=0.1)).train_trajectory(
        [Batch(noise, labels)], torch.ones(3)
    )
    return images, router.logits()


@pytest.mark.slow
def test_a_compiled_model_draws_and_trains_the_same(tmp_path):
    config = write_model(tmp_path / "model")
    plain, compiled = (load_model(replace(config, compile=kind)).model for kind in ("never", "always"))
    assert compiled.fingerprint() == plain.fingerprint()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for ours, wanted in zip(drawn(compiled), drawn(plain)):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_auto_leaves_a_cpu_s_model_as_it_is(tmp_path):
    model = load_model(write_model(tmp_path / "model")).model
    assert len(model.repeated_layers) == len(model.branches)
    assert not any(getattr(layer, "_compiled_call_impl", None) for layer in model.repeated_layers)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"model.compile is 'sometimes': give one of auto, always, never"):
        ModelConfig(compile="sometimes")  # type: ignore[arg-type]
