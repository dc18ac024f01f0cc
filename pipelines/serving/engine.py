"""Batch the requests for images, sample them and encode the results, without Ray.

Trajectories run in a thread of their own and image files are encoded in others, so that the event loop
always answers.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from harmonica.evaluation.plots import encode_picture
from harmonica.execution.graphs import sizes_up_to
from harmonica.validation.finite import NotFinite

from ..config.serve import ServeConfig
from .batching import Batcher, Overloaded, TimedOut, Worker
from .image_sizes import as_text
from .jobs import Job, Metrics, SampledImage, preview_steps, report_step
from .planned_sampler import PlannedSampler
from .requests import EngineRequest, GeneratedImage, ModelCard, Preview, Progress, RejectedRouter
from .router_cards import router_cards
from .served_plan import BatchKey, ServedPlan

logger = logging.getLogger("ray.serve")


class GenerationEngine:
    """This image source has a queue, an image sampler and image encoders."""

    def __init__(
        self,
        images: PlannedSampler[Any],
        model: str,
        config: ServeConfig,
        metrics: Metrics | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.images, self._model, self._config = images, model, config
        self.metrics = metrics
        self._began: float | None = None
        self.rejected: RejectedRouter | None = None
        self.batcher: Batcher[BatchKey[ServedPlan], Job, SampledImage] = Batcher(
            self._trajectory,
            max_batch_size=config.max_batch_size,
            wait_s=config.batch_wait_s,
            max_waiting=config.max_waiting,
            target_s=config.latency_target_s,
            worker=worker,
        )
        self._encoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="encoder")

    async def fix_batch_size(self) -> None:
        """Fix the batch size if `serve.reproducible` is set.

        Call it once there is a router.
        """
        if not self._config.reproducible:
            return
        # On a CPU an image that waits alone costs twelve times as much in a full batch of 16.
        most = self._config.max_batch_size if self._config.use_gpu else 1
        size = await self.batcher.run_between_batches(partial(self.images.fix_batch_size, most))
        if size < most:
            logger.warning("images depend on their place in a batch of %d: batches have one image", most)
        self.batcher.max_batch_size = size

    async def warm_up(self, served: ServedPlan) -> None:
        """Warm a plan up at every batch size that is recorded.

        Batches under the other plans run in between.
        """
        fixed = self.images.fixed_batch_size
        for size in (fixed,) if fixed else sizes_up_to(self._config.max_batch_size):
            await self.batcher.run_between_batches(partial(self.images.warm_up, served, size))

    def close(self) -> None:
        """Stop the threads that encode; nothing may be generated any more."""
        self._encoders.shutdown(wait=False)

    async def describe(self, model: str = "") -> ModelCard:
        """Describe the model, its routers and the queue."""
        images = self.images
        return ModelCard(
            model=self._model,
            router_version=images.version,
            cur=images.champion.plan.cur,
            class_names=images.class_names,
            image_size=images.image_size,
            sizes=images.sizes,
            has_previews=images.has_previews,
            max_pictures=images.max_pictures,
            needs_pictures=images.needs_pictures,
            max_images=self._config.max_images_per_request,
            routers=router_cards(images),
            rejected=self.rejected,
            waiting=self.batcher.num_waiting,
            max_waiting=self._config.max_waiting,
        )

    async def generate(self, request: EngineRequest) -> GeneratedImage:
        """Generate one image, as `ImageSource` says."""
        with self._log_not_finite(request):
            served = await self._admit(request)
            sampled = await self._submit(request, served, Job(request.image))
            return await self._finish(request, served, sampled)

    async def generate_stream(
        self, request: EngineRequest
    ) -> AsyncIterator[Progress | Preview | GeneratedImage]:
        """Yield the events of one image, as `ImageSource` says."""
        with self._log_not_finite(request):
            async with aclosing(self._stream(request)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _log_not_finite(self, request: EngineRequest) -> Iterator[None]:
        """Log and count an image that has values that are not finite.

        The client is told only that generating failed. The other images of its batch are answered.
        """
        try:
            yield
        except NotFinite as error:
            image, version = request.image, self.images.version
            logger.error(
                "image not generated, quality %s with champion %s, seed %d, index %d: %s",
                *(request.quality, version, image.seed, image.index, error),
            )
            self._count_rejected("not_finite")
            raise

    async def _stream(self, request: EngineRequest) -> AsyncGenerator[Progress | Preview | GeneratedImage]:
        served = await self._admit(request)
        count = request.partial_images if self.images.has_previews else 0
        steps = preview_steps(served.plan.num_steps, count)
        loop, num_steps = asyncio.get_running_loop(), served.plan.num_steps
        reports: asyncio.Queue[tuple[int, Tensor | None] | None] = asyncio.Queue()

        def report(step: int, image_CHW: Tensor | None) -> None:
            loop.call_soon_threadsafe(reports.put_nowait, (step, image_CHW))

        job = Job(request.image, preview_steps=steps, report=report)
        sampling = asyncio.create_task(self._submit(request, served, job))
        sampling.add_done_callback(lambda _: reports.put_nowait(None))
        try:
            while (reported := await reports.get()) is not None:
                step, image_CHW = reported
                if request.progress:
                    yield Progress(step, num_steps)
                if image_CHW is not None:
                    picture = await self._encode(request, image_CHW)
                    yield Preview(picture, steps.index(step), step, num_steps, _size_of(image_CHW))
            yield await self._finish(request, served, await sampling)
        finally:
            sampling.cancel()  # a client that stops reading leaves the queue

    async def _admit(self, request: EngineRequest) -> ServedPlan:
        """Return the request's plan, once there is room and its prompts are embedded.

        Prompts are embedded in a thread, while a trajectory runs.
        """
        try:
            self.batcher.check_room()
        except Overloaded:
            self._count_rejected("overloaded")
            raise
        image = request.image
        served: ServedPlan = self.images.plan_for(
            request.quality, request.num_inference_steps, image.guidance_scale
        )
        if isinstance(image.subject, str):
            await asyncio.to_thread(self.images.check, image, served)
        return served

    async def _submit(self, request: EngineRequest, served: ServedPlan, job: Job) -> SampledImage:
        bound = self._config.timeout_s
        timeout_s = bound if request.timeout_s is None else min(bound, request.timeout_s)
        key = BatchKey(served, self.images.shared_with(request.image, served))
        try:
            return await self.batcher.submit(key, job, group_size=request.group_size, timeout_s=timeout_s)
        except (Overloaded, TimedOut) as error:
            self._count_rejected("timeout" if isinstance(error, TimedOut) else "overloaded")
            raise
        finally:
            if self.metrics:
                self.metrics.waiting(self.batcher.num_waiting)

    def _count_rejected(self, reason: str) -> None:
        if self.metrics:
            self.metrics.rejected(reason)

    def _trajectory(self, key: BatchKey[ServedPlan], jobs: Sequence[Job]) -> list[SampledImage]:
        served = key.served
        self._began = started = time.perf_counter()
        try:
            requests = [job.image for job in jobs]
            images_NCHW = self.images.generate(requests, served, partial(report_step, jobs))
        finally:
            self._began = None
        seconds = time.perf_counter() - started
        waits_s = [started - job.arrived for job in jobs]
        if self.metrics:
            self.metrics.trajectory(served, waits_s, seconds)
        return [
            SampledImage(image_CHW, len(jobs), wait_s, seconds)
            for image_CHW, wait_s in zip(images_NCHW, waits_s)
        ]

    def check_health(self) -> None:
        """Check that no trajectory has run for longer than `serve.stall_timeout_s`.

        Raises:
            RuntimeError: one has.
        """
        began, limit_s = self._began, self._config.stall_timeout_s
        if began is not None and time.perf_counter() - began > limit_s:
            raise RuntimeError(f"a trajectory has run for more than serve.stall_timeout_s ({limit_s:g})")

    async def _encode(self, request: EngineRequest, image_CHW: Tensor) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._encoders, encode_picture, image_CHW, request.output_format, request.output_compression
        )

    async def _finish(
        self, request: EngineRequest, served: ServedPlan, sampled: SampledImage
    ) -> GeneratedImage:
        config, guidance_scale = served.config, request.image.guidance_scale
        about = {"router_version": served.version, "batch_size": sampled.batch_size}
        seconds = {"waited_s": round(sampled.waited_s, 4), "seconds": round(sampled.seconds, 4)}
        logger.info("image generated", extra={**about, **seconds})  # fields of Serve's JSON logs
        return GeneratedImage(
            picture=await self._encode(request, sampled.image_CHW),
            router_version=served.version,
            cur=served.plan.cur,
            size=_size_of(sampled.image_CHW),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
            batch_size=sampled.batch_size,
            seconds=sampled.seconds,
        )


def _size_of(image_CHW: Tensor) -> str:
    return as_text((image_CHW.shape[2], image_CHW.shape[1]))
