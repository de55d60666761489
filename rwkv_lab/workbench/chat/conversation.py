"""A box to write in, for JupyterLab: models answer while one looks on, side by side, until they end or are stopped.

What is written is a job like a panel's: the kernel is busy, and neither a panel nor a cell works meanwhile.
"""

import html
from collections.abc import Callable

import ipywidgets as widgets

from rwkv_lab.analysis.answers import Messages, Speaker
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.workbench.job import Job
from rwkv_lab.workbench.run import Run

_TURN = '<p style="margin: .4em 0; white-space: pre-wrap"><b>{who}</b> {text}</p>'


class Conversation:
    """Send asks every speaker, each with its own conversation so far; as a text where `conversation` is not set."""

    def __init__(self, run: Run, speakers: list[Speaker]):
        self.run, self.speakers = run, speakers
        self.said: dict[str, Messages] = {speaker.name: [] for speaker in speakers}
        self.text = widgets.Textarea(
            placeholder="Write here, then press Send", rows=3, layout=widgets.Layout(width="44rem")
        )
        self.text.add_class("rwkv-lab-prompt")
        self.send = self._button("Send", "have the models answer", self.start, "primary")
        self.stop = self._button("Stop", "end what is being written", self.end)
        self.new = self._button("New", "forget the conversation so far", self.forget)
        self.stop.disabled = True
        self.message = widgets.HTML()
        self.shown = {s.name: widgets.HTML(layout=widgets.Layout(width="22rem", margin="0 1rem 0 0")) for s in speakers}
        self.job: Job | None = None
        self._found: dict[str, list[str]] = {}  # what is being written, by speaker
        buttons = widgets.HBox([self.send, self.stop, self.new])
        self.box = widgets.VBox([self.text, buttons, self.message, widgets.HBox([*self.shown.values()])])
        self._show()

    def start(self) -> None:
        """Ask, so that Stop can be pressed meanwhile."""
        question = self.text.value
        if not question.strip():
            self.message.value = "There is nothing to answer yet."
            return
        self.job = job = Job(lambda: self._ask(question, job), self._show, self._ended)
        self._enable(False)
        self.message.value = "writing …"
        if not job.start():
            self.job = None
            self._enable(True)
            self.message.value = "A panel of this notebook is at work; wait for its end, or stop it."

    def end(self) -> None:
        """End what is being written; what is there stays."""
        if self.job is not None:
            self.job.watcher.stopped = True  # the next token is the last; no exception in the middle of one

    def forget(self) -> None:
        """Begin a new conversation."""
        for messages in self.said.values():
            messages.clear()
        self.message.value = ""
        self._show()

    def _ask(self, question: str, job: Job) -> None:
        for speaker in self.speakers:
            if not job.watcher.stopped:
                self._ask_one(speaker, question, job)

    def _ask_one(self, speaker: Speaker, question: str, job: Job) -> None:
        messages = self.said[speaker.name]
        if not self.run.config.conversation:
            messages.clear()
        messages.append({"role": "user", "content": question})
        found = self._found[speaker.name] = []

        def told(token: int, text: str) -> bool:
            found.append(text)
            return not job.watcher.stopped

        try:
            answer = speaker.answer([*messages] if self.run.config.conversation else question, told)
        except RwkvLabError:
            messages.pop()
            raise
        except KeyboardInterrupt:  # of the kernel, which does what Stop does
            messages.append({"role": "assistant", "content": "".join(found)})
            raise
        finally:
            del self._found[speaker.name]
        messages.append({"role": "assistant", "content": answer.text})

    def _ended(self, error: BaseException | None) -> None:
        stopped = self.job is not None and self.job.watcher.stopped
        self.job = None
        self._enable(True)
        self._show()
        if error is None or stopped:
            self.message.value, self.text.value = "stopped" if stopped else "", ""
        else:
            what = html.escape(f"{type(error).__name__}: {error}")
            self.message.value = f'<pre style="white-space: pre-wrap">{what}</pre>'

    def _show(self) -> None:
        for one in self.speakers:
            turns = [(m["role"], m["content"]) for m in [*self.said[one.name]]]
            so_far = "".join(self._found.get(one.name, ()))
            turns += [("assistant", so_far)] if so_far else []
            lines = [_TURN.format(who="You" if r == "user" else "", text=html.escape(text)) for r, text in turns]
            self.shown[one.name].value = f"<b>{html.escape(one.name)}</b>{''.join(lines)}"

    def _enable(self, idle: bool) -> None:
        self.send.disabled = self.new.disabled = not idle
        self.stop.disabled = idle

    @staticmethod
    def _button(label: str, tooltip: str, work: Callable[[], None], style: str = "") -> widgets.Button:
        button = widgets.Button(description=label, tooltip=tooltip, button_style=style)
        button.on_click(lambda _: work())
        return button
