"""Arms of a comparison that fail: each costs only itself, and what was measured before it is stored."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harmonica.evaluation.metric_table import PSNR_TO_FULL, SPEEDUP
from harmonica.models.base import Macs
from harmonica.samplers import SamplerConfig
from pipelines.compare.arms import made_method, made_methods
from pipelines.compare.methods import untrained_entries, untrained_variant
from pipelines.compare.published import FORECASTS, Entry, forecast_variant
from pipelines.compare.results import Results
from pipelines.compare.stage import _measured
from pipelines.evaluation.variants import Variant
from pipelines.run_state.storage import RunStorage

MACS = Macs(branches=(30, 60) * 6, rest=12)
SAMPLER = SamplerConfig(num_inference_steps=20)


def fail(*of: Any) -> Variant:
    raise ZeroDivisionError("no such plan")


def test_a_plan_that_cannot_be_made_costs_its_own_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORECASTS, "Spectrum", fail)
    entries = [Entry(method, target) for target in (1.4, 2.0) for method in FORECASTS]
    arms = [({"method": e.method}, partial(forecast_variant, SAMPLER, MACS, e)) for e in entries]
    methods, missing = made_methods(arms, MACS)
    assert [one.about["method"] for one in methods] == [n for n in FORECASTS if n != "Spectrum"] * 2
    assert {one["reason"] for one in missing} == {
        "its plan could not be made: ZeroDivisionError: no such plan"
    }
    assert [one["method"] for one in missing] == ["Spectrum"] * 2


class Bench:
    """Measures what it is given, but for one variant."""

    def __init__(self, results: Results, failing: str) -> None:
        self.results, self.failing = results, failing
        self.measured: list[str] = []

    def measure(self, variant: Variant) -> tuple[dict[str, Any], float]:
        if variant.name == self.failing:
            raise RuntimeError("out of memory")
        assert all(self.results.get(name) for name in self.measured), "each is stored as it is done"
        self.measured.append(variant.name)
        return {SPEEDUP: 1.4, PSNR_TO_FULL: 40.0}, 0.1


def test_an_arm_that_fails_leaves_the_others_measured_and_stored(tmp_path: Path) -> None:
    results = Results(RunStorage(str(tmp_path), "r1"), "compare", 64)
    variants = [untrained_variant(SAMPLER, MACS, entry) for entry in untrained_entries(1.4, seeds=2)]
    methods = [made_method({"method": one.name}, one, MACS) for one in variants]
    bench = Bench(results, failing=variants[1].name)
    points, spread, missing = _measured(methods, bench, results)
    others = [one.name for one in variants if one is not variants[1]]
    assert [point["method"] for point in points] == bench.measured == others and spread == 0.1
    assert [one["method"] for one in missing] == [variants[1].name]
    assert missing[0]["reason"] == "RuntimeError: out of memory"

    (stored,) = (tmp_path / "r1/compare/measured").glob(f"{others[0]}.json")
    stored.write_text("{cut off")
    bench = Bench(results, failing="")
    points, _, missing = _measured(methods, bench, results)
    assert bench.measured == [variants[1].name], "the others are not measured again"
    assert [one["method"] for one in missing] == [others[0]] and len(points) == len(variants) - 1
