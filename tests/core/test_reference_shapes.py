"""Recorded quantities in other shapes than the recorded case, from the slow reimplementation.

One case has one depth, one width, one patch size, one guidance scale and a clamp that its logits hardly
reach: code that is right there can be wrong everywhere else.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_dit import Shape, positions
from slow_reference import Settings, SlowCase, timesteps, write_case
from tolerances import MARGIN, roundoff
from torch import Tensor

from harmonica.cli.check_reference import compare
from harmonica.models.dit.model import DiT, DiTConfig

CASE = Path(__file__).parents[1] / "assets" / "case_a"
INPUTS = {"noise", "labels", "sdt.noise", "sdt.labels"}
TOLERANCE = 1e-5
"""That of `harmonica.cli.check_reference`: what is computed in float64 is recorded in float32,
rounded to 6e-8, and the optimiser divides by the size of a gradient whose first digits cancel."""
pytestmark = pytest.mark.numeric


@dataclass(frozen=True)
class Case:
    """What is not said is that of a case of one block and four steps."""

    shape: Shape = field(default_factory=Shape)
    settings: Settings = field(default_factory=Settings)
    tilt: float = 0.0


CASES = {
    "four_blocks_of_one_head_with_patches_of_four": Case(
        Shape(input_size=16, patch_size=4, depth=4, num_heads=1), Settings(batch=3, threshold=0.3)
    ),
    "three_channels_one_class_one_image_seven_steps": Case(
        Shape(in_channels=3, hidden_size=24, depth=2, num_heads=3, num_classes=1),
        Settings(batch=1, num_sampling_steps=7, threshold=0.3, epochs=2),
    ),
    "a_token_a_pixel_and_five_heads": Case(
        Shape(input_size=6, patch_size=1, hidden_size=40, depth=2, num_heads=5),
        Settings(batch=1, cfg_scale=2.0, threshold=0.5),
    ),
    "one_token_five_channels_three_epochs": Case(
        Shape(input_size=4, patch_size=4, in_channels=5, depth=2), Settings(lr=0.1, epochs=3)
    ),
    "two_steps": Case(Shape(depth=2), Settings(num_sampling_steps=2, epochs=2)),
    "a_threshold_above_the_fixed_score_of_the_first_step": Case(
        settings=Settings(threshold=0.995, clamp=9.0)
    ),
}
# As the page has it: guidance is always 2n rows, and touches the first three channels whatever they are.
DISPUTED = {
    "a_guidance_scale_of_one_still_runs_both_halves": Case(settings=Settings(cfg_scale=1.0)),
    "with_one_channel_its_variance_is_guided_too": Case(Shape(in_channels=1)),
    "with_two_channels_one_variance_is_guided_too": Case(Shape(in_channels=2)),
}


@pytest.fixture
def check(tmp_path: Path) -> Callable[[Case], dict[str, Tensor]]:
    """Writes a case, compares every key of it, and hands out the numbers recorded."""

    def run(case: Case) -> dict[str, Tensor]:
        write_case(tmp_path, case.shape, case.settings, seed=1, tilt=case.tilt)
        errors = {comparison.key: comparison.error for comparison in compare(tmp_path)}
        assert errors.keys() == load_file(CASE / "golden.safetensors").keys() - INPUTS
        assert {key: error for key, error in errors.items() if not error <= TOLERANCE} == {}
        return load_file(tmp_path / "golden.safetensors")

    return run


@pytest.fixture
def differing_timesteps(tmp_path: Path) -> Callable[[Iterable[int]], list[int]]:
    """The step counts whose timesteps, recorded alone, do not agree."""
    write_case(tmp_path, Shape(), Settings(), seed=0)
    case = json.loads((tmp_path / "case.json").read_text())

    def run(step_counts: Iterable[int]) -> list[int]:
        errors = {}
        for count in step_counts:
            (tmp_path / "case.json").write_text(json.dumps(case | {"num_sampling_steps": count}))
            save_file({"timesteps": torch.tensor(timesteps(count))}, tmp_path / "golden.safetensors")
            (comparison,) = compare(tmp_path)
            errors[count] = comparison.error
        return [count for count, error in errors.items() if error]

    return run


def layout(folder: Path) -> dict[str, Any]:
    """File names, settings, and name, shape and type of every tensor."""

    def of(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}

    with torch.serialization.safe_globals([argparse.Namespace]):
        router = torch.load(folder / "router_official.pt", weights_only=True)
    return {
        "files": {path.name for path in folder.iterdir()},
        "case": json.loads((folder / "case.json").read_text()),
        "golden": of(load_file(folder / "golden.safetensors")),
        "weights": of(torch.load(folder / "dit_official.pt", weights_only=True)),
        "router": {name: type(value) for name, value in router.items()},
        "rows": of(router["routers"]),
    }


def test_the_slow_reference_agrees_with_the_recorded_case():
    recorded = load_file(CASE / "golden.safetensors")
    ours = SlowCase.read(CASE).record({key: recorded[key] for key in INPUTS})
    assert ours.keys() == recorded.keys()
    for key, value in recorded.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        assert (ours[key].double() - value.double()).norm() <= TOLERANCE * value.double().norm(), key


def test_a_written_case_has_the_layout_of_the_recorded_one(tmp_path):
    shape = Shape(hidden_size=48, depth=3, num_heads=4, num_classes=10)
    write_case(tmp_path, shape, Settings(num_sampling_steps=10, epochs=3), seed=0)
    assert layout(tmp_path) == layout(CASE)


@pytest.mark.parametrize("name", CASES)
def test_every_key_agrees_with(check, name):
    compute = check(CASES[name])["plan.compute"]
    assert compute[-1].all()
    assert 0 < compute[:-1].double().mean() < 1, "a plan of one kind says nothing about the other"


def test_every_key_agrees_with_strong_guidance_and_a_clamp_that_binds(check):
    shape = Shape(input_size=4, hidden_size=8, num_classes=37)
    settings = Settings(
        batch=3, num_sampling_steps=12, cfg_scale=4.0, threshold=0.5, lr=0.5, epochs=2, clamp=1.5
    )
    recorded = check(Case(shape, settings))
    at_limit = recorded["sdt.router_logits_after"][:-1].abs() == 1.5
    assert 0.1 < at_limit.double().mean() < 0.9
    assert (recorded["router.logits"].abs() > 1.5).any(), "rows are clamped before their first update too"


def test_every_key_agrees_where_every_step_has_its_part_in_lambda(check):
    # Elsewhere the noisiest step's lambda is larger by orders and the norm over all sees no other.
    recorded = check(Case(Shape(depth=2), Settings(batch=3, threshold=0.3, clamp=20.0), tilt=16.0))
    for key in ("iepo.cumulative", "iepo.leave_one_out"):
        assert recorded[key].min() > 1e-3 * recorded[key].max(), key


@pytest.mark.parametrize("name", DISPUTED)
def test_every_key_agrees_where_the_page_is_taken_at_its_word(check, name):
    check(DISPUTED[name])


def test_timesteps_are_those_of_the_public_code(differing_timesteps):
    assert differing_timesteps([*range(2, 21), 25, 50, 100, 250, 500, 1000]) == []


def test_timesteps_are_those_of_the_public_code_at_a_half_too(differing_timesteps):
    assert differing_timesteps([21, 31, 43, 61]) == []


@pytest.mark.parametrize(("width", "grid"), [(4, 1), (24, 2), (16, 4), (40, 6)])
def test_positions_are_the_formula_written_out(width, grid):
    config = DiTConfig(
        sample_size=2 * grid, num_layers=1, num_attention_heads=1, attention_head_dim=width, in_channels=4
    )
    torch.testing.assert_close(
        DiT(config).pos_embed, positions(width, grid), rtol=0, atol=MARGIN * roundoff(torch.float32)
    )
