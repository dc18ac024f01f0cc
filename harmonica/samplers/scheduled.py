"""Samplers that use diffusers' schedulers.

They are DPM-Solver++, SA-Solver, and the scheduler of a model's folder.
"""

import copy
import types
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from harmonica.models.base import BranchedTransformer
from harmonica.samplers.base import Sampler, State
from harmonica.samplers.config import SamplerConfig
from harmonica.samplers.noise import SampleKeys


def _given_noise(shape: Any, generator: Tensor, **_: Any) -> Tensor:
    """Take the place of diffusers' `randn_tensor`."""
    return generator


class _SASolver(SASolverScheduler):
    """An SA-Solver that is given its noise by row, as `generator`.

    diffusers draws it by batch.
    """

    # diffusers' own step, with another function in place of the one that draws: a draw with its generator
    # cannot be part of a CUDA graph.
    step = types.FunctionType(
        SASolverScheduler.step.__code__,
        {**SASolverScheduler.step.__globals__, "randn_tensor": _given_noise},
        "step",
        SASolverScheduler.step.__defaults__,
    )


# Schedulers whose whole memory is attributes and lists of tensors, one model call a step.
_SUPPORTED: dict[str, Any] = {
    "DDIMScheduler": DDIMScheduler,
    "DEISMultistepScheduler": DEISMultistepScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    "SASolverScheduler": _SASolver,
    "UniPCMultistepScheduler": UniPCMultistepScheduler,
}
# Of velocities. DEIS and SA-Solver end at the last step's noise instead of at none (diffusers 0.42).
_FLOW = (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)
_PREDICTION_TYPE = {"epsilon": "epsilon", "flow": "flow_prediction"}
# Settings of flow matching that need more than (x_t, velocity), or another velocity.
_REFUSED = {
    "invert_sigmas": "the velocity would be image minus noise",
    "stochastic_sampling": "it draws its noise by batch, not by row",
    "use_dynamic_shifting": "its shift depends on the size of each picture",
}
# Public DiT and PixArt models: linear betas, epsilon prediction, second order.
_NAMED = {
    "dpm-solver++": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"},
    "sa-solver": {"_class_name": "SASolverScheduler", "algorithm_type": "data_prediction"},
}


def _scheduler_config(config: SamplerConfig) -> Mapping[str, Any]:
    if config.name in _NAMED:
        # Dynamic thresholding with a ceiling of 1 is clipping to [-1, 1].
        return _NAMED[config.name] | {"thresholding": config.clip_sample, "sample_max_value": 1.0}
    if config.scheduler is None:
        raise ValueError(
            "sampler.name is diffusers and there is no scheduler: give a model.path whose folder has a "
            "scheduler/, or another sampler.name"
        )
    return config.scheduler


def _check(scheduler: Any, model: BranchedTransformer, where: str) -> None:
    """Refuse a scheduler with unsupported steps or another prediction type.

    The type must be the model's.

    Args:
        where: the setting that chose it.
    """
    settings, is_flow = scheduler.config, model.is_flow_matching
    has_choice = not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # that one takes velocities
    found = settings.prediction_type if has_choice else "flow_prediction"
    if found != _PREDICTION_TYPE[model.prediction]:
        raise ValueError(
            f"{where} has prediction_type {found}: only {_PREDICTION_TYPE[model.prediction]} is what the "
            "model predicts, so give sampler.name diffusers and the scheduler that it was trained with"
        )
    if is_flow and not isinstance(scheduler, _FLOW):
        raise ValueError(
            f"{where} leaves noise at the end of flow matching: give one of "
            f"{', '.join(each.__name__ for each in _FLOW)}"
        )
    if has_choice and settings.get("use_flow_sigmas", False) != is_flow:
        raise ValueError(
            f"{where} has prediction_type {found} and use_flow_sigmas {not is_flow}: set the latter to "
            f"{is_flow}"
        )
    for setting, why in _REFUSED.items():
        if settings.get(setting):
            raise ValueError(f"{where} has {setting} {settings[setting]}: {why}, so set it to False")


def _fork(scheduler: Any) -> Any:
    """Return a copy of a scheduler; tensors are shared, never written in place."""
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
    return twin


class Scheduled(Sampler):
    """A diffusers scheduler as a sampler.

    The scheduler with its history is part of the state.
    """

    def __init__(self, model: BranchedTransformer, config: SamplerConfig) -> None:
        settings = dict(_scheduler_config(config))
        name = settings.get("_class_name", "")
        if name not in _SUPPORTED:
            raise ValueError(
                f"sampler.scheduler is a {name or 'config without _class_name'}: give one of "
                f"{', '.join(_SUPPORTED)}, or another sampler.name"
            )
        self._scheduler = _SUPPORTED[name].from_config(settings)
        where = f"sampler.scheduler {name}" if config.name == "diffusers" else f"sampler.name {config.name}"
        _check(self._scheduler, model, where)
        self._scheduler.set_timesteps(config.num_inference_steps)
        descending: Tensor = self._scheduler.timesteps
        if len(descending) != config.num_inference_steps:
            raise ValueError(
                f"sampler.scheduler {name} makes {len(descending)} steps of num_inference_steps "
                f"{config.num_inference_steps}: change its timestep_spacing or steps_offset"
            )
        super().__init__(model, config, descending.flip(0).tolist())
        if hasattr(self._scheduler, "set_begin_index"):
            # Looked up by its timestep, a first step that rounding ties with the second would be skipped.
            self._scheduler.set_begin_index(0)
        self._is_sde = str(self._scheduler.config.get("algorithm_type", "")).startswith("sde-")
        self.is_stochastic = self._is_sde or isinstance(self._scheduler, _SASolver)

    def start(
        self,
        noise_NCHW: Tensor,
        condition_N: Any,
        keys: SampleKeys | None = None,
        step_noise: Sequence[Tensor] = (),
    ) -> State:
        state = super().start(noise_NCHW, condition_N, keys, step_noise)
        scale = 1.0 if self.model.is_flow_matching else float(self._scheduler.init_noise_sigma)
        return self._moved(state, state.x_MCHW * scale if scale != 1 else state.x_MCHW, self._scheduler)

    def advance(self, i: int, state: State, guided_MCHW: Tensor) -> State:
        scheduler = _fork(state.solver)
        drawn: dict[str, Any] = {}
        if self._is_sde:
            drawn = {"variance_noise": self._draw(i, state)}
        elif self.is_stochastic:
            drawn = {"generator": self._draw(i, state)}
        timestep = scheduler.timesteps[self.num_steps - 1 - i]
        predicted_MCHW = guided_MCHW[:, : self.model.in_channels]
        x_MCHW = scheduler.step(predicted_MCHW, timestep, state.x_MCHW, return_dict=False, **drawn)[0]
        return self._moved(state, x_MCHW, scheduler)

    def _clean_at(self, i: int, x_NCHW: Tensor, predicted_NCHW: Tensor) -> Tensor:
        scheduler = self._scheduler
        if self.model.is_flow_matching:
            return x_NCHW - float(scheduler.sigmas[self.num_steps - 1 - i]) * predicted_NCHW
        share = float(scheduler.alphas_cumprod[int(self.timesteps[i])])
        clean_NCHW: Tensor = (x_NCHW - (1 - share) ** 0.5 * predicted_NCHW) / share**0.5
        return clean_NCHW
