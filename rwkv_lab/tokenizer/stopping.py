"""Texts that end a generation: found across tokens, and never shown in part."""

from collections.abc import Iterable, Mapping

from rwkv_lab.errors import ParameterError


def stop_texts(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """The texts of `stop`; one text is one stop.

    Raises:
        ParameterError: something else than texts, or an empty one.
    """
    if stop is None:
        return ()
    if isinstance(stop, bytes | Mapping) or not isinstance(stop, Iterable):
        raise ParameterError(f'stop={stop!r}: it must be a text or texts, such as ["\\n\\n", "User:"].')
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    wrong = [text for text in texts if not isinstance(text, str) or not text]
    if wrong:
        raise ParameterError(f"stop holds {wrong[0]!r}; each must be a text that is not empty.")
    return texts


class StopText:
    """Passes text on up to the first stop, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self._held = stops, ""
        self.found: str | None = None  # the stop that ended the text

    def feed(self, text: str) -> str:
        """What may be shown now that `text` has followed; nothing comes after the stop was found."""
        if not self._stops:
            return text
        text, self._held = self._held + text, ""
        ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops if stop in text]
        if ends:  # the one that is complete first, as if the text had come letter by letter
            _, start, self.found = min(ends)
            return text[:start]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def close(self) -> str:
        """What was held back, which no stop has followed."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
