"""A box to write in, for JupyterLab: models answer while one looks on, side by side, until they end or are stopped."""

import html
import threading
import time
from collections.abc import Callable

import ipywidgets as widgets

from rwkv_lab.analysis.answers import Messages, Speaker
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.workbench.run import Run

_EVERY = 0.1  # seconds between two changes of what is shown
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
        self._stopped, self._thread = threading.Event(), None
        buttons = widgets.HBox([self.send, self.stop, self.new])
        self.box = widgets.VBox([self.text, buttons, self.message, widgets.HBox([*self.shown.values()])])
        self._show()

    def start(self) -> None:
        """Ask, in a thread of its own, so that Stop can be pressed meanwhile."""
        question = self.text.value
        if not question.strip():
            self.message.value = "There is nothing to answer yet."
            return
        self._stopped.clear()
        self._enable(False)
        self._thread = threading.Thread(target=self._ask, args=(question,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End what is being written; what is there stays."""
        self._stopped.set()

    def wait(self) -> None:
        """Until the answers are there."""
        if self._thread is not None:
            self._thread.join()

    def forget(self) -> None:
        """Begin a new conversation."""
        for messages in self.said.values():
            messages.clear()
        self._show()

    def _ask(self, question: str) -> None:
        self.message.value = "writing …"
        try:
            for speaker in self.speakers:
                if not self._stopped.is_set():
                    self._ask_one(speaker, question)
            self.message.value, self.text.value = "", ""
        except RwkvLabError as e:
            self.message.value = f'<pre style="white-space: pre-wrap">{html.escape(f"{type(e).__name__}: {e}")}</pre>'
        finally:
            self._enable(True)

    def _ask_one(self, speaker: Speaker, question: str) -> None:
        messages = self.said[speaker.name]
        if not self.run.config.conversation:
            messages.clear()
        messages.append({"role": "user", "content": question})
        found, last = [], time.monotonic()

        def told(token: int, text: str) -> bool:
            nonlocal last
            found.append(text)
            if time.monotonic() - last > _EVERY:
                last = time.monotonic()
                self._show(speaker, "".join(found))
            return not self._stopped.is_set()

        try:
            answer = speaker.answer([*messages] if self.run.config.conversation else question, told)
        except RwkvLabError:
            messages.pop()
            raise
        messages.append({"role": "assistant", "content": answer.text})
        self._show()

    def _show(self, speaker: Speaker | None = None, so_far: str = "") -> None:
        for one in self.speakers if speaker is None else (speaker,):
            turns = [(m["role"], m["content"]) for m in self.said[one.name]]
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
