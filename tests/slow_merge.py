"""A merge in a process of its own that waits at a chosen moment, for tests that interrupt or kill it there."""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable

from rwkv_lab import merge
from rwkv_lab.checkpoint import stream
from rwkv_lab.merge import writing

PAUSE = 0.02  # seconds that each block takes to be written
MOMENTS = ("planned", "first block", "half written", "synced", "named", "linked", "published")

context = multiprocessing.get_context("forkserver")


def start(moment: str, arguments: dict, limit: int | None = None):
    """(process, pipe): the pipe says "here" when the moment has come, and at the end the error's class or "done"."""
    # Processes of the fork server have imported what a merge needs, torch foremost, where one has run here.
    ours = ("rwkv_lab.merge", "rwkv_lab.checkpoint")
    context.set_forkserver_preload(["torch", *(name for name in sorted(sys.modules) if name.startswith(ours))])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(moment, arguments, limit, there))
    process.start()
    there.close()
    return process, here


def _run(moment: str, arguments: dict, limit: int | None, pipe) -> None:
    sys.stderr = open(os.devnull, "w")  # the traceback of an interrupt is expected
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with it ignored
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _wait_at(moment, lambda: pipe.send("here"))
    try:
        merge(**arguments)
    except Exception as e:
        pipe.send(f"{type(e).__name__}: {e}")
        raise
    pipe.send("done")


def _wait_at(moment: str, arrived: Callable[[], None]) -> None:
    def halt(real, *args, after: bool = False, **given):
        result = real(*args, **given) if after else None
        arrived()
        time.sleep(60)
        return result if after else real(*args, **given)

    written = [0]
    write = stream._write

    def slow_write(*args):
        written[0] += 1
        if written[0] == {"first block": 1, "half written": 35, "never": 1}.get(moment):
            arrived()
        time.sleep(PAUSE)
        write(*args)

    if moment in ("first block", "half written", "never"):
        stream._write = slow_write
    places = {
        "planned": [(writing, "write_stream", False)],
        "synced": [(os, "fsync", False)],
        "named": [(os, "link", False), (os, "replace", False)],
        "linked": [(os, "link", True), (os, "replace", True)],
        "published": [(writing, "describe_output", False)],
    }
    for module, name, after in places.get(moment, []):
        real = getattr(module, name)
        setattr(module, name, lambda *a, real=real, after=after, **k: halt(real, *a, after=after, **k))
