"""A process that Ray has started as a worker lets the server fork in its place (fork_server.py).

It goes on as a small process that ends with the fork, passes SIGTERM on, and takes the fork with it when it
is killed. Where the server declines or cannot be reached, it becomes the worker itself.

No import here is large: every process that tests with clusters start runs this module.
"""

import json
import os
import re
import signal
import socket
import sys
from typing import Any

ADDRESS = "HARMONICA_TEST_FORKS"
"""The environment variable with the path of the server's socket."""
TERMINATE = b"T"
ACCEPTED = b"+"
DECLINED = b"-"
_WORKERS = "ray/_private/workers/"


def is_worker(argv: list[str]) -> bool:
    """Return whether Ray starts a worker by this command line, with or without its own step of setting up."""
    script = argv[_script(argv)]
    return script.endswith((f"{_WORKERS}default_worker.py", f"{_WORKERS}setup_worker.py"))


def _script(argv: list[str]) -> int:
    """The position of what Python runs: its first argument that is no option, or else the program."""
    return next((i for i, argument in enumerate(argv) if i and not argument.startswith("-")), 0)


def fork_of(pid: int) -> int | None:
    """The process that runs in place of this one; None where it runs itself."""
    try:
        with open(os.path.join(os.path.dirname(os.environ[ADDRESS]), str(pid))) as file:
            return int(file.read())
    except (KeyError, OSError, ValueError):
        return None


def hand_over(address: str) -> None:
    """Have this worker forked, and exit as it does; return if it has to be started here."""
    if (asked := request(sys.orig_argv)) is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(address)
            _send(server, asked)
            signal.signal(signal.SIGTERM, lambda *_: server.send(TERMINATE))
            answer = server.recv(1)
        except OSError:
            answer = DECLINED
        if answer != ACCEPTED:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return
        status = server.recv(1)
    os._exit(status[0] if status else 1)


def request(argv: list[str]) -> dict[str, Any] | None:
    """What the fork needs to be this process; None if its runtime environment wants more than variables."""
    environment = dict(os.environ)
    script = _script(argv)
    if argv[script].endswith("setup_worker.py"):
        # It would import Ray, set the variables and start Python once more with the arguments after its own.
        values = dict(argument.partition("=")[::2] for argument in argv[script + 1 :] if argument[:2] == "--")
        context = json.loads(values.get("--serialized-runtime-env-context", "{}"))
        for name, value in context.pop("env_vars", {}).items():
            environment[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
        if context.pop("py_executable", sys.executable) != sys.executable or any(context.values()):
            return None
        own = ("--serialized-runtime-env-context=", "--language=")
        argv = [*argv[:script], *(a for a in argv[script + 1 :] if not a.startswith(own))]
    return {
        "argv": argv[script:],
        "path": sys.path,
        "prefix": sys.prefix,
        "environment": environment,
        "folder": os.getcwd(),
        "ignores_interrupts": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    }


def _send(server: socket.socket, asked: dict[str, Any]) -> None:
    """Send the length in eight bytes, with the three standard streams, and then the request."""
    data = json.dumps(asked).encode()
    socket.send_fds(server, [len(data).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(data)
