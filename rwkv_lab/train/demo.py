"""The demo model and its tuned state: what `demo:base` and `demo:state` stand for in a notebook's parameters.

Both are trained on the machine that needs them, from text that Python brings along, and kept.
"""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rwkv_lab.train.demo_paths import demo_file, demo_folder
from rwkv_lab.train.trainer import train

log = logging.getLogger(__name__)


def demo_base() -> Path:
    """Path of the demo model, RWKV-7 on bytes, pretrained on English; trained now if it is not there."""
    base = demo_file("base")
    if not base.exists():
        with _alone("the demo model"):
            if not base.exists():  # another process may have trained it while this one waited
                train("pretrain", out=base)
    return base


def demo_state() -> Path:
    """Path of the demo model's state, tuned on Python code; both are trained now if they are not there."""
    base, state = demo_base(), demo_file("state")
    if not state.exists():
        with _alone("the demo model's tuned state"):
            if not state.exists():
                train("state", out=state, base=base)
    return state


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """Let one process at a time train a demo file; the lock goes when its process does."""
    folder = demo_folder()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(folder / ".lock", "w") as lock:
        log.warning("Training %s in %s, once; the time left is stated from its first steps on.", what, folder)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    log.warning("%s is ready after %.0f s.", what[:1].upper() + what[1:], time.perf_counter() - start)
