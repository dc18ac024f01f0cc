"""Draws orders in shared trajectories, shows them while they run and encodes them: a replica without Ray.

The trajectory has a thread of its own and picture files have others: the event loop answers all along.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor

from harmonica.evaluation.plots import encode_picture
from harmonica.validation.finite import NotFinite
from pipelines.config.serve import ServeConfig
from pipelines.serving.batching import Batcher, Overloaded, TimedOut
from pipelines.serving.image_sampler import ImageSampler, Quality, Router, Row
from pipelines.serving.requests import Drawing, ModelCard, Order, Preview, Progress, Refusal, RouterCard

logger = logging.getLogger("ray.serve")


class Metrics(Protocol):
    """Who is told what goes on."""

    def trajectory(self, router: Router, waits_s: Sequence[float], seconds: float) -> None: ...
    def waiting(self, count: int) -> None: ...
    def refused(self, reason: str) -> None: ...
    def serving(self, version: str, refused: str) -> None: ...


def preview_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """After how many steps previews are shown: evenly spread, fewer where there are not enough steps."""
    steps = {round(num_steps * (i + 1) / (count + 1)) for i in range(count)}
    return tuple(sorted(steps - {0, num_steps}))


@dataclass(frozen=True, slots=True)
class _Job:
    """A row in the queue, and who watches it."""

    row: Row
    arrived: float = field(default_factory=time.perf_counter)
    shown: tuple[int, ...] = ()
    """Steps after which it wants to be seen."""
    report: Callable[[int, Tensor | None], None] | None = None
    """Told of every step, from the trajectory's thread."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    image_CHW: Tensor
    batch_size: int
    waited_s: float
    seconds: float


class Studio:
    """An `ImageSource` in this process."""

    def __init__(
        self, images: ImageSampler, model: str, config: ServeConfig, metrics: Metrics | None = None
    ) -> None:
        self.images, self._model, self._config = images, model, config
        self.metrics = metrics
        self._began: float | None = None
        self.refused: Refusal | None = None
        self.batcher: Batcher[Router, _Job, _Drawn] = Batcher(
            self._trajectory,
            max_batch_size=config.max_batch_size,
            wait_s=config.batch_wait_s,
            max_waiting=config.max_waiting,
            target_s=config.latency_target_s,
        )
        self._encoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="encoder")

    async def settle(self) -> None:
        """Before the first image, once there is a router: fix the shape of trajectories if asked to."""
        if not self._config.reproducible:
            return
        # On a CPU an image that waits alone costs twelve times as much in a full shape of 16.
        most = self._config.max_batch_size if self._config.use_gpu else 1
        rows = await self.batcher.in_thread(partial(self.images.fix_rows, most))
        if rows < most:
            logger.warning("images differ by their place in a batch of %d: each is drawn by itself", most)
        self.batcher.max_batch_size = rows

    async def describe(self) -> ModelCard:
        images = self.images
        return ModelCard(
            model=self._model,
            router_version=images.version,
            cur=images.router.plan.cur,
            class_names=images.class_names,
            image_size=images.image_size,
            max_images=self._config.max_images_per_request,
            routers=self._router_cards(),
            refused=self.refused,
            waiting=self.batcher.num_waiting,
            max_waiting=self._config.max_waiting,
        )

    def _router_cards(self) -> tuple[RouterCard, ...]:
        uses: dict[Router, tuple[Quality, ...]] = {}
        qualities: tuple[Quality, ...] = ("high", "medium", "low")
        for quality in qualities:
            router = self.images.router_for(quality)
            uses[router] = uses.get(router, ()) + (quality,)
        return tuple(_card(router, quality) for router, quality in uses.items())

    async def draw(self, order: Order) -> Drawing:
        with self._telling(order):
            router = await self._admit(order)
            drawn = await self._submit(order, router, _Job(order.row))
            return await self._finish(order, router, drawn)

    async def watch(self, order: Order) -> AsyncIterator[Progress | Preview | Drawing]:
        with self._telling(order):
            async with aclosing(self._watch(order)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _telling(self, order: Order) -> Iterator[None]:
        """Log what no client is told. A row that is not finite fails alone, without those of its batch."""
        try:
            yield
        except NotFinite as error:
            row, version = order.row, self.images.version
            logger.error(
                "image not drawn, quality %s with champion %s, seed %d, index %d: %s",
                *(order.quality, version, row.seed, row.index, error),
            )
            self._count_refused("not_finite")
            raise

    async def _watch(self, order: Order) -> AsyncGenerator[Progress | Preview | Drawing]:
        router = await self._admit(order)
        shown = preview_steps(router.plan.num_steps, order.partial_images)
        loop, num_steps = asyncio.get_running_loop(), router.plan.num_steps
        reports: asyncio.Queue[tuple[int, Tensor | None] | None] = asyncio.Queue()

        def report(step: int, image_CHW: Tensor | None) -> None:
            loop.call_soon_threadsafe(reports.put_nowait, (step, image_CHW))

        drawing = asyncio.create_task(
            self._submit(order, router, _Job(order.row, shown=shown, report=report))
        )
        drawing.add_done_callback(lambda _: reports.put_nowait(None))
        try:
            while (reported := await reports.get()) is not None:
                step, image_CHW = reported
                if order.progress:
                    yield Progress(step, num_steps)
                if image_CHW is not None:
                    picture = await self._encode(order, image_CHW)
                    yield Preview(picture, shown.index(step), step, num_steps)
            yield await self._finish(order, router, await drawing)
        finally:
            drawing.cancel()  # who stops watching gives up the place

    async def _admit(self, order: Order) -> Router:
        """The order's router, once its prompts are embedded, which goes on while a trajectory runs."""
        try:
            self.batcher.check_room()
        except Overloaded:
            self._count_refused("overloaded")
            raise
        router = self.images.router_for(order.quality, order.num_inference_steps, order.row.guidance_scale)
        if isinstance(order.row.subject, str):
            await asyncio.to_thread(self.images.check, order.row)
        return router

    async def _submit(self, order: Order, router: Router, job: _Job) -> _Drawn:
        bound = self._config.timeout_s
        timeout_s = bound if order.timeout_s is None else min(bound, order.timeout_s)
        try:
            return await self.batcher.submit(router, job, company=order.company, timeout_s=timeout_s)
        except (Overloaded, TimedOut) as error:
            self._count_refused("timeout" if isinstance(error, TimedOut) else "overloaded")
            raise
        finally:
            if self.metrics:
                self.metrics.waiting(self.batcher.num_waiting)

    def _count_refused(self, reason: str) -> None:
        if self.metrics:
            self.metrics.refused(reason)

    def _trajectory(self, router: Router, jobs: Sequence[_Job]) -> list[_Drawn]:
        self._began = started = time.perf_counter()
        try:
            images_NCHW = self.images.draw([job.row for job in jobs], router, partial(_report, jobs))
        finally:
            self._began = None
        seconds = time.perf_counter() - started
        waits_s = [started - job.arrived for job in jobs]
        if self.metrics:
            self.metrics.trajectory(router, waits_s, seconds)
        return [
            _Drawn(image_CHW, len(jobs), wait_s, seconds) for image_CHW, wait_s in zip(images_NCHW, waits_s)
        ]

    def check_health(self) -> None:
        """
        Raises:
            RuntimeError: a trajectory has stood still for longer than any may take.
        """
        began, limit_s = self._began, self._config.stall_timeout_s
        if began is not None and time.perf_counter() - began > limit_s:
            raise RuntimeError(f"a trajectory has run for more than serve.stall_timeout_s ({limit_s:g})")

    async def _encode(self, order: Order, image_CHW: Tensor) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._encoders, encode_picture, image_CHW, order.output_format, order.output_compression
        )

    async def _finish(self, order: Order, router: Router, drawn: _Drawn) -> Drawing:
        config, guidance_scale = router.sampler.config, order.row.guidance_scale
        about = {"router_version": router.version, "batch_size": drawn.batch_size}
        seconds = {"waited_s": round(drawn.waited_s, 4), "seconds": round(drawn.seconds, 4)}
        logger.info("image drawn", extra={**about, **seconds})  # fields of Serve's JSON logs
        return Drawing(
            picture=await self._encode(order, drawn.image_CHW),
            router_version=router.version,
            cur=router.plan.cur,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
            batch_size=drawn.batch_size,
            seconds=drawn.seconds,
        )


def _report(jobs: Sequence[_Job], step: int, predict: Callable[[Sequence[int]], Tensor]) -> None:
    """Tell those who watch; only rows that want to be seen now are predicted and decoded."""
    rows = [row for row, job in enumerate(jobs) if step in job.shown]
    pictured = dict(zip(rows, predict(rows))) if rows else {}
    for row, job in enumerate(jobs):
        if job.report is not None:
            job.report(step, pictured.get(row))


def _card(router: Router, quality: tuple[Quality, ...]) -> RouterCard:
    config = router.sampler.config
    return RouterCard(
        version=router.version,
        quality=quality,
        cur=router.plan.cur,
        ideal_speedup=router.ideal_speedup,
        sampler=config.name,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        plan=tuple(router.plan.to_strings()),
        scores=router.scores,
    )
