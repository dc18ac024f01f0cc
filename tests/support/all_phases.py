"""A training of every phase, each as short as it can be."""

from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.sdt_config import SdtConfig

ALL_PHASES = TrainingConfig(
    target_speedup=1.3,
    initial="measured",
    initial_logit=2.0,
    start_trajectories=1,
    trajectories=2,
    choice_trajectories=1,
    forecast=ForecastConfig(trajectories=4, probes=1),
    batch_size=2,
    iepo_every=2,
    iepo="sensitivity",
    sdt=SdtConfig(reuse="forecast", threshold=0.5, learning_rate=0.1, penalty="macs"),
)
