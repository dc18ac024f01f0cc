"""How long a request waits for replicas that do not answer, and that one that works is not cut off."""

import asyncio

import pytest
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from pipelines.serving.batching import Overloaded, TimedOut
from pipelines.serving.call_deadlines import Deadline, Response
from pipelines.serving.remote_engine import RemoteEngine
from pipelines.serving.requests import EngineRequest, ImageRequest

REQUEST = EngineRequest(ImageRequest("9", 0, 0), "medium", timeout_s=0.05)


@pytest.mark.parametrize("kind", [DeploymentResponse, DeploymentResponseGenerator])
def test_serve_s_responses_have_what_a_deadline_needs(kind):
    names = [name for name in vars(Response) if name in ("cancel", "_fetch_future_result_async")]
    assert len(names) == 2 and all(callable(getattr(kind, name)) for name in names)


class Call:
    """A call that a replica takes after `taken_s`, and answers after `answered_s`."""

    def __init__(self, taken_s: float, answered_s: float = 0.0) -> None:
        self.taken_s, self.answered_s, self.is_cancelled = taken_s, answered_s, False

    def cancel(self) -> None:
        self.is_cancelled = True

    async def _fetch_future_result_async(self) -> None:
        await asyncio.sleep(self.taken_s)

    async def _answer(self) -> str:
        await asyncio.sleep(self.answered_s)
        return "image"

    def __await__(self):
        return self._answer().__await__()


class Handle:
    """Hands out one call, and keeps what it was asked for."""

    def __init__(self, call: Call) -> None:
        self.call, self.asked = call, []
        self.generate = self

    def options(self, **_: object) -> "Handle":
        return self

    def remote(self, request: EngineRequest) -> Call:
        self.asked.append(request)
        return self.call


def generate(call: Call, **bounds: float) -> tuple[Handle, object]:
    handle = Handle(call)
    return handle, asyncio.run(RemoteEngine(handle, **bounds).generate(REQUEST))


def test_a_request_that_no_replica_takes_is_given_up():
    call = Call(taken_s=600)
    with pytest.raises(TimedOut):
        generate(call, timeout_s=60)
    assert call.is_cancelled


def test_a_trajectory_that_has_started_has_its_own_time():
    handle, image = generate(Call(0.0, answered_s=0.2), timeout_s=60, work_s=60)
    assert image == "image" and not handle.call.is_cancelled
    (asked,) = handle.asked
    assert 0 < asked.timeout_s <= REQUEST.timeout_s, "what is left of it"
    call = Call(0.0, answered_s=600)
    with pytest.raises(TimedOut):
        generate(call, timeout_s=0.05, work_s=0.05)
    assert call.is_cancelled


def test_a_request_that_serve_refuses_is_told_how_long_an_image_takes():
    class Refused(Call):
        async def _fetch_future_result_async(self) -> None:
            raise BackPressureError(num_queued_requests=9, max_queued_requests=8)

    async def run() -> list[int]:
        handle = Handle(Refused(0.0))
        engine, told = RemoteEngine(handle, work_s=60), []
        for _ in range(2):
            with pytest.raises(Overloaded) as refused:
                await engine.generate(REQUEST)
            told.append(refused.value.retry_after_s)
            handle.call = Call(0.0, answered_s=1.1)
            await engine.generate(REQUEST)
            handle.call = Refused(0.0)
        return told

    assert asyncio.run(run()) == [1, 2]


def test_the_time_is_that_of_all_calls_for_a_request():
    async def run() -> None:
        deadline = Deadline(0.05)
        assert 0 < deadline.left_s <= 0.05
        await asyncio.sleep(0.1)
        with pytest.raises(TimedOut):
            _ = deadline.left_s
        assert Deadline().left_s is None

    asyncio.run(run())
