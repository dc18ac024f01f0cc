"""The preset's training without what comes before and after the router's own."""

from typing import Any

from harmonica.training.forecast_config import ForecastConfig

ROUTER_ONLY: dict[str, Any] = {
    "initial": "alternate",
    "start_trajectories": 0,
    "target_speedup": 0.0,
    "target_cur": 0.42,
    "choice_trajectories": 0,
    "forecast": ForecastConfig(),
}
ROUTER_ONLY_FLAGS = [
    f"--train.{name.replace('_', '-')}={value}" for name, value in ROUTER_ONLY.items() if name != "forecast"
] + ["--train.forecast.trajectories=0"]
"""For the command line."""
