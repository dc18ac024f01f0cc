"""Which transformer classes of the installed diffusers a router can be had for, and the table of them.

`PYTHONPATH=.:tests/support python tests/support/transformer_coverage.py` writes the table anew.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import tiny_transformers
import torch
from served_transformers import served
from torch import Tensor

import harmonica
from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.integrations.recorded.kinds import DECLARATIONS, KINDS, RefusedTransformer
from harmonica.integrations.recorded.tensor_tags import tensors_of
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import recorded
from harmonica.models.base import Macs
from harmonica.pipeline_training.policies import PolicyTrajectory, SdtPolicy
from harmonica.samplers import SamplerConfig
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig

TABLE = Path(harmonica.__file__).parent / "integrations/recorded/TRANSFORMERS.md"
STEPS = 3
WORKS = "works"
_HEAD = """# Transformer classes of diffusers

Made by `tests/support/transformer_coverage.py` with diffusers {version}, and held by
`tests/integrations/test_transformer_coverage.py`: {works} of {all} classes work. Each is a tiny random
instance: branches are found by recording one forward, a plan that computes everything changes no bit, a
plan that reuses half is run by `harmonica.apply`, two updates of a router are trained. `share` is the
part of the costs that branches have in that instance, which is smaller than in a real one. "Not tried"
means that the rules and overrides of `tests/support/tiny_transformers.py` make no instance or no inputs:
nobody has looked whether a plan fits.

`served` names the pipeline that the endpoint's own code has drawn two images with, under a plan and without
one, or says with what the endpoint refuses it. There the transformer, the scheduler and the pipeline's loop
are diffusers'; texts are stood in for by random embeddings and the VAE by three numbers of an image's
latents, so this says nothing of text encoders and VAEs. {served} classes are drawn with, and three more are
served by their branch files. "No pipeline" means that none that can be imported has the class as its
`transformer`.

| class | state | branches | share | served |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class _Steps:
    num_steps: int
    model: RecordedTransformer


@dataclass(frozen=True)
class Row:
    """A class, its state, its branches by kind, their share of the costs, and how it is served."""

    name: str
    state: str
    branches: str = ""
    share: str = ""
    served: str = ""

    def __str__(self) -> str:
        return f"| {self.name} | {self.state} | {self.branches} | {self.share} | {self.served} |"

    @property
    def is_drawn(self) -> bool:
        """Return whether the endpoint's code has drawn with it."""
        return self.state == WORKS and bool(re.match(r"\w+Pipeline\b", self.served))


@torch.no_grad()
def _outputs(module: Any, steps: list[dict[str, Any]]) -> list[list[Tensor]]:
    return [list(tensors_of(module(**arguments))) for arguments in steps]


def _equal(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other))


def _artifact(view: RecordedTransformer, macs: Macs, plan: Plan) -> RouterArtifact:
    return RouterArtifact(
        logits_TB=torch.where(plan.to_tensor(), 1.0, -1.0),
        threshold=0.5,
        sampler=SamplerConfig(name="diffusers", num_inference_steps=STEPS),
        reuse="hold",
        model=view.identity(),
        ideal_speedup=plan.ideal_speedup(macs),
        macs_full=STEPS * macs.full,
    )


def _train(view: RecordedTransformer, steps: list[dict[str, Any]]) -> None:
    """Two updates, as in a pipeline."""
    router = Router(STEPS, len(view.branches), 1.0)
    before = router.logits()
    owner: Any = _Steps(STEPS, view)
    trainer = SdtTrainer(owner, router, SdtConfig())
    trajectory = PolicyTrajectory([view], STEPS, reuse=trainer.config.reuse)
    policy = SdtPolicy(trainer)
    trajectory.begin(policy)
    for arguments in steps:
        output = trajectory.forward(0, (), arguments)
        assert not any(each.requires_grad for each in tensors_of(output))
    trajectory.finish()
    records = policy.update(torch.ones(STEPS - 1), beta=0.01)
    assert [record.step for record in records] == [1, 0], "updates"
    assert router.logits().isfinite().all() and (router.logits() != before)[:-1].all(), "logits that moved"


def row_of(name: str) -> Row:
    """Try a class.

    Raises:
        AssertionError: it records, and then does not do what it should.
    """
    if (declared := DECLARATIONS.get(name)) and declared.refused:
        return Row(name, f"refused: {declared.refused}", served=served(name))
    try:
        module = tiny_transformers.make_transformer(name)
        steps = list(tiny_transformers.step_inputs(name, module, STEPS))
        wanted = _outputs(module, steps)
    except Exception:
        return Row(name, "not tried", served=served(name))
    try:
        with recorded(module, **steps[0]) as view:
            macs, count = view.macs(), len(view.branches)
            kinds = Counter(branch.kind for branch in view.branches)
            full = _artifact(view, macs, Plan.full(STEPS, count))
            half = tuple(place % 2 == 0 for place in range(count))
            some = _artifact(view, macs, Plan((half, (False,) * count, (True,) * count)))
            _train(view, steps)
    except RefusedTransformer as refusal:
        return Row(name, f"refused: {str(refusal).partition(': ')[2]}", served=served(name))
    harmonica.apply(module, full)
    assert _equal(_outputs(module, steps), wanted), "an all-compute plan changes bits"
    harmonica.remove(module)
    harmonica.apply(module, some)
    found = _outputs(module, steps)
    harmonica.remove(module)
    assert _equal(found[:1], wanted[:1]) and all(each.isfinite().all() for one in found for each in one)
    assert _equal(_outputs(module, steps), wanted), "removal changes bits"
    by_kind = ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS if kinds[kind])
    return Row(name, WORKS, by_kind, f"{sum(macs.branches) / macs.full:.2f}", served(name, module, some))


def committed() -> dict[str, str]:
    """Return the committed table's rows, by class."""
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def committed_version() -> str:
    """Return the version of diffusers that the committed table was made with."""
    found = re.search(r"with diffusers ([\d.]+\d)", TABLE.read_text())
    assert found is not None
    return found[1]


def write_table() -> None:
    """Try all classes and write the table."""
    rows = [row_of(name) for name in tiny_transformers.transformer_classes()]
    works = sum(row.state == WORKS for row in rows)
    drawn = sum(row.is_drawn for row in rows)
    head = _HEAD.format(version=diffusers.__version__, works=works, all=len(rows), served=drawn)
    TABLE.write_text(head + "".join(f"{row}\n" for row in rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_table()
