"""Steps as CUDA graphs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import torch

from harmonica.execution.capture_check import CaptureCheck
from harmonica.execution.recorders import Recorder, Replay, Result


class CudaRecorder(Recorder):
    """Records CUDA graphs in one memory pool.

    Later steps read a step's results at the address where it left them.

    Written after torch's documentation and its source; no GPU has run it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream(device)

    @contextmanager
    def recording(self) -> Iterator[None]:
        # A process may capture one graph at a time: the generator, the stream and the allocator are shared.
        with _capture_lock():
            try:
                yield
            finally:
                torch._C._cuda_clearCublasWorkspaces()

    def warm_up(self, run: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        # On the stream of the capture, as torch's documentation asks.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), CaptureCheck():
            run()
        current.wait_stream(self._stream)
        torch.cuda.empty_cache()  # the pool cannot use what the run has left
        # cuBLAS keeps a workspace for each stream, which whoever records graphs may let go of, as
        # torch.compile does. So it is made in the pool, during the capture, and let go of after it.
        torch._C._cuda_clearCublasWorkspaces()

    def record(self, step: Callable[[], Result]) -> tuple[Result, Replay]:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: it empties the allocator's cache at every step, beside a model that serves,
        # and leaves its stream the current one where a capture fails.
        with torch.cuda.stream(self._stream):
            # Of what it makes, the generator's seeds are kept for graphs that others capture.
            with torch.inference_mode(False):
                # Other threads may go on, such as one that decodes a preview.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = step()
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        return result, graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that has failed, so that the allocator goes on as before."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):  # after an error in capture_end it still fills the pool
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)

    @property
    def nbytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if each["segment_pool_id"] == tuple(self._pool))


@lru_cache(maxsize=1)
def _capture_lock() -> threading.Lock:
    return threading.Lock()


@lru_cache(maxsize=8)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all graphs of a device are captured.

    With each stream cuBLAS takes another workspace, of 32 MiB and more.
    """
    return torch.cuda.Stream(device)
