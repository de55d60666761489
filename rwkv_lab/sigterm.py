"""SIGTERM, by which schedulers end a process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_cleans_up() -> Iterator[None]:
    """End with exit code 143 on SIGTERM, as Ctrl-C ends: temporary files are removed, children stopped.

    Does nothing outside the main thread, which alone is told of signals.
    """

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would come in the middle of cleaning up
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
