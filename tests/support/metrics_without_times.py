"""What two runs of one training must agree on."""

from collections.abc import Mapping


def without_times(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a trajectory that do not depend on how long anything took."""
    return {name: value for name, value in metrics.items() if "_s" not in name and "seconds" not in name}
