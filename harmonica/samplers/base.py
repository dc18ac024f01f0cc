"""The interface of samplers.

Each step maps a state to the next one; samplers keep no state.

Step i is row i of T respaced steps; i = T-1 is the noisiest and runs first.
Shapes: N images, M model rows (2N under guidance: conditional half, then unconditional), C H W image.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harmonica.models.base import BranchedTransformer
from harmonica.samplers.config import GuidanceChannels, SamplerConfig
from harmonica.samplers.noise import SampleKeys
from harmonica.samplers.step_noise import StepNoise


@dataclass(frozen=True, slots=True)
class State:
    """The state of a sampling before a step, without caches.

    It is never changed in place.

    A sampling can therefore go on from a stored state several times, as IEPO's do.
    """

    x_MCHW: Tensor
    conditions_T: Sequence[Any]
    """The outputs of the model's `prepare` for labels or embedded prompts, one for each step."""
    step_noise: Sequence[Tensor] = ()
    """The noise of each step (N, C, H, W), for samplers that draw it."""
    solver: Any = None
    """A multistep solver's memory of earlier steps."""


def guide(
    output_MCHW: Tensor, scale: float | Tensor, channels: GuidanceChannels, noise_channels: int
) -> Tensor:
    """Apply classifier-free guidance to [conditional; unconditional] outputs.

    Both halves get the result.

    Channels that are not guided (the learned variance; under `first_three` the fourth noise channel
    too) pass through, each half keeping its own. `first_three` counts output channels, as the public code
    does: with fewer than three noise channels it guides variance too.

    Args:
        scale: one for all, or (N, 1, 1, 1).
    """
    guided = 3 if channels == "first_three" else noise_channels
    conditional, unconditional = output_MCHW[:, :guided].chunk(2)
    half = torch.lerp(unconditional, conditional, scale)
    return torch.cat([torch.cat([half, half]), output_MCHW[:, guided:]], dim=1)


class Sampler(ABC):
    """A sampler of one model with one `SamplerConfig`.

    A sampling calls `start`, then `embed`, `guide` and `advance` at each step, then `finish`.
    """

    is_stochastic = False
    """Whether steps draw noise, which needs the samples' keys."""

    def __init__(self, model: BranchedTransformer, config: SamplerConfig, timesteps: Sequence[float]) -> None:
        self.model, self.config = model, config
        self.timesteps = timesteps
        """Timestep of each step, ascending: entry i is step i. Those of flow matching may be fractions."""
        self.is_guided = config.is_guided
        """Whether the model runs on both halves."""
        self._scale: float | Tensor = config.guidance_scale

    @property
    def num_steps(self) -> int:
        """Return T, the number of sampling steps."""
        return self.config.num_inference_steps

    def with_guidance(self, scales: Sequence[float], *, always: bool = False) -> "Sampler":
        """Return this sampler for a batch with a guidance scale for each row.

        A row is drawn as by a sampler of its scale, up to the rounding of kernels that depend on the batch:
        at 1 the other half weighs nothing.

        Args:
            always: run the model on both halves even where every scale is 1.
        """
        twin = copy.copy(self)
        twin.is_guided = always or any(scale != 1.0 for scale in scales)
        twin._scale = torch.tensor(scales, dtype=torch.float64)[:, None, None, None]
        return twin

    def guidance_scales(self, noise_NCHW: Tensor) -> Tensor:
        """Return the scale of each row (N, 1, 1, 1), in the precision of the noise."""
        if isinstance(self._scale, Tensor):
            return self._scale.to(noise_NCHW.dtype)
        return noise_NCHW.new_full((len(noise_NCHW), 1, 1, 1), self._scale)

    def with_scale_buffer(self, scales_N111: Tensor) -> "Sampler":
        """Return this sampler with guidance scales read from a tensor at each step."""
        twin = copy.copy(self)
        twin._scale = scales_N111
        return twin

    def start(
        self,
        noise_NCHW: Tensor,
        condition_N: Any,
        keys: SampleKeys | None = None,
        step_noise: Sequence[Tensor] = (),
    ) -> State:
        """Return the state from which step T-1 begins.

        Args:
            noise_NCHW: in the sampler's precision, float32 or better, whatever the model's.
            keys: the samples' keys, needed where `is_stochastic`.
            step_noise: in place of keys, the noise of each step (N, C, H, W).

        Raises:
            ValueError: the sampler is stochastic and there are no keys.
        """
        if self.is_stochastic and keys is None and not step_noise:
            raise ValueError(
                f"sampler.name is {self.config.name}, which draws noise at every step: give `keys`, the "
                "(seed, index) of each row"
            )
        if self.is_stochastic and not step_noise and keys is not None:
            step_noise = StepNoise(keys, self.num_steps, noise_NCHW)
        if not self.is_guided:
            return State(noise_NCHW, self.model.prepare(condition_N, self.timesteps), step_noise)
        if isinstance(self._scale, Tensor):
            self._scale = self._scale.to(noise_NCHW)  # once for all steps
        conditions_T = self.model.prepare(self.model.guided_condition(condition_N), self.timesteps)
        return State(torch.cat([noise_NCHW, noise_NCHW]), conditions_T, step_noise)

    def embed(self, i: int, state: State) -> tuple[Tensor, Any]:
        """Return the model's hidden state and conditioning at step i."""
        x_MCHW = state.x_MCHW
        if self.is_guided:
            # Both halves see the conditional half's latents, as in the public code: under
            # `first_three` the halves' fourth channels drift apart.
            half = x_MCHW.chunk(2)[0]
            x_MCHW = torch.cat([half, half])
        timestep_M = torch.full((x_MCHW.shape[0],), self.timesteps[i], device=x_MCHW.device)
        return self.model.embed(x_MCHW, timestep_M, state.conditions_T[i])

    def guide(self, output_MCHW: Tensor) -> Tensor:
        """Return the guided model output, all channels, in float32 or better."""
        config = self.config
        if output_MCHW.dtype in (torch.bfloat16, torch.float16):
            output_MCHW = output_MCHW.float()
        if not self.is_guided:
            return output_MCHW
        # Not kept: a recording would go on with this copy in place of the buffer that it is read from.
        scale = self._scale.to(output_MCHW) if isinstance(self._scale, Tensor) else self._scale
        return guide(output_MCHW, scale, config.guidance_channels, self.model.in_channels)

    @abstractmethod
    def advance(self, i: int, state: State, guided_MCHW: Tensor) -> State:
        """Return the state before step i - 1.

        It follows from the state before step i and the guided output.
        """

    def predict_clean(self, i: int, state: State, guided_MCHW: Tensor) -> Tensor:
        """Return the x_0 predicted at step i (N, C, H, W).

        It follows from the step's state and guided output.
        """
        num_images = state.x_MCHW.shape[0] // (2 if self.is_guided else 1)
        predicted_NCHW = guided_MCHW[:num_images, : self.model.in_channels]
        return self._clean_at(i, state.x_MCHW[:num_images], predicted_NCHW)

    @abstractmethod
    def _clean_at(self, i: int, x_NCHW: Tensor, predicted_NCHW: Tensor) -> Tensor:
        """Return x_0 from x_t before step i and the predicted noise or velocity."""

    def finish(self, state: State) -> Tensor:
        """Return the final images or latents (N, C, H, W)."""
        return state.x_MCHW.chunk(2)[0] if self.is_guided else state.x_MCHW

    def _draw(self, i: int, state: State) -> Tensor:
        """Draw the rows' noise of step i (M, C, H, W); both halves of a row get the same."""
        noise = state.step_noise[i]
        return torch.cat([noise, noise]) if self.is_guided else noise

    def _moved(self, state: State, x_MCHW: Tensor, solver: Any = None) -> State:
        return replace(state, x_MCHW=x_MCHW, solver=solver)
