"""A plan of nine steps of which every second is reused, and a short fit of its forecast."""

from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.training.forecast_config import ForecastConfig

STEPS = 9
FIT = ForecastConfig(trajectories=8, rounds=2, probes=2)


def alternating() -> Plan:
    return Router.alternating(STEPS, 6, 1.0).plan(0.5)
