"""What a job prints and displays, in widgets.

The kernel keeps their contents, so a page that is loaded again shows them, and they do not depend on which message a
thread answers to, as what goes through an Output's context does.
"""

import io
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import ipywidgets as widgets
from IPython.core.getipython import get_ipython


class JobOutput:
    """One widget for each display, and for each text between two displays; `box` shows them."""

    def __init__(self):
        self.box = widgets.VBox()
        self._displays: dict[str, widgets.Output] = {}  # by display id
        self._lock = threading.Lock()  # a job's threads may print

    def clear(self) -> None:
        """Show nothing."""
        gone, self.box.children = self.box.children, ()
        self._displays.clear()
        for widget in gone:
            widget.close()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Take what this thread displays, and what the process prints and logs."""
        out, err = _Text(self, "stdout", sys.stdout), _Text(self, "stderr", sys.stderr)
        publisher: Any = getattr(get_ipython(), "display_pub", None)
        with ExitStack() as stack:
            for handler in logging.getLogger("rwkv_lab").handlers:
                if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                    stack.callback(handler.setStream, handler.stream)
                    handler.setStream(out)
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
            if hasattr(publisher, "register_hook"):  # ipykernel's; its hooks belong to a thread
                publisher.register_hook(self._display)
                stack.callback(publisher.unregister_hook, self._display)
            stack.callback(err.flush)
            stack.callback(out.flush)
            yield

    def write(self, text: str, stream: str) -> None:
        """Add to the text at the end."""
        with self._lock:
            last = self.box.children[-1].outputs if self.box.children else ()
            if last and last[0].get("name") == stream:
                self.box.children[-1].outputs = ({**last[0], "text": last[0]["text"] + text},)
            else:
                self._append({"output_type": "stream", "name": stream, "text": text})

    def show_error(self, error: BaseException) -> None:
        """Add an error that is no refusal, with its traceback."""
        lines = "".join(traceback.format_exception(error)).splitlines()
        content = {"ename": type(error).__name__, "evalue": str(error), "traceback": lines}
        self._append({"output_type": "error", **content})

    def _append(self, output: dict) -> widgets.Output:
        widget = widgets.Output(outputs=(output,))
        self.box.children = (*self.box.children, widget)
        return widget

    def _display(self, message: dict) -> dict | None:
        """ipykernel's hook: takes a message, or returns it to be sent as ever."""
        kind, content = message["msg_type"], message["content"]
        if kind == "clear_output":
            self.clear()
            return None
        name = content.get("transient", {}).get("display_id")
        output = {"output_type": "display_data", "data": content["data"], "metadata": content["metadata"]}
        if kind == "update_display_data":
            if name not in self._displays:
                return message
            self._displays[name].outputs = (output,)
            return None
        with self._lock:
            widget = self._append(output)
        if name:
            self._displays[name] = widget
        return None


class _Text(io.TextIOBase):
    """A stream into a JobOutput, a line at a time, in the place of another."""

    def __init__(self, output: JobOutput, name: str, replaced: Any):
        self._output, self._name, self._begun, self._replaced = output, name, "", replaced
        # Those of the kernel, which take messages while a job runs.
        self._others = set(threading.enumerate()) - {threading.current_thread()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replaced, name)  # the kernel tells sys.stdout of cells that wait for the job

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if threading.current_thread() in self._others:
            return self._replaced.write(text)
        whole, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._output.write(whole + newline, self._name)
        return len(text)

    def flush(self) -> None:
        text, self._begun = self._begun, ""
        if text:
            self._output.write(text, self._name)
