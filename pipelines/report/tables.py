"""Make the tables of a run's report page from the JSON that the stages wrote.

All cells are strings. A number whose key is not in the table of metrics is shown under its key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from harmonica.evaluation.evaluation_report import Estimate, EvaluationReport, estimates_from_json
from harmonica.evaluation.metric_table import (
    FRECHET_TO_FULL,
    INCEPTION_SCORE,
    LPIPS_TO_FULL,
    SSIM_TO_FULL,
    metric_of,
)

from ..compare.names import shown_name
from ..compare.ranking import missing_name

# The sentence for a metric that an evaluation can measure and has not, by the metric's key.
_MEASURABLE = {
    FRECHET_TO_FULL: "distances between sets of images (Frechet, KID, ...): no feature extractor",
    SSIM_TO_FULL: "SSIM to full",
    LPIPS_TO_FULL: "LPIPS to full: no weights were given",
    INCEPTION_SCORE: "Inception Score: no feature extractor",
}

Row = tuple[str, list[str]]


def shown(key: str, of: Mapping[str, Estimate]) -> str:
    """Return a number with its unit and its 95% interval; "" if there is none."""
    metric, found = metric_of(key), of.get(key)
    if found is None:
        return ""
    around = " ({} to {})".format(*map(metric.shown, found.interval)) if found.interval else ""
    return metric.shown(found.value) + around


def _keys(of: Sequence[Mapping[str, Estimate]]) -> list[str]:
    """Return the keys of all numbers, in the order of their first appearance."""
    keys = dict.fromkeys(key for one in of for key in one)
    return [key for key in keys if key != "target_speedup"]


def results(report: EvaluationReport) -> tuple[list[str], list[Row]]:
    """Return the columns of the results, one a variant, and the rows, one a metric."""
    variants = {**report.variants, **report.transfer}
    if report.noise_floor is not None:
        variants["two seeds of full"] = report.noise_floor
    numbers = [variant.numbers for variant in variants.values()]
    rows = [(metric_of(key).name, [shown(key, one) for one in numbers]) for key in _keys(numbers)]
    return [name.replace("_", " ") for name in variants], rows


def comparison(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[Row]]]:
    """Return a table for each target speed.

    Returns:
        For each table its title, its columns, and a row for each method and seed.
    """
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(point.get("target_speedup"), []).append(point)
    tables = []
    for target in sorted(groups, key=lambda target: target or 0):
        numbers = [estimates_from_json(point) for point in groups[target]]
        keys = _keys(numbers)
        rows = [
            (shown_name(point), [shown(key, one) for key in keys])
            for point, one in zip(groups[target], numbers)
        ]
        title = f"target {target:.2f}x" if target else "no target"
        tables.append((title, [metric_of(key).name for key in keys], rows))
    return tables


def not_compared(missing: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the variants of a comparison that were not measured, with the reasons."""
    return [(missing_name(one), [str(one["reason"])]) for one in missing]


def sweep(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Row]]:
    """Return the columns and rows of the sweep, a row for each trial."""
    numbers = [estimates_from_json(point) for point in points]
    keys = _keys(numbers)
    columns = [*(metric_of(key).name for key in keys), "lambda", "on the front", "version"]
    rows = []
    for point, one in zip(points, numbers):
        ends = [str(point["iepo"]), "yes" if point["on_front"] else "", str(point["version"])]
        rows.append((str(point["name"]), [*(shown(key, one) for key in keys), *ends]))
    return columns, rows


def not_measured(
    settings: Mapping[str, Any], report: EvaluationReport | None, done: Mapping[str, bool]
) -> list[str]:
    """Return sentences that say what this run did not measure.

    Args:
        settings: the settings of the workflow.
        report: the report of its evaluation; None if nothing was evaluated.
        done: whether there are a comparison, a sweep and so on, by name.
    """
    missing = []
    if report is None:
        missing.append("Nothing was evaluated: no speed, no quality.")
    else:
        lacks = [text for key, text in _MEASURABLE.items() if key not in report.cached.metrics]
        missing += [text[0].upper() + text[1:] + "." for text in lacks]
        if report.full.seconds_per_image is not None and not settings["evaluate"]["use_gpu"]:
            missing.append("Speed on a GPU: all times are of a CPU.")
        if not settings["evaluate"]["transfer"]:
            missing.append("The plan under other samplers (evaluate.transfer).")
    if str(settings["model"]["path"]).startswith("builtin:"):
        missing.append("Public models: this is a small one that is built in.")
    words = {
        "gate": "The gate: no decision was made about this router.",
        "comparison": "Other methods on the same noise (stage compare).",
        "sweep": "Other targets, lambda kinds and seeds (stage sweep): this is one training.",
        "served": "The endpoint: this run has not asked it for an image.",
    }
    return missing + [text for name, text in words.items() if not done[name]]
