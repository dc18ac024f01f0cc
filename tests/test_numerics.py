"""Half precision for the frozen model; router, lambda and sampler stay in float32."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cosine_similarity

from harmonica.artifact import RouterArtifact
from harmonica.cache import BranchCache
from harmonica.iepo import image_error_proxy
from harmonica.models.loading import ModelConfig, load_model
from harmonica.noise import RowKeys
from harmonica.passes import soft_pass
from harmonica.router import Router
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.sampling import sample
from harmonica.sdt import SdtConfig, SdtTrainer

HALVES = ["bfloat16", "float16"]
STEPS, BRANCHES = 10, 24
CONFIG = SamplerConfig(num_inference_steps=STEPS)
MODEL = ModelConfig()
"""The built-in one: trained, so that its values have the size they have in use."""


@pytest.fixture
def batch():
    keys = RowKeys.of(0, range(4))
    return torch.from_numpy(keys.start_noise((1, 28, 28))), torch.arange(4)


def load(dtype: str):
    return load_model(dataclasses.replace(MODEL, dtype=dtype)).model


def router() -> Router:
    """As the released code starts: scores from 0.02 to 0.98."""
    return Router.normal(STEPS, BRANCHES, seed=0)


def gradients(dtype: str, batch, lambda_T) -> torch.Tensor:
    """Of every row, the router standing still; without beta, which would make them alike."""
    rows = {}
    still = SdtConfig(beta=0.0, learning_rate=1e-30)
    trainer = SdtTrainer(make_sampler(load(dtype), CONFIG), router(), still)
    trainer.train_trajectory(*batch, lambda_T, on_gradient=lambda i, grad: rows.setdefault(i, grad.clone()))
    return torch.stack([rows[i] for i in range(STEPS - 1)])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_gradients_of_a_half_precision_model_point_the_same_way(batch, dtype, scale):
    """Every row's, also where lambda is as small as float16 cannot hold."""
    lambda_T = torch.full((STEPS - 1,), scale)
    exact, half = (gradients(name, batch, lambda_T) / scale for name in ("float32", dtype))
    assert half.dtype == torch.float32 and half.isfinite().all() and (half != 0).any(dim=1).all()
    assert cosine_similarity(half.double(), exact.double(), eps=1e-30).min() >= 0.98


@pytest.mark.parametrize("dtype", HALVES)
def test_lambda_and_samples_are_float32_and_near(batch, dtype):
    near = {"bfloat16": 0.05, "float16": 0.005}[dtype]
    results = []
    for name in ("float32", dtype):
        sampler = make_sampler(load(name), CONFIG)
        assert sampler.model.dtype == getattr(torch, name)
        lambda_T = image_error_proxy(sampler, router(), *batch, kind="leave_one_out", threshold=0.3)
        results.append((lambda_T, sample(sampler, *batch, router().plan(0.3))))
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - exact).norm() / exact.norm() < near


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("logit", [-5.0, 5.0])
def test_soft_weights_near_the_ends_keep_their_value(batch, dtype, logit):
    """(1 - r) at r = 0.9933 rounds to 0.0078 in bfloat16, 16% off; the mix and its gradient must not."""
    model = load(dtype)
    hidden, conditioning = model.embed(batch[0], torch.full((4,), 500), batch[1])
    scores = torch.full((BRANCHES,), logit).sigmoid().requires_grad_()
    cache = BranchCache(BRANCHES)
    for index, branch in enumerate(model.branches):
        cache.write(index, 5, 0.5 * branch.compute(hidden, conditioning))
    soft_pass(model, hidden, conditioning, scores, [True] * BRANCHES, cache, 4)
    computed = model.branches[0].compute(hidden, conditioning)
    mixed, cached = cache.read(0, 4).float(), 0.5 * computed.float()
    r = scores[0].item()
    expected = (r * computed.float() + (1 - r) * cached).to(computed.dtype).float()
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-3)
    assert ((mixed - expected).norm() / expected.norm()) < 1e-3


def test_a_router_of_a_bfloat16_run_fits_the_model_in_float32(tmp_path):
    trained = make_sampler(load("bfloat16"), CONFIG)
    artifact = RouterArtifact.build(router().logits(), trained, threshold=0.3, reuse="hold", training={})
    RouterArtifact.load(artifact.save(tmp_path)).check(load("float32"), CONFIG)


def test_training_is_bit_identical_from_the_same_seed(batch):
    ends = []
    for _ in range(2):
        one = router()
        trainer = SdtTrainer(make_sampler(load("bfloat16"), CONFIG), one, SdtConfig(threshold=0.3))
        trainer.train_trajectory(*batch, torch.ones(STEPS - 1))
        ends.append(one.logits())
    assert torch.equal(*ends)


def test_tf32_is_an_option_and_no_side_effect():
    matmul = torch.backends.cuda.matmul
    assert matmul.allow_tf32 is False, "importing changes nothing"
    load_model(MODEL)
    assert matmul.allow_tf32 is False
    before = torch.backends.cudnn.allow_tf32
    try:
        load_model(dataclasses.replace(MODEL, allow_tf32=True))
        assert matmul.allow_tf32 is True
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, before


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"model.dtype is 'float8': give one of float32, bfloat16, float16"):
        ModelConfig(dtype="float8")  # type: ignore[arg-type]
