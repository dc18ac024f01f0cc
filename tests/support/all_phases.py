"""A training of every phase, each as short as it can be."""

from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.presets import learned_steps

ALL_PHASES = learned_steps(
    is_large=False,
    target_speedup=1.3,
    start_trajectories=1,
    trajectories=2,
    choice_trajectories=1,
    forecast=ForecastConfig(trajectories=4, probes=1),
    batch_size=2,
    iepo_every=2,
)
