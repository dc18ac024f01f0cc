"""How long an endpoint that is stopped waits for its requests, and what its clients read meanwhile."""

import asyncio
import threading
from types import SimpleNamespace

import httpx
import pytest
from ray.serve._private.constants import RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS as IS_FORCED
from ray.serve._private.proxy import HTTPProxy
from starlette.responses import PlainTextResponse

from pipelines.config.serve import ServeConfig
from pipelines.serving import lifecycle
from pipelines.serving.application import make_application, stop_bound_s
from pipelines.serving.first_description import describe_while_wanted
from pipelines.serving.proxy import RetryLost
from pipelines.serving.serve_args import ServeArgs

CONFIG = ServeConfig(timeout_s=100, stall_timeout_s=50)


def test_each_replica_has_the_time_that_an_accepted_image_may_take():
    api = make_application(ServeArgs(serve=CONFIG, router="x", follow_s=1), {})._bound_deployment
    (sampler,) = api.init_args or api.init_kwargs.values()
    waits = [each._deployment_config.graceful_shutdown_timeout_s for each in (sampler._bound_deployment, api)]
    assert 150 < waits[0] <= waits[1] == stop_bound_s(CONFIG)


class Serve:
    """Takes `polls` questions to delete the application, or never does."""

    def __init__(self, polls: int) -> None:
        self.polls, self.calls = polls, []

    def status(self):
        self.polls -= 1
        return SimpleNamespace(applications={lifecycle.APP_NAME: "DELETING"} if self.polls >= 0 else {})

    def delete(self, name, _blocking=True):
        self.calls.append(("delete", name, _blocking))

    def shutdown(self):
        assert self.polls < 0, "the application is still there"
        self.calls.append("shutdown")


@pytest.fixture
def end_with(monkeypatch):
    before, asked = set(threading.enumerate()), []

    def end(serve: Serve, **options) -> list:
        asked.append(serve)
        monkeypatch.setattr(lifecycle, "serve", serve)
        monkeypatch.setattr(lifecycle, "_POLL_S", 0.001)
        monkeypatch.setattr(lifecycle, "_ENDING_S", 0)
        lifecycle.shutdown(CONFIG, **options)
        return list(serve.calls)

    yield end
    for serve in asked:
        serve.polls = 0
    for thread in set(threading.enumerate()) - before:
        thread.join(60)  # else it went on with Serve itself, which ends the process where there is no cluster
        assert not thread.is_alive()


def test_serve_is_shut_down_once_the_application_is_gone(end_with):
    """Serve's own wait for a deletion gives up after 60 s, with an error."""
    assert end_with(Serve(20)) == [("delete", "harmonica", False), "shutdown"]


def test_who_is_in_a_hurry_waits_for_no_request(end_with):
    assert "shutdown" not in end_with(Serve(10**9), is_hurried=lambda: True)


def test_an_endpoint_that_does_not_stop_is_named(end_with, monkeypatch):
    monkeypatch.setattr(lifecycle, "_STOP_SLACK_S", -stop_bound_s(CONFIG))
    with pytest.raises(RuntimeError, match=r"within 0 s.*serve\.timeout_s.*`serve shutdown`"):
        end_with(Serve(10**9))


def test_a_replica_that_is_not_well_is_not_given_that_time():
    """Else one that hangs kept its place for it; the name is one that Serve reads."""
    assert IS_FORCED is False
    assert lifecycle.SERVE_ENVIRONMENT["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] == "1"


async def ask(app) -> httpx.Response:
    transport = httpx.ASGITransport(RetryLost(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/images/generations", content=b"{}")


def test_where_the_application_is_gone_the_answer_is_503_in_openai_s_shape():
    """A replica that is killed while it stops loses its request, and there is no other to ask."""
    asked = []

    async def without_application(scope, receive, send):
        asked.append(scope)
        if len(asked) == 1:
            await PlainTextResponse("Internal Server Error", 500)(scope, receive, send)
            return
        async for message in HTTPProxy.not_found_response(None, SimpleNamespace(path=scope["path"])):
            if isinstance(message, dict):
                await send(message)

    answer = asyncio.run(ask(without_application))
    assert (answer.status_code, answer.headers["retry-after"], len(asked)) == (503, "1", 2)
    assert answer.json()["error"]["code"] == "unavailable"


def test_a_404_of_another_application_is_passed_on():
    answer = asyncio.run(ask(PlainTextResponse("no such page", 404)))
    assert (answer.status_code, answer.text) == (404, "no such page")


def test_a_replica_that_waits_for_models_starts_no_longer_than_it_is_wanted():
    async def never():
        await asyncio.Event().wait()

    async def late():
        await asyncio.sleep(0.02)
        return "card"

    async def run():
        wanted = [True, True, False]
        with pytest.raises(RuntimeError, match="being deleted"):
            await asyncio.wait_for(describe_while_wanted(never, lambda: wanted.pop(0), 0.001), 20)
        assert await describe_while_wanted(late, lambda: True, 0.001) == "card"

    asyncio.run(run())
