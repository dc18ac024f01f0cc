"""A process that begins as a worker of Ray, or as a command of ours, has itself forked (fork_server.py).

It goes on as a small process that passes signals on, ends as the fork does, and takes the fork with it when
it is killed. Where the server declines or cannot be reached, it becomes what it was started for.

No import here is large: every process that tests with clusters start runs this module.
"""

import json
import os
import re
import signal
import socket
import sys
from types import FrameType
from typing import Any

ADDRESS = "HARMONICA_TEST_FORKS"
"""The environment variable with the path of the server's socket."""
ACCEPTED = b"+"
DECLINED = b"-"
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_RAY = "ray/_private/workers"
_SETUP = f"{_RAY}/setup_worker.py"
_SCRIPTS = (f"{_RAY}/default_worker.py", _SETUP, "/workflow.py")
_MODULES = ("pipelines.serve",)


def is_known(argv: list[str]) -> bool:
    """Return whether this command line starts a worker, the workflow or the endpoint."""
    runs = _run_by(argv)
    return bool(runs) and (runs[0].endswith(_SCRIPTS) or (runs[0] == "-m" and runs[1] in _MODULES))


def _run_by(argv: list[str]) -> list[str]:
    """The arguments from the script or from `-m MODULE` on."""
    for position, argument in enumerate(argv[1:], 1):
        if argument == "-m" or not argument.startswith("-"):
            return argv[position:]
    return []


def fork_of(pid: int) -> int | None:
    """The process that runs in place of this one; None where it runs itself."""
    try:
        with open(os.path.join(os.path.dirname(os.environ[ADDRESS]), str(pid))) as file:
            return int(file.read())
    except (KeyError, OSError, ValueError):
        return None


def hand_over(address: str) -> None:
    """Have this process forked, and end as the fork does; return if it has to go on itself."""
    if (asked := request(sys.orig_argv)) is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        before = {number: signal.getsignal(number) for number in _PASSED_ON}

        def pass_on(number: int, _: FrameType | None) -> None:
            server.send(bytes([number]))

        try:
            server.connect(address)
            _send(server, asked)
            for number in _PASSED_ON:
                if before[number] != signal.SIG_IGN:
                    signal.signal(number, pass_on)
            answer = server.recv(1)
        except OSError:
            answer = DECLINED
        if answer != ACCEPTED:
            for number in _PASSED_ON:
                signal.signal(number, before[number])
            return
        ended = server.recv(2)
    killed_by, status = ended if len(ended) == 2 else (0, 1)
    if killed_by:
        if killed_by != signal.SIGKILL:
            signal.signal(killed_by, signal.SIG_DFL)
        os.kill(os.getpid(), killed_by)
    os._exit(status)


def request(argv: list[str]) -> dict[str, Any] | None:
    """What the fork needs to be this process; None if its runtime environment wants more than variables."""
    environment, runs = dict(os.environ), _run_by(argv)
    if runs[0].endswith(_SETUP):
        # It would import Ray, set the variables and start Python once more with the arguments after its own.
        values = dict(argument.partition("=")[::2] for argument in runs if argument.startswith("--"))
        context = json.loads(values.get("--serialized-runtime-env-context", "{}"))
        for name, value in context.pop("env_vars", {}).items():
            environment[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
        if context.pop("py_executable", sys.executable) != sys.executable or any(context.values()):
            return None
        own = ("--serialized-runtime-env-context=", "--language=")
        runs = [argument for argument in runs[1:] if not argument.startswith(own)]
    return {
        "runs": runs,
        "path": sys.path,
        "prefix": sys.prefix,
        "environment": environment,
        "folder": os.getcwd(),
        "ignored": [number for number in _PASSED_ON if signal.getsignal(number) == signal.SIG_IGN],
    }


def _send(server: socket.socket, asked: dict[str, Any]) -> None:
    """Send the length in eight bytes, with the three standard streams, and then the request."""
    data = json.dumps(asked).encode()
    socket.send_fds(server, [len(data).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(data)
