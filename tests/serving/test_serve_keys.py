"""`python -m pipelines.serve` with keys, start to finish: by the environment, and then by a file."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import httpx
import openai
import pytest
import ray
from PIL import Image
from tiny_dit import make_artifact, write_model

from pipelines import serve
from pipelines.config.serve import ServeConfig
from pipelines.serving import lifecycle
from pipelines.serving.auth import ENVIRONMENT
from pipelines.serving.client import first_image
from tests.serving.test_serve import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
PATH = "/v1/images/generations"
OURS, OTHER, FILED = "key-of-the-environment", "another-of-its-keys", "key-of-the-file"


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def check_closed(url, good, bad):
    """What keys protect is closed, however they are sent, and what they do not is open."""
    with httpx.Client(base_url=url, timeout=60, follow_redirects=False) as client:
        for path in ("/", "/livez", "/readyz", "/health", "/healthz", "/healthz/", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b""), path
        for headers in ({}, bearer(bad), {"Authorization": good}, {"Authorization": f"Basic {good}"}):
            for answer in (
                client.get("/v1/models", headers=headers),
                client.get("/v1/models", headers=headers, params={"key": good, "api_key": good}),
                client.post(PATH, headers=headers, json={"prompt": "Bag"}),
                client.post(PATH, headers=headers, json={"prompt": "Bag", "stream": True}),
            ):
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key" and good not in answer.text
        assert client.get("/v1/models", headers={"AUTHORIZATION": f"BEARER {good}"}).status_code == 200
        for name in ("x" * 300, '"<>'):
            assert len(client.get("/livez", headers={"X-Request-Id": name}).headers["x-request-id"]) == 32
    api = openai.OpenAI(api_key=good, base_url=f"{url}/v1", max_retries=0)
    *previews, completed = api.images.generate(prompt="Bag", stream=True, partial_images=2)
    assert len(previews) == 2 and completed.b64_json


def check_half_sent(port):
    """A body that does not come is answered, through Serve's proxy, and the connection closed."""
    lines = (f"POST {PATH} HTTP/1.1", "Host: test", f"Authorization: Bearer {OURS}", "Content-Length: 99")
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(("\r\n".join(lines) + '\r\n\r\n{"prompt"').encode())
        answer = b""
        while received := connection.recv(4096):
            answer += received
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer


def use(port, said, is_over, folder, model, router):
    """What a user does with the endpoint that `said` announces."""
    while "Ctrl-C stops it" not in said.getvalue():
        assert not is_over.wait(0.1), "it ended by itself"
    url = f"http://127.0.0.1:{port}"
    assert OURS not in said.getvalue() and OTHER not in said.getvalue()
    check_closed(url, OURS, "wrong")
    assert httpx.get(f"{url}/v1/models", headers=bearer(OTHER)).status_code == 200
    curl = said.getvalue().split("\n\n")[1]
    environment = os.environ | {"HARMONICA_API_KEY": OTHER}
    subprocess.run(curl, shell=True, check=True, cwd=folder, env=environment, timeout=60)
    assert Image.open(folder / "image.png").size == (28, 28)
    check_half_sent(port)
    assert first_image(url, "Bag", seed=1)["seed"] == 1

    file = folder / "keys.txt"
    file.write_text(f"{FILED}\n")
    config = ServeConfig(port=port, api_keys_file=str(file))
    assert lifecycle.deploy(config, model, registered_model="tiny", router=router) == url
    while httpx.get(f"{url}/v1/models", headers=bearer(FILED), timeout=60).status_code != 200:
        time.sleep(0.2)  # the last of the replicas before
    check_closed(url, FILED, OURS)
    assert first_image(url, "Bag", seed=1, api_keys_file=str(file))["seed"] == 1


def test_an_endpoint_with_keys_starts_and_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, f"{OURS},{OTHER}")
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    model, port, said, used = write_model(tmp_path / "model"), free_port(), io.StringIO(), Future()
    router = str(make_artifact(model).save(tmp_path / "router"))
    is_over, logs = threading.Event(), []

    def work():
        try:
            used.set_result(use(port, said, is_over, tmp_path, model, router))
            logs.append(Path(ray._private.worker._global_node.get_logs_dir_path()))
        except BaseException as error:
            used.set_exception(error)
        if not is_over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=work)
    arguments = [f"--serve.port={port}", "--serve.read-timeout-s=2", f"--model.path={model.path}"]
    try:
        thread.start()
        with contextlib.redirect_stdout(said):
            assert serve.main([*arguments, f"--router={router}", "--registered-model=tiny"]) == 0
    finally:
        is_over.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ray.shutdown()
    thread.join()
    used.result()
    files = [file for file in logs[0].rglob("*") if file.is_file()]
    assert len(files) > 10 and [file for file in files if _holds_a_key(file)] == []


def _holds_a_key(file):
    content = file.read_bytes()
    return any(key.encode() in content for key in (OURS, OTHER, FILED))
