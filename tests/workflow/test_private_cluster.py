"""What a cluster's processes on this machine are told before it starts, without starting one."""

import contextlib
import itertools
import os
import re
import socket

import local_cluster
import processes
import pytest

from pipelines.runtime import private_cluster


def test_the_dashboard_takes_the_first_free_port_of_those_that_ray_tries(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(private_cluster, "_DASHBOARD_PORTS", range(port, port + 20))
        assert port < private_cluster._dashboard_port() < port + 20
        monkeypatch.setattr(private_cluster, "_DASHBOARD_PORTS", range(port, port + 1))
        with pytest.raises(RuntimeError, match=rf"no port from {port} to {port} is free"):
            private_cluster._dashboard_port()


@pytest.mark.parametrize("before", [None, "http://another:8265"])
def test_its_address_is_told_to_the_cluster_and_not_to_what_starts_later(monkeypatch, before):
    name = private_cluster._DASHBOARD_ADDRESS
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    with pytest.raises(ZeroDivisionError), private_cluster._told_to_workers(name, "http://127.0.0.1:8266"):
        assert os.environ[name] == "http://127.0.0.1:8266"
        _ = 1 // 0
    assert os.environ.get(name) == before


@pytest.fixture
def token(tmp_path, monkeypatch):
    """The path of Ray's token in a new home."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def test_only_its_owner_reads_the_token(token):
    private_cluster.close_token()
    first = token.read_text()
    assert len(first) == 64 and token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o644)  # as Ray makes it
    private_cluster.close_token()
    assert token.read_text() == first and token.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_MODE", "disabled")])
def test_no_token_is_made_where_none_is_read(token, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    private_cluster.close_token()
    assert not token.exists()


def test_a_private_cluster_starts_with_its_token_closed(token, monkeypatch):
    closed = []
    monkeypatch.setattr(private_cluster, "_PRIVATE", {})
    monkeypatch.setattr(private_cluster, "on_loopback", lambda: contextlib.nullcontext("127.0.0.1"))
    monkeypatch.setattr(private_cluster, "_start", lambda *_: closed.append(token.stat().st_mode & 0o777))
    private_cluster.start_private_cluster()
    assert closed == [0o600]


class _Named:
    """A socket that is bound to the next of some ports."""

    def __init__(self, ports):
        self.ports = ports

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def bind(self, address):
        self.address = address[0], next(self.ports)

    def getsockname(self):
        return self.address


class _Node:
    """A node that starts nothing."""

    def __init__(self, arguments, environment, folder):
        self.ports = [int(port) for port in re.findall(r"port=(\d+)", " ".join(arguments))]

    def wait_started(self):
        return True

    def stop(self):
        pass


def test_no_two_ports_of_a_local_cluster_are_the_same(monkeypatch):
    """Seen once: Ray refuses one port for two of a node's servers."""
    named = itertools.chain.from_iterable([port, port] for port in itertools.count(7001))
    monkeypatch.setattr(processes.socket, "socket", _Named(named))
    monkeypatch.setattr(local_cluster, "Node", _Node)
    with local_cluster.LocalCluster(workers=1) as cluster:
        assert [node.ports for node in cluster.nodes] == [[7001, 7002, 7003, 7004], [7005]]
