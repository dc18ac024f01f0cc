"""Call a pipeline for rows of prompts.

Its transformers' forwards are replaced for the call.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from harmonica.core.cache import Reuse, values_kept
from harmonica.integrations.call_owner import current_pipeline
from harmonica.integrations.compiled_modules import uncompiled
from harmonica.integrations.forward_holders import own_forward
from harmonica.integrations.forward_slots import in_place_of_forward
from harmonica.integrations.recorded.call_tracker import steps_of
from harmonica.integrations.recorded.kinds import RefusedTransformer, is_no_step
from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import views_of
from harmonica.models.vae import are_pixels
from harmonica.pipeline_training.policies import Policy, PolicyTrajectory
from harmonica.pipeline_training.sampling import Prompt, batched, sample_pipeline
from harmonica.samplers import MAX_GUIDANCE_SCALE, SamplerConfig


class _RecordedEnough(BaseException):
    """Ends a call of a pipeline when its first step has been recorded."""


class PipelineCalls:
    """A pipeline whose transformers are recorded, and runs of it under a policy."""

    def __init__(
        self, pipe: Any, call: Mapping[str, Any], *, seed: int, cacheable: Sequence[str], reuse: Reuse
    ) -> None:
        """Record the transformers of the pipeline.

        Args:
            call: arguments of every call of the pipeline: steps, guidance, height, width.
            reuse: what a reused branch hands out, in training as in what is trained for.
        """
        self.pipe, self.call, self.seed, self.reuse = pipe, dict(call), seed, reuse
        self.transformers: list[nn.Module] = [
            getattr(each, "_orig_mod", each) for each in transformers_of(pipe)
        ]
        for each in self.transformers:
            if "forward" in vars(each):
                raise ValueError(
                    "transformer.forward is not the class's own: harmonica.remove first, and load the "
                    "pipeline without offloading"
                )
        forwards = [own_forward(each) for each in self.transformers]
        self._views = views_of(self.transformers, forwards, cacheable=cacheable)
        self.num_steps = 0
        self.num_calls = 0
        """Calls of a trajectory whose values are kept side by side: those of a step, and of both transformers
        where there are two; 0 before the first run."""
        self._recorded_images = 1
        self._trajectory: PolicyTrajectory | None = None

    @property
    def view(self) -> RecordedTransformer:
        """The first transformer's: all have the same branches."""
        return self._views[0]

    @contextmanager
    def opened(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Record the pipeline's first step, and leave the pipeline as it was in the end.

        Raises:
            ValueError: the pipeline refuses the call, or its transformer has no plan.
        """
        training = [(each, each.training) for each in self.transformers]
        parts = [each for each in self.pipe.components.values() if isinstance(each, nn.Module)]
        learned = [p for each in (*parts, *self.transformers) for p in each.parameters() if p.requires_grad]
        progress = getattr(self.pipe, "_progress_bar_config", None)
        # Backward passes would have compiled blocks compiled again for each kind of gradient.
        with uncompiled(module for each in self.transformers for module in each.modules()):
            try:
                for each in self.transformers:
                    each.eval()
                for parameter in learned:
                    parameter.requires_grad_(False)
                self.pipe.set_progress_bar_config(disable=True)
                self._record(prompts)
                self._trajectory = PolicyTrajectory(
                    self._views, self.num_steps, reuse=self.reuse, check_view=self._check_view
                )
                yield
            finally:
                for view in self._views:
                    view.close()
                for each, was in training:
                    each.train(was)
                for parameter in learned:
                    parameter.requires_grad_(True)
                if progress is None:
                    vars(self.pipe).pop("_progress_bar_config", None)
                else:
                    self.pipe._progress_bar_config = progress

    def _check_view(self, view: RecordedTransformer) -> None:
        if [b.units for b in view.branches] != [b.units for b in self.view.branches]:
            raise RefusedTransformer("the pipeline's transformers have different branches: no plan fits both")

    def _record(self, prompts: Sequence[Prompt]) -> None:
        def first(*args: Any, **kwargs: Any) -> Any:
            if is_no_step(self.view.transformer, kwargs):
                return self.view.forward(*args, **kwargs)
            self.num_steps = steps_of(current_pipeline()) or 0
            self.view.record(*args, **kwargs)
            raise _RecordedEnough

        self._recorded_images = len(prompts)
        # Which transformer comes first is up to the pipeline: with two, the first of them.
        try:
            with in_place_of_forward(self.transformers[0], first):
                self._call(prompts, range(len(prompts)))
        except _RecordedEnough:
            pass
        finally:
            self.pipe.maybe_free_model_hooks()
        if not self.view.is_recorded:
            raise RefusedTransformer("the pipeline did not call its transformer: nothing can be recorded")
        if self.num_steps < 2:
            raise ValueError(f"the pipeline makes {self.num_steps} steps: give num_inference_steps 2 or more")

    @property
    def has_decoder(self) -> bool:
        """Return whether the pipeline decodes its latents to pictures or videos."""
        has_processor = any(hasattr(self.pipe, name) for name in ("image_processor", "video_processor"))
        return has_processor and getattr(self.pipe, "vae", None) is not None

    @property
    def has_pictures(self) -> bool:
        """Return whether the pipeline ends in pictures: decoded, or drawn as pixels."""
        config: Any = self.transformers[0].config
        return self.has_decoder or are_pixels(config.get("in_channels"))

    def run(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        rows: Sequence[int],
        *,
        output_type: str = "latent",
        has_gradient: bool = False,
    ) -> Tensor:
        """Call the pipeline under a policy; returns its latents or pictures (N, ...).

        Args:
            rows: the rows' names: the noise of each is the same in every call.
            output_type: as the pipeline takes it: `latent`, or `pt` for pictures from 0 to 1.
            has_gradient: keep the graph of what the policy's calls give, through the pipeline's loop.
        """
        trajectory = self._trajectory
        assert trajectory is not None, "only while opened"
        trajectory.begin(policy)
        with ExitStack() as stack:
            stack.callback(trajectory.reset)
            for transformer, call in zip(self.transformers, trajectory.calls()):
                stack.enter_context(in_place_of_forward(transformer, call))
            drawn = self._call(prompts, rows, output_type=output_type, has_gradient=has_gradient)
            trajectory.finish()
            self.num_calls = trajectory.num_calls
        return drawn

    def _call(self, prompts: Sequence[Prompt], rows: Sequence[int], **how: Any) -> Tensor:
        return sample_pipeline(self.pipe, self.call, prompts, rows, seed=self.seed, **how)

    def kept_bytes(self, reuse: Reuse, forecast_order: int) -> int:
        """Return the bytes that one image keeps between steps.

        They follow from the outputs' shapes in the recorded call. All branches of all calls count, since each
        value is kept when it is computed.
        """
        values = max(1, self.num_calls) * values_kept(reuse, forecast_order)
        return self.view.call_bytes() * values // self._recorded_images

    def described_call(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return a call's plain arguments and the names of a prompt's, for an artifact.

        An endpoint calls the pipeline with them.
        """
        plain = {
            name: value
            for name, value in self.call.items()
            if value is None or isinstance(value, (str, int, float, bool))
        }
        return {"arguments": plain, "prompt_arguments": sorted(batched(prompts))}

    def sampler_config(self) -> SamplerConfig:
        """Return how the pipeline samples, for an artifact."""
        scale = float(self.call.get("guidance_scale") or self.call.get("true_cfg_scale") or 1.0)
        return SamplerConfig(
            name="diffusers",
            num_inference_steps=self.num_steps,
            guidance_scale=min(max(scale, 1.0), MAX_GUIDANCE_SCALE),
            scheduler=json.loads(self.pipe.scheduler.to_json_string()),
        )
