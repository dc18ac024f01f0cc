"""Blocks that a pipeline's owner has compiled stay compiled under a plan, and are so after it."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_attached
import torch
from execution_cases import fresh
from tiny_recorded_pipelines import Case, make_case

import harmonica
from harmonica.execution.compiled import compiled_for
from harmonica.integrations.recorded.recording import block_modules
from tests.integrations.test_block_stack import calls_in_blocks, trainer_of
from tests.integrations.test_pipeline_training import ALL_STEPS as STEPS
from tests.integrations.test_pipeline_training import drawn_by

HALF = harmonica.EvenSteps(speedup=1.5)
PARTS = dataclasses.replace(HALF, cacheable=("attn", "mlp", "single"))


class Graphs:
    """A backend of torch.compile that runs graphs as they were traced, and counts the runs."""

    def __init__(self) -> None:
        self.runs = 0

    def backend(self, module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            self.runs += 1
            return module.forward(*inputs)

        return run

    def compile_blocks(self, case: Case) -> None:
        for _, block in block_modules(case.pipe.transformer):
            block.compile(backend=self.backend)

    def runs_in(self, draw: Callable[[], Any]) -> int:
        before = self.runs
        draw()
        return self.runs - before


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def kinds_compiled() -> int:
    """How many classes of branches a plan has compiled."""
    return compiled_for.cache_info().currsize


def computed_steps(case: Case) -> int:
    plan = HALF.plan(STEPS, case.pipe.transformer._harmonica.trajectory.views[0].macs())
    return sum(map(any, plan.compute))


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan 2.1"])
def test_computed_steps_run_the_compiled_blocks(kind, graphs):
    plain, case = make_case(kind), make_case(kind)
    harmonica.apply(plain.pipe, HALF)
    graphs.compile_blocks(case)
    full = drawn_by(case)
    of_full = graphs.runs_in(lambda: drawn_by(case))
    assert of_full >= STEPS * len(list(block_modules(case.pipe.transformer)))
    for _ in range(2):
        harmonica.apply(case.pipe, HALF)
        drawn_by(case)  # the first call finds the blocks
        of_plan = graphs.runs_in(lambda: drawn_by(case))
        assert of_plan == of_full * computed_steps(case) // STEPS < of_full
        torch.testing.assert_close(drawn_by(case), drawn_by(plain))
        harmonica.remove(case.pipe)
        assert graphs.runs_in(lambda: drawn_by(case)) == of_full
    assert torch.equal(drawn_by(case), full)


def test_blocks_may_be_compiled_while_a_plan_is_on(graphs):
    case = make_case("flux")
    harmonica.apply(case.pipe, HALF)
    eager = drawn_by(case)
    for _ in range(2):  # the second time in place of what the plan has put around the first
        graphs.compile_blocks(case)
        drawn_by(case)
        blocks = len(list(block_modules(case.pipe.transformer)))
        assert graphs.runs_in(lambda: drawn_by(case)) == computed_steps(case) * blocks
        torch.testing.assert_close(drawn_by(case), eager)
    harmonica.remove(case.pipe)
    assert graphs.runs_in(lambda: drawn_by(case)) == STEPS * blocks


def test_a_copy_follows_the_plan_though_it_is_no_longer_compiled(graphs):
    case = make_case("flux")
    full = calls_in_blocks(case)
    graphs.compile_blocks(case)
    harmonica.apply(case.pipe, HALF)
    wanted = drawn_by(case)
    twin = dataclasses.replace(case, pipe=copy.deepcopy(case.pipe))
    torch.testing.assert_close(drawn_by(twin), wanted)
    assert calls_in_blocks(twin) == full * computed_steps(twin) // STEPS
    harmonica.remove(twin.pipe)
    assert calls_in_blocks(twin) == full


def test_branches_in_compiled_blocks_are_compiled(graphs, no_codegen):
    plain, case = make_case("sd3"), make_case("sd3")
    harmonica.apply(plain.pipe, PARTS)
    graphs.compile_blocks(case)
    drawn_by(case)
    of_full = graphs.runs_in(lambda: drawn_by(case))
    harmonica.apply(case.pipe, PARTS)
    assert kinds_compiled() == 0
    torch.testing.assert_close(drawn_by(case), drawn_by(plain))
    assert kinds_compiled() > 0
    harmonica.remove(case.pipe)
    drawn_by(case)  # compiles anew: graphs of the plan end at each branch
    assert graphs.runs_in(lambda: drawn_by(case)) == of_full


@pytest.mark.parametrize("plan", [HALF, PARTS])
def test_a_transformer_that_is_compiled_as_a_whole_has_compiled_branches(plan, graphs, no_codegen):
    plain, case = make_case("flux"), make_case("flux")
    harmonica.apply(plain.pipe, plan)
    transformer = case.pipe.transformer
    for compile_whole in (
        lambda: transformer.compile(backend=graphs.backend),
        lambda: setattr(case.pipe, "transformer", torch.compile(transformer, backend=graphs.backend)),
    ):
        compile_whole()
        harmonica.apply(case.pipe, plan)
        assert kinds_compiled() == 0
        torch.testing.assert_close(drawn_by(case), drawn_by(plain))
        assert kinds_compiled() > 0
        harmonica.remove(case.pipe)
        fresh()
        transformer._compiled_call_impl = None


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_branches_of_an_adapter_are_compiled_where_blocks_are(kind, tmp_path, graphs, no_codegen):
    case = tiny_attached.make_case(kind, tmp_path)
    artifact = case.artifact(reuse="forecast")
    harmonica.apply(case.pipe, artifact)
    eager = case.run()
    assert kinds_compiled() == 0
    for block in case.transformer.transformer_blocks:
        block.compile(backend=graphs.backend)
    torch.testing.assert_close(case.run(), eager)
    assert kinds_compiled() > 0
    harmonica.remove(case.pipe)
    case.run()
    assert graphs.runs_in(case.run) == tiny_attached.STEPS * len(case.transformer.transformer_blocks)


def test_a_training_leaves_compiled_blocks_as_they_are(graphs):
    plain, case = make_case("flux"), make_case("flux")
    graphs.compile_blocks(case)
    drawn_by(case)
    of_full = graphs.runs_in(lambda: drawn_by(case))
    before, found = graphs.runs, []
    for each in (plain, case):
        with trainer_of(each) as trainer:
            for _ in trainer.next_trajectories:
                trainer.train_one()
            found.append(trainer.artifact())
    assert found[0].plan == found[1].plan and graphs.runs == before, "a training runs eagerly"
    assert graphs.runs_in(lambda: drawn_by(case)) == of_full


@pytest.mark.parametrize("in_place", [False, True])
def test_a_transformer_that_may_be_one_graph_alone_is_refused(in_place, graphs):
    case = make_case("flux")
    if in_place:
        case.pipe.transformer.compile(backend=graphs.backend, fullgraph=True)
    else:
        case.pipe.transformer = torch.compile(case.pipe.transformer, backend=graphs.backend, fullgraph=True)
    with pytest.raises(ValueError, match=r"fullgraph=True, .*: compile its blocks in its place"):
        harmonica.apply(case.pipe, HALF)


@pytest.mark.parametrize("in_place", [False, True])
def test_cuda_graphs_around_a_walk_over_branches_are_refused(in_place, graphs, tmp_path):
    case = tiny_attached.make_case("dit", tmp_path)
    transformer = case.transformer
    if in_place:
        transformer.compile(mode="reduce-overhead")
    given = transformer if in_place else torch.compile(transformer, mode="max-autotune")
    with pytest.raises(ValueError, match=r"as a whole with CUDA graphs .* give execution=.graphed.$"):
        harmonica.apply(given, case.artifact())


def test_blocks_that_may_be_one_graph_each_are_kept(graphs):
    case = make_case("flux")
    for _, block in block_modules(case.pipe.transformer):
        block.compile(backend=graphs.backend, fullgraph=True)
    harmonica.apply(case.pipe, HALF)
    drawn_by(case)
    assert graphs.runs_in(lambda: drawn_by(case)) > 0
