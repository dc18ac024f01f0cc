"""What properties are drawn from: plans, and trajectories under one through a model of any small shape."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from slow_dit import Shape, network
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.models.dit.model import DiT, DiTConfig

quick = settings(max_examples=25, derandomize=True, database=None)
"""The same few examples at every run: a test that fails by chance is run again, not read."""
reuses = st.sampled_from(["hold", "forecast"])


@dataclass(frozen=True)
class Trajectory:
    """A model with random weights, what it is given at each step (of no meaning), and a plan."""

    model: DiT
    x: list[Tensor]
    """One (n, C, S, S) a step."""
    labels: Tensor
    plan: Plan

    @property
    def steps(self) -> list[int]:
        """In the order run."""
        return list(reversed(range(len(self.x))))

    def inputs(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, timestep and condition of step i."""
        return self.x[i], torch.full_like(self.labels, 150 * i), self.labels

    def embed(self, i: int) -> tuple[Tensor, Any]:
        """Hidden state and conditioning of step i."""
        return self.model.embed(*self.inputs(i))

    def slow(self, weights_TB: Tensor, refresh_TB: Tensor, reuse: Reuse) -> Iterator[Tensor]:
        """Outputs in the order run: every value ever kept is listed, and reuse looks at the latest."""
        config, w = self.model.config, self.model.state_dict()
        shape = Shape(
            input_size=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            hidden_size=config.hidden_size,
            depth=config.num_layers,
            num_heads=config.num_attention_heads,
            num_classes=config.num_embeds_ada_norm,
        )
        kept: dict[int, list[tuple[int, Tensor]]] = {}
        for i in self.steps:

            def use(b: int, computed: Tensor, i: int = i) -> Tensor:
                y, weight = computed, weights_TB[i, b]
                if weight != 1:
                    j, old = kept[b][-1]
                    if reuse == "forecast" and len(kept[b]) > 1:
                        k, older = kept[b][-2]
                        old = old + (old - older) / (j - k) * (i - j)
                    y = weight * computed + (1 - weight) * old
                if refresh_TB[i, b]:
                    kept.setdefault(b, []).append((i, y))
                return y

            yield network(w, shape, *self.inputs(i), use)


@st.composite
def plans(draw: st.DrawFn, num_branches: int) -> Plan:
    """Two to five steps."""
    row = st.tuples(*[st.booleans()] * num_branches)
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return Plan((*rows, (True,) * num_branches))


@st.composite
def trajectories(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Trajectory:
    """One to three rows."""
    patch, channels = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 5))
    config = DiTConfig(
        sample_size=patch * draw(st.integers(1, 3)),
        patch_size=patch,
        in_channels=channels,
        out_channels=channels * draw(st.integers(1, 2)),
        num_layers=draw(st.integers(1, 3)),
        num_attention_heads=draw(st.integers(1, 3)),
        attention_head_dim=4 * draw(st.integers(1, 3)),
        num_embeds_ada_norm=draw(st.integers(1, 4)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    model = DiT(config)
    model.initialize(generator, zero=False)
    model.to(dtype).eval().requires_grad_(False)
    size = draw(st.integers(1, 3)), channels, config.sample_size, config.sample_size
    plan = draw(plans(len(model.branches)))
    x = [torch.randn(size, generator=generator, dtype=dtype) for _ in plan.compute]
    labels = torch.randint(config.num_embeds_ada_norm + 1, size[:1], generator=generator)
    return Trajectory(model, x, labels, plan)
