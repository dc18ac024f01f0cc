"""A trajectory of training reads nothing back from its device until it is over, however many steps it has.

There is no device here: what would wait for one is counted.
"""

from typing import Any

import pytest
import torch
from execution_cases import make_batch, make_dit
from torch import Tensor
from torch.overrides import TorchFunctionMode

from harmonica.core.router import Router
from harmonica.data.batch import Batch
from harmonica.execution.eager import EagerRunner
from harmonica.models.base import BranchedTransformer
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.samplers.step_noise import StepNoise, drawn_noise
from harmonica.training.beta import BetaController
from harmonica.training.iepo import KINDS, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig

READS = (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu)
READS += (Tensor.__bool__, Tensor.__int__, Tensor.__float__)
COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)


class Waits(TorchFunctionMode):
    """Counts what waits for a device; the optimiser counts its own steps on the host."""

    def __init__(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().__init__()
        self.optimizer, self.count = optimizer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        states = self.optimizer.state.values() if self.optimizer else ()
        is_own = any(args and args[0] is state.get("step") for state in states)
        self.count += func in (*READS, *COPIES) and not is_own
        return func(*args, **(kwargs or {}))


def parts_of(steps: int) -> tuple[Any, Router, list[Batch]]:
    config = SamplerConfig(name="iddpm", num_inference_steps=steps, guidance_scale=1.5, clip_sample=False)
    sampler = make_sampler(make_dit(), config)
    keys = SampleKeys.of(0, range(4))
    return sampler, Router.normal(steps, 4, 0), Batch(*make_batch(4), keys).split(2)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The steps whose noise was drawn and copied together."""
    seen: list[range] = []

    def watched(keys: SampleKeys, steps: range, like_NCHW: Tensor) -> Tensor:
        seen.append(steps)
        return drawn_noise(keys, steps, like_NCHW)

    monkeypatch.setattr("harmonica.samplers.step_noise.drawn_noise", watched)
    return seen


@pytest.mark.parametrize("student", ["soft", "hard"])
def test_the_updates_of_a_trajectory(student, draws):
    counts = []
    for steps in (4, 7):
        sampler, router, batches = parts_of(steps)
        trainer = SdtTrainer(sampler, router, SdtConfig(student=student))
        controller = BetaController(steps, trainer.costs_B, fraction=0.5, threshold=0.1)
        trainer.train_trajectory(batches, torch.ones(steps - 1))  # which makes the optimiser's state
        draws.clear()
        with Waits(trainer.optimizer) as waits:
            trainer.train_trajectory(
                batches,
                torch.ones(steps - 1),
                on_gradient=lambda i, grad, c=controller, r=router: c.observe(i, grad, r.rows[i]),
            )
        counts.append(waits.count)
        controller.update()
        assert controller.worth_TB.isfinite().all() and controller.worth_TB.all()
    assert counts[0] == counts[1] == 2, "all rows at the start, and the records at the end"
    assert len(draws) == len(batches)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_of_lambda(kind, draws):
    counts = []
    for steps in (4, 7):
        sampler, router, batches = parts_of(steps)
        with Waits() as waits:
            image_error_proxy(sampler, router, batches, kind=kind, config=SdtConfig(threshold=0.4))
        counts.append(waits.count)
    assert counts == [len(batches)] * 2, "once for each part, whatever the number of steps"
    assert len(draws) == 2 * len(batches)


def test_rows_are_read_as_they_will_be_when_the_trajectory_gets_there():
    """The first update clamps the rows still to come, which may put them on the other side of tau."""
    router, config = Router.from_logits(torch.full((4, 4), 4.0)), SdtConfig(clamp=0.5, threshold=0.7)
    with torch.no_grad():
        router.rows[0].fill_(-4.0)
    sampler = make_sampler(make_dit(), SamplerConfig(num_inference_steps=4, guidance_scale=1.5))
    trainer = SdtTrainer(sampler, router, config)
    rows = trainer.refresh_rows(2)
    assert rows == [[False] * 4, [False] * 4, [True] * 4, [True] * 4]
    seen: dict[int, list[bool]] = {}
    step = trainer._step

    def watched(i: int, part: Any, scores_B: Tensor, row: Any) -> Any:
        seen[i] = (scores_B > config.threshold).tolist()
        return step(i, part, scores_B, row)

    trainer._step = watched  # type: ignore[method-assign]
    trainer.train_trajectory([Batch(*make_batch(2))], torch.ones(3))
    assert seen == dict(enumerate(rows[:3]))


def test_step_noise_is_that_of_its_keys_however_many_are_drawn_at_once(monkeypatch):
    keys, like = SampleKeys.of(5, range(2)), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    for most in (10**6, 40, 1):
        monkeypatch.setattr("harmonica.samplers.step_noise.MOST_VALUES", most)
        noise = StepNoise(keys, 6, like)
        assert len(noise) == 6
        for i in (5, 4, 1, 0, 3, -1):
            assert torch.equal(noise[i], torch.from_numpy(keys.step_noise(i % 6, (1, 3, 3))).double())


def test_lambda_runs_through_the_engine_from_end_to_end(no_codegen, monkeypatch):
    sampler, router, batches = parts_of(4)
    eager = image_error_proxy(sampler, router, batches, kind="cumulative", config=SdtConfig())
    sampler.model.execution = "compiled"
    monkeypatch.setattr(BranchedTransformer, "full_pass", None)  # which runs operation by operation
    monkeypatch.setattr(EagerRunner, "compute", None)
    compiled = image_error_proxy(sampler, router, batches, kind="cumulative", config=SdtConfig())
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-6)
