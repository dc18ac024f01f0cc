"""Name the compared methods: by keys, which stay, and by labels for readers.

Keys are stored in `comparison.json`; labels are shown.
"""

from collections.abc import Mapping
from typing import Any

# Keys: folders of routers and the points of `comparison.json` have them.
OURS = "HarmoniCa"
FEWER_STEPS = "fewer steps"
PAPER = "SDT + IEPO as in the paper"
RELEASED = "SDT + IEPO as released"
OURS_LABEL = "learned steps + fitted forecast"
"""Label of this project's default method, which does not keep a trained router."""
_LABELS = {OURS: OURS_LABEL, PAPER: "HarmoniCa (paper)", RELEASED: "HarmoniCa (released code)"}


def label_of(method: str) -> str:
    """Return a method's label, as far as it is known before the method has run."""
    return _LABELS.get(method, method)


def label(point: Mapping[str, Any]) -> str:
    """Return the label of a point of `comparison.json`; older files store none."""
    return str(point.get("label") or label_of(point["method"]))


def shown_name(point: Mapping[str, Any]) -> str:
    """Return a point's label, and what tells it from its method's other points."""
    name = label(point)
    if point["method"] == FEWER_STEPS and "num_inference_steps" in point:
        return f"{point['num_inference_steps']} steps"
    return f"{name} {point['setting']:g}" if "setting" in point else name
