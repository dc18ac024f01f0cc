"""What the methods of a comparison are called: by a key, which stays, and by what they are."""

from collections.abc import Mapping
from typing import Any

# Keys: folders of routers and the points of `comparison.json` have them.
OURS = "HarmoniCa"
FEWER_STEPS = "fewer steps"
PAPER = "SDT + IEPO as in the paper"
RELEASED = "SDT + IEPO as released"
OURS_LABEL = "step search + fitted forecast"
"""Of what this project makes by default; no training of a router is left in it."""
_LABELS = {OURS: OURS_LABEL, PAPER: "HarmoniCa (paper)", RELEASED: "HarmoniCa (released code)"}


def label_of(method: str) -> str:
    """What a method is called, as far as that is known before it has run."""
    return _LABELS.get(method, method)


def label(point: Mapping[str, Any]) -> str:
    """Of a point of `comparison.json`; those of versions before this one have none of their own."""
    return str(point.get("label") or label_of(point["method"]))


def shown_name(point: Mapping[str, Any]) -> str:
    """Of one point: its label, and what tells it from others of its method."""
    name = label(point)
    if point["method"] == FEWER_STEPS and "num_inference_steps" in point:
        return f"{point['num_inference_steps']} steps"
    return f"{name} {point['setting']:g}" if "setting" in point else name
