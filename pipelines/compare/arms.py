"""Prepare the arms of a comparison that train no router.

They are the methods at each speed. Each arm is made by itself, so that one that fails costs only itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from harmonica.cli.common import say
from harmonica.models.base import Macs

from ..config.workflow import WorkflowConfig
from ..evaluation.variants import Variant
from ..run_state.storage import RunStorage
from .measuring import reason_of
from .methods import Entry, untrained_entries, untrained_variant
from .names import label_of
from .published import (
    CALIBRATED,
    FORECASTS,
    calibrate,
    calibrated_variant,
    forecast_variant,
    interval_name,
    interval_variant,
    own_intervals,
)
from .ranking import missing_name
from .third_party_caches import LibraryVariant

About = dict[str, Any]
"""Fields of a variant's point in `comparison.json` that are known before it is measured."""
Arm = tuple[About, Callable[[], Variant]]
"""A method at a speed, and how its variant is made, which may fail."""


@dataclass(frozen=True)
class Method:
    """A variant, and those fields of its point that are not measured."""

    about: About
    variant: Variant


def untrained_arms(config: WorkflowConfig, macs: Macs) -> list[Arm]:
    """Return the arms of the baselines that need no training, at all speeds."""
    settings = config.compare
    entries = [entry for t in settings.targets for entry in untrained_entries(t, settings.seeds)]
    return [
        (about_entry(entry), partial(untrained_variant, config.sampler, macs, entry)) for entry in entries
    ]


def published_arms(config: WorkflowConfig, storage: RunStorage, folder: str, macs: Macs) -> list[Arm]:
    """Return the arms of the published methods, at all speeds.

    Workers begin to make the plans of those that see images first.
    """
    targets, sampler = config.compare.targets, config.sampler
    forecasts = [Entry(method, target) for target in targets for method in FORECASTS]
    arms: list[Arm] = [(about_entry(e), partial(forecast_variant, sampler, macs, e)) for e in forecasts]
    for interval, order in own_intervals(sampler.num_inference_steps, macs, targets):
        variant_of = partial(interval_variant, sampler, macs, interval, order)
        name = interval_name(interval, order)
        arms.append(({"method": name, "label": name}, variant_of))
    task = ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu), max_retries=3)(calibrate)
    for entry in [Entry(method, target) for target in targets for method in CALIBRATED]:
        is_made = storage.exists(f"{folder}/{entry.name}.json")
        running = None if is_made else task.remote(config, entry, folder)
        arms.append((about_entry(entry), partial(_calibrated, config, storage, folder, entry, running)))
    return arms


def _calibrated(
    config: WorkflowConfig, storage: RunStorage, folder: str, entry: Entry, running: Any
) -> Variant:
    """Wait for a method's plan; return its variant."""
    if running is not None:
        ray.get(running)
    return calibrated_variant(config, entry, storage, folder)


def made_methods(arms: Iterable[Arm], macs: Macs) -> tuple[list[Method], list[About]]:
    """Make the variants of arms.

    Returns:
        The methods, and the points of those whose variant could not be made.
    """
    methods, missing = [], []
    for about, variant_of in arms:
        try:
            methods.append(made_method(about, variant_of(), macs))
        except Exception as error:  # of a worker, of a damaged file, of a method; the other variants count
            missing.append(not_measured(about, f"its plan could not be made: {reason_of(error)}"))
    return methods, missing


def not_measured(about: About, reason: str) -> About:
    """Say why a variant is not measured; return its point."""
    point = about | {"reason": reason}
    say(f"[compare] {missing_name(point)} is not measured: {reason}")
    return point


def about_entry(entry: Entry) -> About:
    """Return what the point of an entry says before anything is measured."""
    label = {"label": label_of(entry.method)}
    return {"method": entry.method, **label, "target_speedup": entry.target, "seed": entry.seed}


def made_method(about: About, variant: Variant, macs: Macs) -> Method:
    """Return the method of a variant, with the steps and the ideal speed of its plan."""
    known: About = {"num_inference_steps": variant.num_inference_steps, **about}
    if variant.plan is not None:
        known["cur"], known["ideal_speedup"] = variant.plan.cur, variant.plan.ideal_speedup(macs)
    return Method(known, variant)


def library_method(variant: LibraryVariant) -> Method:
    """Return the method of a library's cache at one of its settings."""
    steps: About = {"num_inference_steps": variant.num_inference_steps}
    return Method(
        steps | {"method": variant.library, "label": variant.library, "setting": variant.setting}, variant
    )
