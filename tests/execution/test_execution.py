"""Levels of execution: compiled branches draw what eager ones do, and their graphs are counted.

Most tests leave code generation out (`aot_eager`): what Dynamo guards on, and so how many graphs there are,
does not depend on it. On CUDA nothing of this was run.
"""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import tiny_pixart
import tiny_sana
import torch
from execution_cases import STEPS, ddim, draw, fresh, graphs, make_batch, make_dit, ways
from tiny_dit import write_model
from torch._inductor import metrics

from harmonica.core.router import Router
from harmonica.data.batch import Batch
from harmonica.execution import branch_functions as functions
from harmonica.execution import compiled
from harmonica.execution.compiled import RecompileLimitError
from harmonica.execution.values import KeptValues, extrapolate
from harmonica.models.compiler_check import compiler_fault
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import Sampler, make_sampler
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig


def check_all(sampler: Sampler, batch: tuple[Any, Any]) -> None:
    for name, how in ways(len(sampler.model.branches)).items():
        ours, wanted = draw(sampler, batch, "compiled", **how), draw(sampler, batch, "eager", **how)
        torch.testing.assert_close(
            ours, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_batches_guidance_and_plans_share_few_graphs(no_codegen):
    """One set of graphs for the first shape, one for all other batch sizes, and none for other models."""
    model, other = make_dit(), make_dit(seed=1)
    check_all(ddim(model), make_batch(2))
    first = graphs()
    # Attention and MLP, each with 0, 1 and 2 sums, and the sums beyond: 1 or 2. Reused: 4, 2 or 1 held, 2 or
    # 1 forecast of two values, 1 of three, 1 of four.
    assert first <= 2 * 3 + 2 + 3 + 2 + 1 + 1
    check_all(ddim(model), make_batch(3))
    second = graphs()
    # Where sizes are symbols, the one shift that lies at the beginning of its storage is a graph of its own:
    # of attention, with 0, 1 and 2 sums.
    assert second <= 2 * first + 3
    for guidance, size in ((1.0, 3), (1.0, 2), (4.0, 5)):
        check_all(ddim(model, guidance), make_batch(size))
    check_all(ddim(other), make_batch(4))
    assert graphs() == second


@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("attn", "cross", "mlp")])
@pytest.mark.parametrize("kind", ["sigma", "sana"])
def test_text_to_image_models_need_nothing_of_their_own(kind, kinds, no_codegen):
    if kind == "sana":
        model, batch = tiny_sana.make_sana("1.5", *kinds), tiny_sana.make_batch("1.5")
        sampler = make_sampler(model, tiny_sana.config(num_inference_steps=STEPS, guidance_scale=3.0))
    else:
        model, batch = tiny_pixart.make_pixart(kind, *kinds), tiny_pixart.make_batch(kind)
        sampler = ddim(model, 3.0)
    check_all(sampler, batch)
    # Segments have no gate: one value, two and three are reused so, and one and two sums added to.
    assert 0 < graphs() <= 3 * 3 + 9 + 3 + 2


def test_a_recompile_beyond_the_limit_is_an_error_that_names_the_cause(no_codegen, monkeypatch):
    monkeypatch.setattr(compiled, "GRAPHS_PER_KIND", 1)
    draw(ddim(make_dit()), make_batch(2), "compiled")
    with pytest.raises(RecompileLimitError, match=r"DiTBranch attn have 1 graphs.*dtype mismatch"):
        draw(ddim(make_dit(dtype=torch.float64)), make_batch(2), "compiled")


def test_before_torch_2_13_the_limit_is_raised_where_it_is_hit(no_codegen, monkeypatch):
    monkeypatch.setattr(compiled, "_HAS_LIMIT", False)
    monkeypatch.setattr(compiled, "GRAPHS_PER_KIND", 2)
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.float64, torch.float32):
            draw(ddim(make_dit(dtype=dtype)), make_batch(2), "compiled")
        assert torch._dynamo.config.recompile_limit == 1
        with pytest.raises(RecompileLimitError, match="DiTBranch attn have 2 graphs"):
            draw(ddim(make_dit(dtype=torch.bfloat16)), make_batch(2), "compiled")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_coefficients_are_those_of_the_extrapolation(count, order):
    generator = torch.Generator().manual_seed(count)
    values = list(torch.randn(count, 2, 3, generator=generator).double())
    weights = torch.randn(order, generator=generator).double().tolist()
    kept = KeptValues.of(values, weights)
    added = sum(c * v for c, v in zip(kept.coefficients, kept.values, strict=True))
    torch.testing.assert_close(added, extrapolate(values, weights))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants g++ on a CPU")
def test_neighbours_that_are_reused_are_one_kernel():
    fresh()
    hidden = torch.randn(4, 16, 24)
    gates, factor = (torch.randn(4, 1, 24),) * 2, torch.full((), 0.5)
    for factors in ((), (factor, factor)):
        values = tuple((torch.randn(4, 16, 24),) * max(1, len(factors)) for _ in gates)
        metrics.reset()
        with torch._inductor.config.patch(force_disable_caches=True), torch.inference_mode():
            torch.compile(functions.reuse, fullgraph=True)(hidden, gates, values, (factors,) * 2)
        assert metrics.generated_kernel_count == 1
    fresh()


@pytest.mark.slow
def test_generated_code_draws_the_same(tmp_path):
    fresh()
    config = write_model(tmp_path / "model")
    model = load_model(replace(config, execution="compiled")).model
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, model.in_channels, model.sample_size, model.sample_size, generator=generator)
    check_all(ddim(model), (noise, torch.tensor([1, 2])))
    assert graphs() > 0


def test_a_loader_decides_the_level(tmp_path):
    config = write_model(tmp_path / "model")
    assert load_model(config).model.execution == "eager", "nothing faster was measured on a CPU"
    assert load_model(replace(config, execution="compiled")).model.execution == "compiled"
    assert config.execution_on("cuda") == "graphed"
    half = replace(config, dtype="bfloat16")
    assert load_model(half).model.residual_dtype is None
    assert load_model(replace(half, residual_dtype="weights")).model.residual_dtype == torch.bfloat16


def test_where_nothing_can_be_compiled_branches_run_eagerly_unless_asked(tmp_path, monkeypatch, caplog):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler\nSet CC")

    config = write_model(tmp_path / "model")
    monkeypatch.setattr(ModelConfig, "execution_on", lambda *_: "graphed")  # as on CUDA
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", lambda *_, **__: broken)
        compiler_fault.cache_clear()
        assert load_model(config).model.execution == "eager"
        assert load_model(replace(config, execution="graphed")).model.execution == "graphed"
    assert "torch.compile fails here: Failed to find C compiler" in caplog.text
    compiler_fault.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert load_model(config).model.execution == "graphed"
    compiler_fault.cache_clear()


@pytest.mark.parametrize(("compile", "meant"), [("always", "compiled"), ("never", "eager")])
def test_the_setting_before_it_still_counts_where_the_new_one_says_nothing(compile, meant):
    with pytest.warns(FutureWarning, match=f"model.compile is {compile}.* give model.execution {meant}"):
        config = ModelConfig(compile=compile)
    assert config.execution_on("cpu") == config.execution_on("cuda") == meant
    with pytest.warns(FutureWarning):
        assert ModelConfig(compile=compile, execution="graphed").execution_on("cpu") == "graphed"


def test_another_level_is_refused():
    with pytest.raises(ValueError, match=r"model.execution is 'fast': give one of auto, eager, compiled"):
        ModelConfig(execution="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dit", "pixart", "sana"])
def test_the_residual_stream_in_the_precision_of_the_weights(kind, tmp_path):
    """Between all branches, while the output stays in float32; without it, nothing changes."""
    if kind == "dit":
        model, batch = make_dit().bfloat16(), make_batch(2)
        for name, parameter in model.named_parameters():
            if name.startswith(model.full_precision_parts):
                parameter.data = parameter.data.float()
        model.pos_embed = model.pos_embed.float()
    elif kind == "sana":
        model, batch = tiny_sana.make_sana("1.5").float(), tiny_sana.make_batch("1.5")
        in_half(model)
    else:
        model, batch = tiny_pixart.make_pixart("sigma").float(), tiny_pixart.make_batch("sigma")
        in_half(model)
    noise = batch[0].float()
    timestep = torch.full((len(noise),), 500.0)
    hidden, conditioning = model.embed(noise, timestep, batch[1])
    wanted = model.full_pass(hidden, conditioning)
    assert hidden.dtype == wanted.dtype == torch.float32
    model.residual_dtype = torch.bfloat16
    seen = []
    hidden, conditioning = model.embed(noise, timestep, batch[1])
    for branch in model.branches:
        seen.append(hidden.dtype)
        hidden = branch.merge(hidden, branch.compute(hidden, conditioning), conditioning)
    ours = model.head(hidden, conditioning)
    assert set(seen) == {torch.bfloat16} and ours.dtype == torch.float32
    # u of bfloat16 is 2^-8; each merge of some ten rounds once more, at random.
    assert 0 < (ours - wanted).norm() / wanted.norm() < 10 * 2**-8


def in_half(model: Any) -> None:
    """Branches in bfloat16, the rest in float32, as `load_model` has them."""
    parts = tuple(name.removeprefix("transformer.") for name in model.full_precision_parts)
    for name, parameter in model.transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.startswith(parts) else torch.bfloat16)


def test_training_keeps_the_residual_stream_in_float32():
    assert ModelConfig(residual_dtype="weights", dtype="bfloat16").for_training().residual_dtype == "float32"


@pytest.mark.parametrize(
    ("dtype", "reuse"),
    [
        pytest.param(torch.float32, "hold"),
        pytest.param(torch.float32, "forecast", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "forecast", marks=pytest.mark.slow),
    ],
)
def test_a_trajectory_of_training_moves_the_router_alike(dtype, reuse, no_codegen):
    """Teacher, student and the backward through compiled branches, with recomputation too."""
    moved = {}
    for execution in ("eager", "compiled"):
        for recompute in (False, True):
            model = make_dit()
            for name, parameter in model.named_parameters():
                if not name.startswith(model.full_precision_parts):
                    parameter.data = parameter.data.to(dtype)
            model.execution = execution
            router = Router.alternating(STEPS, len(model.branches), 0.5)
            before = router.logits()
            config = SdtConfig(learning_rate=0.1, reuse=reuse, activation_checkpointing=recompute)
            grads: list[torch.Tensor] = []
            SdtTrainer(ddim(model), router, config).train_trajectory(
                [Batch(*make_batch(2))],
                torch.ones(STEPS - 1),
                beta=0.0,
                on_gradient=lambda i, grad, grads=grads: grads.append(grad.clone()),
            )
            moved[execution, recompute] = torch.stack(grads)
            assert not torch.equal(router.logits(), before)
    wanted = moved["eager", False]
    near = 1e-3 if dtype == torch.float32 else 0.1  # u of bfloat16 is 2^-8; some rounds of it at random
    for gradients in moved.values():
        assert (gradients - wanted).norm() / wanted.norm() < near
    assert graphs() > 0
