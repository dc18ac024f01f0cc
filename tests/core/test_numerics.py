"""Half precision for the frozen model; router, lambda and sampler stay in float32."""

import dataclasses
import functools

import pytest
import tiny_sana
import torch
from tiny_pixart import TIMES, apart, halve, make_batch, make_pixart
from tiny_sana import make_sana
from tolerances import HALF_PASS, MARGIN, rounding, roundoff
from torch.nn.functional import cosine_similarity

from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import BranchCache
from harmonica.core.passes import soft_pass
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.iepo import image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig

HALVES = ["bfloat16", "float16"]
STEPS, BRANCHES = 6, 24
CONFIG = SamplerConfig(num_inference_steps=STEPS)
MODEL = ModelConfig()
"""The built-in one: trained, so that its values have the size they have in use."""


@functools.cache
def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    keys = SampleKeys.of(0, range(2))
    return torch.from_numpy(keys.start_noise((1, 28, 28))), torch.arange(2)


@pytest.fixture
def batch():
    return make_inputs()


def load(dtype: str):
    return load_model(dataclasses.replace(MODEL, dtype=dtype)).model


def router() -> Router:
    """As the released code starts: scores from 0.02 to 0.98."""
    return Router.normal(STEPS, BRANCHES, seed=0)


def near(dtype: str) -> float:
    """Of the built-in model, whose twelve blocks are four times those of a tiny one."""
    return rounding(getattr(torch, dtype), 4 * HALF_PASS, is_random=True)


@functools.cache
def gradients(dtype: str, scale: float) -> torch.Tensor:
    """Of every row, the router standing still; without beta, which would make them alike."""
    rows = {}
    still = SdtConfig(beta=0.0, learning_rate=1e-30)
    trainer = SdtTrainer(make_sampler(load(dtype), CONFIG), router(), still)
    lambda_T = torch.full((STEPS - 1,), scale)
    trainer.train_trajectory(
        [Batch(*make_inputs())], lambda_T, on_gradient=lambda i, grad: rows.setdefault(i, grad.clone())
    )
    return torch.stack([rows[i] for i in range(STEPS - 1)])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_gradients_of_a_half_precision_model_point_the_same_way(dtype, scale):
    """Every row's, also where lambda is as small as float16 cannot hold."""
    exact, half = (gradients(name, scale) / scale for name in ("float32", dtype))
    assert half.dtype == torch.float32 and half.isfinite().all() and (half != 0).any(dim=1).all()
    # At right angles to a vector, what is off by a share e of it turns it by 1 - e^2 / 2.
    turned = 1 - cosine_similarity(half.double(), exact.double(), eps=1e-30)
    assert turned.max() <= near(dtype) ** 2 / 2


@functools.cache
def lambda_and_samples(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    sampler = make_sampler(load(dtype), CONFIG)
    assert sampler.model.dtype == getattr(torch, dtype)
    lambda_T = image_error_proxy(
        sampler, router(), [Batch(*make_inputs())], kind="leave_one_out", config=SdtConfig(threshold=0.3)
    )
    return lambda_T, sample(sampler, *make_inputs(), router().plan(0.3))


@pytest.mark.parametrize("dtype", HALVES)
def test_lambda_and_samples_are_float32_and_near(dtype):
    for exact, half in zip(lambda_and_samples("float32"), lambda_and_samples(dtype), strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - exact).norm() / exact.norm() < near(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("logit", [-5.0, 5.0])
def test_soft_weights_near_the_ends_keep_their_value(batch, dtype, logit):
    """(1 - r) at r = 0.9933 rounds to 0.0078 in bfloat16, 16% off; the mix and its gradient must not."""
    model = load(dtype)
    hidden, conditioning = model.embed(batch[0], torch.full((2,), 500), batch[1])
    scores = torch.full((BRANCHES,), logit).sigmoid().requires_grad_()
    cache = BranchCache(BRANCHES)
    for index, branch in enumerate(model.branches):
        cache.write(index, 5, 0.5 * branch.compute(hidden, conditioning))
    soft_pass(model, hidden, conditioning, scores, [True] * BRANCHES, cache, 4)
    computed = model.branches[0].compute(hidden, conditioning)
    mixed, cached = cache.read(0, 4).float(), 0.5 * computed.float()
    r = scores[0].item()
    expected = (r * computed.float() + (1 - r) * cached).to(computed.dtype).float()
    # One in thousands lies so near the middle of two numbers that float32 tells which it is rounded to.
    torch.testing.assert_close(mixed, expected, rtol=MARGIN * roundoff(computed.dtype), atol=1e-6)
    assert ((mixed - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [make_pixart, make_sana])
def test_a_large_residual_stream_swallows_nothing_that_a_branch_adds(make, dtype):
    """Below 32768 the next is 128 away in bfloat16, 16 in float16: what is less than half of that is lost."""
    kind = "alpha" if make is make_pixart else "1.0"
    noise, condition = (make_batch if make is make_pixart else tiny_sana.make_batch)(kind)
    lost = []
    for model in (halve(make(kind), dtype), make(kind).to(dtype)):
        hidden, conditioning = model.embed(noise, TIMES, condition)
        branch, stream = model.branches[-1], torch.full_like(hidden, 32768.0)
        y = branch.compute(hidden, conditioning)
        added = branch.merge(torch.zeros_like(stream), y, conditioning)
        lost.append(apart(branch.merge(stream, y, conditioning) - stream, added))
        size = added.double().square().mean().sqrt().item()
    assert lost[0] < rounding(torch.float32, 1, amplification=32768 / size)
    assert lost[1] > 0.9, "as a module that is all of one type adds it"


def test_a_router_of_a_bfloat16_run_fits_the_model_in_float32(tmp_path):
    trained = make_sampler(load("bfloat16"), CONFIG)
    artifact = RouterArtifact.build(router().logits(), trained, threshold=0.3, reuse="hold", training={})
    RouterArtifact.load(artifact.save(tmp_path)).check(load("float32"), CONFIG)


def test_training_is_bit_identical_from_the_same_seed(batch):
    ends = []
    for _ in range(2):
        one = router()
        trainer = SdtTrainer(make_sampler(load("bfloat16"), CONFIG), one, SdtConfig(threshold=0.3))
        trainer.train_trajectory([Batch(*batch)], torch.ones(STEPS - 1))
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
