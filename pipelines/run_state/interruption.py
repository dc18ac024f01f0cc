"""End a run early, by a signal or from another thread."""

import signal
import threading


class Terminated(KeyboardInterrupt):
    """Raised when SIGTERM is received; it ends a run as Ctrl-C does.

    `ray job stop` and Kubernetes send it.
    """


def _terminate(*_: object) -> None:
    raise Terminated


def raise_at_sigterm() -> None:
    """Raise `Terminated` at SIGTERM.

    Ray's own handler exits with code 15 and no message.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def interrupt_main_thread() -> None:
    """End the main thread as by Ctrl-C, from another thread.

    What it waits for is broken off.
    """
    # A shell's background job ignores SIGINT.
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    number = signal.SIGTERM if is_ignored else signal.SIGINT
    signal.pthread_kill(threading.main_thread().ident or 0, number)
