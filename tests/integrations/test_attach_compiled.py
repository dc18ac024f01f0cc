"""A plan on a transformer that is compiled, as a whole or branch by branch."""

import pytest
import torch
from execution_cases import graphs
from tiny_attached import STEPS, apart, make_case
from tolerances import of_trajectory

import harmonica


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reuse", "has_segments", "is_compiled_first"),
    [("dit", "hold", False, True), ("sigma", "forecast", False, False), ("dit", "forecast", True, False)],
)
def test_a_compiled_transformer_makes_the_same_latents(
    kind, reuse, has_segments, is_compiled_first, tmp_path
):
    """In whole graphs, one for each distinct row or forecast, none compiled again."""
    case, graphs = make_case(kind, tmp_path), []
    how = {"reuse": reuse, "is_corrected": reuse == "forecast", "has_segments": has_segments}
    artifact, transformer = case.artifact(**how), case.transformer
    if not has_segments:
        artifact.logits_TB[1] = artifact.logits_TB[0]
    distinct = STEPS - 1 if reuse == "hold" else STEPS
    without = case.run()
    harmonica.apply(transformer, artifact)
    wanted = [case.run(seed=seed) for seed in (1, 2)]
    harmonica.remove(transformer)

    def backend(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch.compiler.reset()
    # A second graph of one step would be an error.
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        if is_compiled_first:
            case.pipe.transformer = torch.compile(transformer, backend=backend, fullgraph=True)
            harmonica.apply(case.transformer, artifact)
        else:
            harmonica.apply(transformer, artifact)
            case.pipe.transformer = torch.compile(transformer, backend=backend, fullgraph=True)
        for seed, latents in zip((1, 2, 1), wanted + wanted[:1]):
            assert apart(case.run(seed=seed), latents) < of_trajectory(STEPS)
        assert len(graphs) == distinct
    harmonica.remove(case.transformer)
    case.pipe.transformer = transformer
    assert torch.equal(case.run(), without)


@pytest.mark.parametrize(
    ("kind", "reuse", "has_segments"),
    [("dit", "hold", False), ("sigma", "forecast", False), ("dit", "forecast", True)],
)
def test_compiled_branches_make_the_same_latents(kind, reuse, has_segments, tmp_path, no_codegen):
    """With a graph for each kind of branch, not for each row of the plan, and a few for what is reused."""
    case = make_case(kind, tmp_path)
    how = {"reuse": reuse, "is_corrected": reuse == "forecast", "has_segments": has_segments}
    artifact = case.artifact(**how)
    latents = {}
    for execution in ("eager", "compiled"):
        harmonica.apply(case.transformer, artifact, execution=execution)
        latents[execution] = [case.run(seed=seed) for seed in (1, 2)]
        harmonica.remove(case.transformer)
    for ours, wanted in zip(latents["compiled"], latents["eager"]):
        assert apart(ours, wanted) < of_trajectory(STEPS)
    assert 0 < graphs() <= 3 + 7


def test_another_execution_is_refused(case):
    with pytest.raises(ValueError, match="execution is 'fast': give one of auto, eager, compiled, graphed"):
        harmonica.apply(case.transformer, case.artifact(), execution="fast")
