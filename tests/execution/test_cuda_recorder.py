"""The recorder of CUDA with stand-ins: the order of what a capture calls, also where it fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from harmonica.execution import cuda_recorder
from harmonica.execution.capture_check import NotCapturableError
from harmonica.execution.cuda_recorder import CudaRecorder

pytestmark = pytest.mark.usefixtures("no_codegen")


class _Calls:
    """What stands in for `torch.cuda`: the order of calls is kept, and nothing is captured."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.current: Any = "served"
        for place in ("graph_pool_handle", "empty_cache", "memory_snapshot"):
            patch.setattr(torch.cuda, place, self.named(place, (0, 7) if "handle" in place else []))
        for place in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool"):
            patch.setattr(torch._C, place, self.named(place), raising=False)
        patch.setattr(torch.cuda, "current_stream", lambda device: self)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "Stream", lambda device: self)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        cuda_recorder._capture_stream.cache_clear()

    device = torch.device("cuda", 0)
    fails = False

    def named(self, name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return result

        return call

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def wait_stream(self, other: Any) -> None:
        self.names.append("wait")

    def capture_begin(self, **how: Any) -> None:
        assert self.current is self and not torch.is_inference_mode_enabled()
        assert how == {"pool": (0, 7), "capture_error_mode": "thread_local"}
        self.names.append("begin")

    def capture_end(self) -> None:
        assert self.current is self
        self.names.append("end")
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.names.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Calls]:
    yield _Calls(monkeypatch)
    cuda_recorder._capture_stream.cache_clear()


def test_what_a_capture_does_in_its_order(cuda):
    """Not what it captures: that takes a GPU."""
    recorder = CudaRecorder(torch.device("cuda"))
    cuda.names.clear()
    with torch.inference_mode(), recorder.recording():
        recorder.warm_up(lambda: cuda.names.append("run"))
        for _ in range(2):
            _, replay = recorder.record(lambda: cuda.names.append("step"))
    replay()
    clear, around = "_cuda_clearCublasWorkspaces", ["begin", "step", "end"]
    assert cuda.names == ["wait", "run", "wait", "empty_cache", clear, *around, *around, clear, "replay"]
    assert cuda.current == "served" and recorder.nbytes == 0


def test_a_capture_that_fails_leaves_the_stream_and_the_allocator_and_says_why(cuda):
    recorder, cuda.fails = CudaRecorder(torch.device("cuda")), True

    def step() -> None:
        raise RuntimeError("the reason")

    with pytest.raises(RuntimeError, match="the reason"), recorder.recording():
        recorder.record(step)
    assert cuda.names[-3:] == ["end", "_cuda_endAllocateToPool", "_cuda_clearCublasWorkspaces"]
    assert cuda.current == "served" and not cuda_recorder._capture_lock().locked()


def test_a_step_that_cannot_be_captured_is_found_before_the_capture(cuda):
    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(NotCapturableError), recorder.recording():
        recorder.warm_up(lambda: torch.ones(2, device="meta").sum().item())
    assert "begin" not in cuda.names and cuda.current == "served"
