"""Ray's workers as forks of one process (tests/support/forks)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fork_client
import psutil
import pytest
import ray
from cluster_runs import until
from fork_client import fork_of

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
SCRIPT = Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"


@pytest.fixture(autouse=True)
def with_forks(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--no-forks") or sys.platform != "linux":
        pytest.skip("there are no forks")


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self) -> None:
        self.imported = {
            name for name in ("torch", "harmonica", "pipelines", "ray.train") if name in sys.modules
        }

    def seen(self) -> dict[str, object]:
        """What a fork could have wrong."""
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "group": os.getpgid(0),
            "session": os.getsid(0),
            "imported": self.imported,
            "told": os.environ.get("TOLD"),
            "folder": os.getcwd(),
            "path": sys.path,
            "main": vars(sys.modules["__main__"])["__file__"],
        }


def _child(name: str) -> psutil.Process:
    """The process of this name that the tests themselves have started."""
    return next(one for one in psutil.Process().children() if any(name in word for word in one.cmdline()))


def test_a_fork_is_what_ray_would_have_started(private_cluster: None) -> None:
    plain = Worker.remote()
    told = Worker.options(runtime_env={"env_vars": {"TOLD": "${HOME}/x${NOT_THERE}"}}).remote()
    first, second = ray.get([plain.seen.remote(), told.seen.remote()])
    for seen in (first, second):
        assert seen["parent"] == _child("fork_server.py").pid
        assert seen["group"] == seen["pid"], "Ray kills a worker's group with it"
        assert seen["session"] == os.getsid(seen["parent"]), "Linux shares cores among sessions first"
        assert seen["imported"] <= {"torch", "harmonica"}, "what is tested is imported by each worker itself"
        assert "torch" in seen["imported"]
        assert seen["main"].endswith("default_worker.py")
        assert seen["folder"] == os.getcwd()
    assert first["told"] is None
    assert second["told"] == f"{os.environ['HOME']}/x"
    assert {str(ROOT), str(SCRIPT.parent)} <= set(first["path"])
    ray.kill(plain)
    ray.kill(told)
    until("both have ended", lambda: not any(psutil.pid_exists(seen["pid"]) for seen in (first, second)))


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--no-such-thing", 2)])
def test_output_and_exit_status_are_the_fork_s(argument: str, status: int, private_cluster: None) -> None:
    done = subprocess.run([sys.executable, SCRIPT, argument], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "default_worker.py [-h]" in done.stdout + done.stderr


def test_a_fork_ends_with_the_process_in_whose_place_it_is(private_cluster: None) -> None:
    worker = Worker.remote()
    fork = ray.get(worker.seen.remote())["pid"]
    clients = [one.pid for one in _child("raylet/raylet").children()]
    client = next(pid for pid in clients if fork_of(pid) == fork)
    os.kill(client, signal.SIGKILL)
    until("the fork has ended", lambda: not psutil.pid_exists(fork))
    assert fork_of(client) is None


def test_only_variables_are_set_up_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE", "/b")

    def asked(context: dict[str, object]) -> dict[str, Any] | None:
        own = ["--language=PYTHON", f"--serialized-runtime-env-context={json.dumps(context)}"]
        argv = ["python", "-u", str(SCRIPT.with_name("setup_worker.py")), str(SCRIPT), "--node-id=1", *own]
        assert fork_client.is_known(argv)
        return fork_client.request(argv)

    known = {"py_executable": sys.executable, "command_prefix": [], "override_worker_entrypoint": None}
    plain = asked(known | {"env_vars": {"TOLD": "${BASE}/x${NOT_THERE}"}})
    assert plain is not None
    assert plain["runs"] == [str(SCRIPT), "--node-id=1"]
    assert plain["environment"]["TOLD"] == "/b/x"
    assert asked(known | {"command_prefix": ["nice"]}) is None
    assert asked(known | {"py_executable": "/usr/bin/python3"}) is None


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["-u", str(SCRIPT)], True),
        (["workflow.py", "fashion"], False),  # some other's
        ([str(ROOT / "workflow.py"), "fashion"], True),
        (["-W", "ignore", "-m", "pipelines.serve"], False),
        (["-m", "pipelines.serve", "--serve.port=1"], True),
        (["-m", "pytest", str(SCRIPT)], False),
        (["-c", "pass"], False),
        ([], False),
    ],
)
def test_what_is_forked(arguments: list[str], known: bool) -> None:
    assert fork_client.is_known(["python", *arguments]) == known
