"""The tables of a run's report page: plain strings, from the JSON that the stages wrote.

Numbers that nobody knew of when this was written are shown all the same, under their own names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from harmonica.evaluation.evaluation_report import CACHED, FULL

from ..compare.names import shown_name
from ..compare.ranking import missing_name

_FORMS = {
    "num_inference_steps": "{:.0f}",
    "seconds_per_image": "{:.4f}",
    "seconds_spread": "{:.1%}",
    "speedup": "{:.2f}x",
    "ideal_speedup": "{:.2f}x",
    "cur": "{:.1%}",
    "psnr_to_full": "{:.2f} dB",
    "label_accuracy": "{:.1%}",
    "label_agreement": "{:.1%}",
}
_NAMES = {
    "num_inference_steps": "steps",
    "seconds_per_image": "s / image",
    "seconds_spread": "spread of times",
    "cur": "CUR",
    "psnr_to_full": "PSNR to full",
    "ssim_to_full": "SSIM to full",
    "lpips_to_full": "LPIPS to full",
    "frechet_to_full": "Frechet to full",
    "frechet_to_test": "Frechet to test",
    "kid_to_full": "KID to full",
    "clip_score": "CLIP score",
    "label_agreement": "same label",
}
_NOT_METRICS = ("method", "target_speedup")
# What an evaluation can measure, by one of its names, and what it takes.
_MEASURABLE = {
    "frechet_to_full": "distances between sets of images (Frechet, KID, ...): no feature extractor",
    "ssim_to_full": "SSIM to full",
    "lpips_to_full": "LPIPS to full: no weights were given",
    "inception_score": "Inception Score: no feature extractor",
}

Row = tuple[str, list[str]]


def named(key: str) -> str:
    """Return what a metric is called in tables: its name, else its key in words."""
    return _NAMES.get(key, key.replace("_", " "))


def shown(key: str, of: Mapping[str, Any]) -> str:
    """Return a number with its 95% interval, "" if there is no such number."""
    value, form = of.get(key), _FORMS.get(key, "{:.4g}")
    if value is None:
        return ""
    if isinstance(value, str | bool):
        return str(value)
    interval = of.get(f"{key}_interval")
    around = " ({} to {})".format(*(form.format(end) for end in interval)) if interval else ""
    return form.format(value) + around


def _keys(of: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of all numeric values, in the order of their first appearance."""
    keys = (
        key
        for one in of
        for key, value in one.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    return [key for key in dict.fromkeys(keys) if key not in _NOT_METRICS]


def results(report: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    """Return columns and rows of the results: a column for each variant, a row for each metric."""
    variants = {**report["arms"], **report.get("transfer", {})}
    floor = report.get("noise_floor")
    if isinstance(floor, Mapping):
        variants["two seeds of full"] = floor
    keys = _keys(list(variants.values()))
    rows = [(named(key), [shown(key, variant) for variant in variants.values()]) for key in keys]
    return [name.replace("_", " ") for name in variants], rows


def comparison(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[Row]]]:
    """Return a table for each target: title, columns, and a row for each method and seed."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(point.get("target_speedup"), []).append(point)
    tables = []
    for target in sorted(groups, key=lambda target: target or 0):
        keys = _keys(groups[target])
        rows = [(shown_name(point), [shown(key, point) for key in keys]) for point in groups[target]]
        title = f"target {target:.2f}x" if target else "no target"
        tables.append((title, [named(key) for key in keys], rows))
    return tables


def not_compared(missing: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the variants of a comparison that were not measured, with the reasons."""
    return [(missing_name(one), [str(one["reason"])]) for one in missing]


def sweep(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Row]]:
    """Return the columns and rows of the sweep, a row for each trial."""
    keys = _keys(points)
    columns = [*map(named, keys), "lambda", "on the front", "version"]
    rows = []
    for point in points:
        ends = [str(point["iepo"]), "yes" if point["on_front"] else "", str(point["version"])]
        rows.append((str(point["name"]), [*(shown(key, point) for key in keys), *ends]))
    return columns, rows


def not_measured(
    settings: Mapping[str, Any], report: Mapping[str, Any] | None, done: Mapping[str, bool]
) -> list[str]:
    """Return sentences that say what this run did not measure.

    Args:
        settings: the workflow's.
        done: whether a comparison, a sweep and so on are there, by name.
    """
    missing = []
    if report is None:
        missing.append("Nothing was evaluated: no speed, no quality.")
    else:
        lacks = [text for key, text in _MEASURABLE.items() if key not in report["arms"][CACHED]]
        missing += [text[0].upper() + text[1:] + "." for text in lacks]
        if "seconds_per_image" in report["arms"][FULL] and not settings["evaluate"]["use_gpu"]:
            missing.append("Speed on a GPU: all times are of a CPU.")
        if not settings["evaluate"]["transfer"]:
            missing.append("What the plan is worth under other samplers (evaluate.transfer).")
    if str(settings["model"]["path"]).startswith("builtin:"):
        missing.append("Public models: this is a small one that is built in.")
    words = {
        "gate": "The gate: no decision was made about this router.",
        "comparison": "Other methods on the same noise (stage compare).",
        "sweep": "Other targets, lambda kinds and seeds (stage sweep): this is one training.",
        "served": "The endpoint: this run has not asked it for an image.",
    }
    return missing + [text for name, text in words.items() if not done[name]]
