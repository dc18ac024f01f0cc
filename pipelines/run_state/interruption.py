"""End a run early, by a signal or from another thread."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """Raised when SIGTERM is received; it ends a run as Ctrl-C does.

    `ray job stop` and Kubernetes send it.
    """


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, inside.

    What waits for Ray makes it a plain KeyboardInterrupt, which is `Terminated` again outside.
    """
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise Terminated

    with _handled(terminate):
        try:
            yield
        except KeyboardInterrupt:
            if terminated:
                raise Terminated from None
            raise


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """Leave the handler of SIGTERM as it was, whatever is set inside."""
    with _handled(signal.getsignal(signal.SIGTERM) or signal.SIG_DFL):
        yield


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Handle SIGTERM inside, and as before afterwards.

    In another thread than the main one, which cannot, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt_main_thread() -> None:
    """End the main thread as by Ctrl-C, from another thread.

    What it waits for is broken off.
    """
    # A shell's background job ignores SIGINT.
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    number = signal.SIGTERM if is_ignored else signal.SIGINT
    signal.pthread_kill(threading.main_thread().ident or 0, number)
