"""A job that a panel started: it runs in a thread, so that the kernel takes clicks meanwhile, Stop among them.

What holds for a cell holds for a job: the kernel says that it is busy, Interrupt ends it, and cells that a person runs
wait for its end. One job at a time. Without a kernel, in plain Python, a job runs where it is started.
"""

import asyncio
import ctypes
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import psutil
from IPython.core.getipython import get_ipython

from rwkv_lab.progress import Watcher, watching

_EVERY = 0.25  # seconds between two looks at a job

_current: "Job | None" = None
_waiting = 0  # cells that wait for the end of the job
_held = False  # whether cells of this kernel wait for jobs


class Job:
    """Work that may take minutes.

    Args:
        work: runs in the thread, with the context of the click, so that it is known as a front end's.
        look: called in the main thread, a few times per second while the work runs.
        ended: called in the main thread with what the work raised, None where it ended well, KeyboardInterrupt where it
            was stopped.
    """

    def __init__(
        self, work: Callable[[], object], look: Callable[[], None], ended: Callable[[BaseException | None], None]
    ):
        self.watcher, self.error = Watcher(), None
        self.interrupted = False  # by the kernel's Interrupt, which is meant for cells that wait, too
        self._work, self._look, self._ended = work, look, ended
        self._thread: threading.Thread | None = None
        self._over, self._lock = False, threading.RLock()  # a signal may come while this thread holds it
        self._raises = False  # stopped by an exception; `watcher.stopped` may be set alone, for a gentle end
        self._others: set[int] = set()  # processes that are not the job's

    def start(self) -> bool:
        """Begin, or, in a kernel, as soon as the cell that runs now has ended; False where another job is at work."""
        global _current
        if _current is not None:
            return False
        _current = self
        kernel = getattr(get_ipython(), "kernel", None)
        if kernel is None:
            self._run()
            self._end()
        else:
            _hold_cells(kernel)
            kernel.io_loop.add_callback(self._attend, kernel)
        return True

    def stop(self) -> None:
        """End the work by KeyboardInterrupt, and programs that it started by SIGINT. A second call does nothing."""
        with self._lock:
            if self._over or self.watcher.stopped:
                return
            self.watcher.stopped = self._raises = True
            if self._thread is not None and self._thread.ident is not None:
                _raise_in(self._thread.ident, KeyboardInterrupt)
        for child in psutil.Process().children() if self._thread is not None else ():
            if child.pid not in self._others:
                os.kill(child.pid, signal.SIGINT)

    def _stop_again(self) -> None:
        """Raise KeyboardInterrupt once more where it was lost: Python ignores what is raised in callbacks."""
        with self._lock:
            ident = self._thread.ident if self._thread is not None else None
            if self._raises and not self._over and ident is not None and not _unwinds(ident):
                _raise_in(ident, KeyboardInterrupt)

    def _run(self) -> None:
        try:
            try:
                with watching(self.watcher):
                    self._work()
            except BaseException as e:
                self.error = e
            with self._lock:
                self._over = True
                _raise_in(threading.get_ident(), None)  # too late
        except KeyboardInterrupt as e:  # between the work's end and here
            self.error = self.error or e

    async def _attend(self, kernel: Any) -> None:
        parent = kernel.get_parent()
        if not self.watcher.stopped:
            self._others = {child.pid for child in psutil.Process().children()}
            self._thread = threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)
            self._thread.start()
        try:
            while self._thread is not None and self._thread.is_alive():
                _take_interrupts()
                self._stop_again()
                _say(kernel, "busy", parent)  # again and again: every message that is handled ends with "idle"
                self._look()
                await asyncio.sleep(_EVERY)
        finally:
            self._end()
            if not _waiting:
                _say(kernel, "idle", parent)

    def _end(self) -> None:
        global _current
        _current = None
        if not self._over and self.error is None:  # stopped before its first line
            self.error = KeyboardInterrupt()
        self._ended(self.error)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Have a thread raise an exception, as soon as it executes Python; None takes one back that it has not raised."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None)


def _unwinds(thread: int) -> bool:
    """Whether a thread handles a KeyboardInterrupt, so that another would cut short what it cleans up."""
    found: Any = sys._current_exceptions().get(thread)
    error = found[1] if isinstance(found, tuple) else found  # a tuple before Python 3.12
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _say(kernel: Any, status: str, parent: Any) -> None:
    kernel.session.send(kernel.iopub_socket, "status", {"execution_state": status}, parent=parent, ident=b"status")


def _interrupt(number: int, frame: object) -> None:
    """The handler of SIGINT; where no job is at work it does nothing, as ipykernel between two messages."""
    job = _current
    if job is not None:
        job.interrupted = True
        job.stop()


def _take_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # ipykernel's between two messages
        signal.signal(signal.SIGINT, _interrupt)


def _hold_cells(kernel: Any) -> None:
    """From now on cells of this kernel wait until the job has ended; of one that was interrupted they raise."""
    global _held
    if _held:
        return
    _held, execute = True, kernel.shell_handlers["execute_request"]

    async def execute_request(stream: Any, ident: Any, parent: Any) -> None:
        if _current is not None and await _interrupted(_current):
            parent["content"]["code"] = (
                "raise KeyboardInterrupt('with the job of the panel, whose end this waited for')"
            )
        result = execute(stream, ident, parent)
        if inspect.isawaitable(result):
            await result

    kernel.shell_handlers["execute_request"] = execute_request


async def _interrupted(job: Job) -> bool:
    """Wait for the end of a job; whether Interrupt ended it."""
    global _waiting
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, _interrupt) if in_main else None
    _waiting += 1
    try:
        while _current is job:
            await asyncio.sleep(_EVERY / 2)
    finally:
        _waiting -= 1
        if in_main:
            signal.signal(signal.SIGINT, before)
    return job.interrupted
