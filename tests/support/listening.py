"""Where the processes that a test has started listen, looked at again and again while they run."""

import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
from fork_client import fork_of

_EVERY_S = 2.0
Listeners = dict[bool, set[tuple[str, str]]]
"""(Process, address) of servers, by whether the address is a loopback address."""


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _look(found: Listeners) -> None:
    mine = psutil.Process()
    started = [mine.pid, *(process.pid for process in mine.children(recursive=True))]
    ours = {*started, *(fork for pid in started if (fork := fork_of(pid)))}
    # All at once: the kernel's table of sockets is read again for each process that is asked.
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid not in ours:
            continue
        with suppress(psutil.Error):  # it has ended meanwhile
            process, address = psutil.Process(connection.pid), connection.laddr.ip
            words = process.cmdline() or [process.name()]
            name = next((word for word in words if word.startswith("ray::")), process.name())
            found[_is_loopback(address)].add((name.partition(".")[0], address))


@contextmanager
def listeners() -> Iterator[Listeners]:
    """What listens in this process and those that it has started; complete once the context ends."""
    found: Listeners = {True: set(), False: set()}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY_S):
            _look(found)

    # Servers live for longer.
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
