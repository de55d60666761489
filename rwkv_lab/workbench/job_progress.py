"""What a panel says of a job beside its buttons: how far it is, how fast, the time left, and memory."""

import html
import time

import ipywidgets as widgets

from rwkv_lab.machine import memory_free, memory_of
from rwkv_lab.progress import Watcher, human_bytes, human_seconds

_PATIENCE = 3.0  # seconds that a stopped job may take before it is said what it waits for


class JobProgress:
    """A bar and a line; `box` shows them."""

    def __init__(self):
        self.bar = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="10rem", display="none"))
        self.words = widgets.HTML()
        self.box = widgets.HBox([self.bar, self.words])
        self._start = self._stopped = 0.0

    def begin(self) -> None:
        """A job begins."""
        self._start, self._stopped = time.monotonic(), 0.0
        self.say("begins when the cell that runs now has ended")

    def show(self, stage: str, watcher: Watcher) -> None:
        """Show what is done now.

        Args:
            stage: what is being done, in words; may be empty.
        """
        now, counted = time.monotonic(), watcher.shown
        if watcher.stopped:
            self._stopped = self._stopped or now
            waits = now - self._stopped > _PATIENCE
            self.say("stopping" + (": what is being computed now has to end first" if waits else " …"))
            return
        self.bar.layout.display = None if counted else "none"
        parts = [stage or "working", human_seconds(now - self._start)]
        if counted:
            self.bar.value = counted.share
            parts.append(f"{counted.label} {counted.in_words()}")
        used = memory_of("VmRSS")
        if used:
            parts.append(f"memory {human_bytes(used)} in use, {human_bytes(memory_free())} free")
        self.say(" · ".join(parts))

    def end(self, how: str) -> None:
        """A job has ended; "done after" is followed by its duration."""
        self.bar.layout.display = "none"
        after = f" {human_seconds(time.monotonic() - self._start)}" if how.endswith("after") else ""
        self.say(f"{how}{after}")

    def say(self, words: str) -> None:
        """Show this line."""
        self.words.value = html.escape(words)
