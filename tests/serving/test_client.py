"""The client of the workflow's own requests: which refusals it asks again after, and which it does not."""

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from live_app import running

from pipelines.serving import client
from pipelines.serving.client import first_image


def endpoint(*statuses):
    """An app that answers with these statuses in turn, and says how often it was asked."""
    app, waiting = FastAPI(), list(statuses)
    app.state.asked = 0

    @app.post("/v1/images/generations")
    def generate():
        app.state.asked += 1
        return JSONResponse({"seed": 3}, waiting.pop(0))

    return app


@pytest.mark.parametrize("status", [404, 408, 503])
def test_what_may_pass_is_asked_again(status):
    with running(app := endpoint(status, 200)) as url:
        assert first_image(url.rstrip("/"), "Bag", seed=3) == {"seed": 3}
    assert app.state.asked == 2


@pytest.mark.parametrize("status", [400, 401, 500])
def test_what_is_refused_for_good_is_asked_once(status, monkeypatch):
    monkeypatch.setattr(client, "_READY_TIMEOUT_S", 5.0)
    with (
        running(app := endpoint(status, 200)) as url,
        pytest.raises(RuntimeError, match="gave no image of 'Bag'"),
    ):
        first_image(url.rstrip("/"), "Bag", seed=3)
    assert app.state.asked == 1
