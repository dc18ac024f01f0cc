"""What a private cluster's processes are told before it starts, without starting one."""

import os
import socket

import pytest

from pipelines.runtime import ray_runtime


def test_the_dashboard_takes_the_first_free_port_of_those_that_ray_tries(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ray_runtime, "_DASHBOARD_PORTS", range(port, port + 20))
        assert port < ray_runtime._dashboard_port() < port + 20
        monkeypatch.setattr(ray_runtime, "_DASHBOARD_PORTS", range(port, port + 1))
        with pytest.raises(RuntimeError, match=rf"no port from {port} to {port} is free"):
            ray_runtime._dashboard_port()


@pytest.mark.parametrize("before", [None, "http://another:8265"])
def test_its_address_is_told_to_the_cluster_and_not_to_what_starts_later(monkeypatch, before):
    name = ray_runtime._DASHBOARD_ADDRESS
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    with pytest.raises(ZeroDivisionError), ray_runtime._told_to_workers(name, "http://127.0.0.1:8266"):
        assert os.environ[name] == "http://127.0.0.1:8266"
        _ = 1 // 0
    assert os.environ.get(name) == before
