"""Export the Prometheus metrics of a replica, beside those of Ray Serve.

Ray puts `ray_` before the names; cluster/grafana.json shows them.
"""

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from .served_plan import ServedPlan

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


class ServeMetrics:
    """These metrics of one replica are set by its event loop and its sampling thread.

    Args:
        model: value of the label `model`, for a replica of several models. Default: there is no such label.
    """

    def __init__(self, model: str = "") -> None:
        self._model = {"model": model} if model else {}
        router, reason = ("router_version", *self._model), ("reason", *self._model)
        self._images = Counter("harmonica_images", "Images generated.", router)
        self._cache_ratio = Gauge("harmonica_cache_ratio", "Share of branches reused: CUR.", router)
        self._step = Histogram("harmonica_step_seconds", "A step of a trajectory.", _SECONDS, router)
        self._wait = Histogram("harmonica_queue_wait_seconds", "An image's wait.", _SECONDS, router)
        self._batch = Histogram("harmonica_batch_size", "Images of a trajectory.", _SIZES, router)
        self._waiting = Gauge("harmonica_waiting", "Images in the queue.", tuple(self._model))
        self._rejected = Counter("harmonica_refused", "Images not generated, by reason.", reason)
        self._champion = Gauge("harmonica_champion", "1 for the champion that is served.", router)
        self._champion_rejected = Gauge("harmonica_champion_refused", "1 for one that cannot be.", router)
        self._shown: dict[Gauge, str] = {}

    def trajectory(self, served: ServedPlan, waits_s: Sequence[float], seconds: float) -> None:
        """Record a trajectory that has ended."""
        tags = {"router_version": served.version, **self._model}
        self._images.inc(len(waits_s), tags)
        self._cache_ratio.set(served.plan.cur, tags)
        self._step.observe(seconds / served.plan.num_steps, tags)
        self._batch.observe(len(waits_s), tags)
        for wait_s in waits_s:
            self._wait.observe(wait_s, tags)

    def waiting(self, count: int) -> None:
        """Set the number of images in the queue."""
        self._waiting.set(count, self._model)

    def rejected(self, reason: str) -> None:
        """Count an image that is not generated.

        Args:
            reason: overloaded, timeout or not_finite.
        """
        self._rejected.inc(1, {"reason": reason, **self._model})

    def serving(self, version: str, rejected: str) -> None:
        """Set the champion that is served, and the registry's if that is another one.

        Args:
            version: the champion that is served.
            rejected: the registry's champion if it cannot be served, else "".
        """
        for gauge, now in ((self._champion, version), (self._champion_rejected, rejected)):
            before = self._shown.get(gauge, "")
            if before and before != now:
                gauge.set(0, {"router_version": before, **self._model})
            if now:
                gauge.set(1, {"router_version": now, **self._model})
            self._shown[gauge] = now
