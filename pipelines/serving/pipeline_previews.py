"""Watch the steps of a pipeline's call, and decode what a step predicts.

Pipelines differ in what they tell of their steps, and some tell nothing; all of them call their scheduler.

Shapes: N images, C channels, H W image.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

OnStep = Callable[[int, Tensor], object]
"""Called after every step with the number of steps done and the clean latents that it predicts."""
_SAME = 2 / 255
_UNDECODED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Errors of a decoder that is given what it does not take."""


class WatchedSteps:
    """The steps of one call of a pipeline."""

    def __init__(self, on_step: OnStep | None = None) -> None:
        self._on_step = on_step
        self._calls = 0
        self.latents: Tensor | None = None
        """The latents after the last step; None where the pipeline's scheduler made none."""

    @contextmanager
    def of(self, scheduler: Any) -> Iterator[None]:
        """Watch a scheduler's steps inside this context."""
        own = scheduler.step

        @functools.wraps(own)  # pipelines look at its parameters
        def step(*args: Any, **kwargs: Any) -> Any:
            made = own(*args, **kwargs)
            self._see(scheduler, inspect.signature(own).bind(*args, **kwargs).arguments, made)
            return made

        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step

    def _see(self, scheduler: Any, given: dict[str, Any], made: Any) -> None:
        self._calls += 1
        latents = self.latents = made[0]
        order, count = getattr(scheduler, "order", 1), len(scheduler.timesteps)
        if self._on_step is not None and (self._calls % order == 0 or self._calls == count):
            self._on_step(-(-self._calls // order), _clean(scheduler, given, made, latents))


def _clean(scheduler: Any, given: dict[str, Any], made: Any, latents: Tensor) -> Tensor:
    """Return the clean latents that a step predicts.

    They are the noisy ones where the scheduler says nothing of clean ones.
    """
    config = scheduler.config
    converted = getattr(scheduler, "model_outputs", None)
    if converted and (config.get("predict_x0") or "dpmsolver++" in str(config.get("algorithm_type"))):
        return torch.as_tensor(converted[-1])
    if isinstance(made, tuple) and len(made) > 1:  # the prediction of x_0, in schedulers of one step
        return torch.as_tensor(made[1])
    if "FlowMatch" in type(scheduler).__name__:
        sample, output = given["sample"], given["model_output"]
        sigma = scheduler.sigmas[scheduler.step_index - 1]  # it has gone on to the next step
        return torch.as_tensor(sample - sigma.to(sample) * output)
    return latents


class LatentDecoder:
    """Decodes latents as a pipeline does at the end of its call.

    Where a pipeline's own way is another, `works` is False: the first image that it makes is compared.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.works: bool | None = None
        """Whether decoded latents are the pipeline's images; None until there was one."""

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the images (N, C, H, W) in [-1, 1], on the CPU.

        Args:
            size: width and height.
        """
        pipe, vae = self._pipe, self._pipe.vae
        if latents.ndim == 3:  # tokens
            latents = pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor)
        latents, config = latents.to(vae.dtype), vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            latents = latents * _by_channel(config.latents_std, latents)
            latents = latents + _by_channel(config.latents_mean, latents)
        else:
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        if images.ndim == 5:  # a video's decoder, and one frame
            images = images[:, :, 0]
        return images.float().clamp(-1, 1).cpu()

    def check(self, latents: Tensor | None, images_NCHW: Tensor, size: tuple[int, int]) -> None:
        """Compare a call's decoded last latents with what it has made."""
        if self.works is not None:
            return
        self.works = False
        if latents is None or len(latents) != len(images_NCHW):
            return
        try:
            ours_NCHW = self.decode(latents, size)
        except _UNDECODED:
            return
        if ours_NCHW.shape == images_NCHW.shape:
            self.works = torch.allclose(ours_NCHW, images_NCHW, rtol=0, atol=_SAME)


def _by_channel(values: Any, latents: Tensor) -> Tensor:
    """Return a number for each channel, in a shape for latents (N, C, ...)."""
    return torch.as_tensor(values).to(latents).view(1, -1, *[1] * (latents.ndim - 2))
