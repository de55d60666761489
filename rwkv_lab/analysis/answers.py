"""Models that are asked: with a state, an adapter or rounded weights; one prompt or conversation after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_lab import model as models
from rwkv_lab import peft
from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, open_checkpoint
from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.paths import missing_file, to_path
from rwkv_lab.peft import open_adapter
from rwkv_lab.train.records import read_template

Messages = list[dict[str, Any]]
WEIGHTS = ("none", "int8", "int4", "nf4")  # and `SCHEMES` of the model, which brings torch
_CACHE = 1 << 28  # bytes of states, so that a conversation is not read anew with every turn


@dataclass(frozen=True)
class Answer:
    """What a model wrote. seconds: of wall time, reading the prompt included."""

    text: str
    reason: str  # why it ended, as of `GenerationStream`; "" of an answer in a conversation
    ids: list[int]
    seconds: float


@dataclass
class Speaker:
    """A model with the settings that it is asked with; `settings` are arguments of `generate_stream`."""

    name: str
    model: models.RWKV_Dual
    settings: dict[str, Any] = field(default_factory=dict)
    template: str = "world"
    think: bool | None = None
    _cache: models.StateCache = field(default_factory=lambda: models.StateCache(_CACHE))

    def answer(self, question: str | Messages, told: Callable[[int, str], object] | None = None) -> Answer:
        """Continue a text, or answer a conversation.

        Args:
            told: called with every new token and the text that it completes; it ends the answer by returning False.
        Raises:
            ParameterError, NumericsError: as `generate_stream` and `chat`.
        """
        start, ids = time.perf_counter(), []

        def note(token: int, text: str) -> object:
            ids.append(token)
            return None if told is None else told(token, text)

        if isinstance(question, str):
            stream = models.generate_stream(self.model, question, **self.settings)
            for token, text in stream:
                if note(token, text) is False:
                    stream.stop()
            return Answer(stream.text, stream.reason, ids, time.perf_counter() - start)
        template = read_template(self.template)
        settings = self.settings | {"stop": self.settings.get("stop") or None, "cache": self._cache}
        text = models.chat(self.model, question, template, streaming_callback=note, think=self.think, **settings)
        return Answer(text, "", ids, time.perf_counter() - start)


@checked
def load_to_ask(
    path: str | Path,
    state: str | Path | None = None,
    adapter: str | Path | None = None,
    weights: str = "none",
    alpha: float | None = None,
    tokenizer: str = "",
    dtype: str = "fp32",
    device: str = "cpu",
) -> models.RWKV_Dual:
    """A model as it is to be asked.

    Args:
        state: a tuned state, from which every text begins.
        adapter: a LoRA, PiSSA or MiSS adapter of this model, applied in memory.
        weights: "none", or "int8", "int4" or "nf4": rounded as by `quantise_weights`.
        alpha: of a LoRA whose file does not state it.
        tokenizer: a name or the path of a file; "" for what the size of the vocabulary tells.
    Raises:
        ParameterError, LayoutError, NumericsError, CorruptFileError, DeviceError: as of the parts.
    """
    if weights not in WEIGHTS:
        raise ParameterError(f"weights={weights!r}: it is one of {', '.join(WEIGHTS)}.")
    # With an adapter, matrices are rounded when it is in them; without one, while they are read.
    while_read: Any = "stored" if weights == "none" or adapter is not None else weights
    model = models.RWKV_Dual.from_pretrained(path, dtype, device, weights=while_read).eval()
    if adapter is not None:
        with open_checkpoint(adapter) as ck:
            refuse_as_adapter(ck)
        with open_adapter(adapter, alpha=alpha) as opened:
            peft.load_adapter(model, opened)
        if weights != "none":
            merged, model = peft.merged_state_dict(model), models.RWKV_Dual.from_pretrained(path, dtype, device).eval()
            model.load_state_dict(merged)
            model = models.quantise_weights(model, weights, in_place=True)
    if state is not None:
        model.load_state_file(state)
    if tokenizer:
        model.tokenizer = tokenizer
    return model.requires_grad_(False)


@checked
def refuse_as_adapter(ck: Checkpoint) -> None:
    """Refuse what is asked in another way, from the header.

    Raises:
        ParameterError: it is a tuned state or a whole model.
    """
    words = {"state": "a tuned state", "model": "a whole model"}
    if ck.kind in words:
        raise ParameterError(f"{ck.path.name} is {words[ck.kind]}: give it as {ck.kind}, not as adapter.")


@checked
def read_prompts(path: str | Path) -> list[str | Messages]:
    """What a file asks: a JSON list, JSON lines, or a text with one prompt on each line.

    A prompt in JSON is a text, a list of messages (`{"role", "content"}`), or an object with "prompt" or "messages".

    Raises:
        CorruptFileError: it cannot be read so; names the place.
        ParameterError: there is no such file, or nothing is asked in it.
    """
    path = to_path(path, "path")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as e:
        raise ParameterError(f"prompts: {path} cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError as e:
        raise CorruptFileError(f"{path}: byte {e.start} is not UTF-8. Save it as UTF-8.") from None
    if text.lstrip()[:1] == "[":
        given = _json(text, str(path))
        entries = [(entry, f"{path}, entry {n}") for n, entry in enumerate(given, 1)]
    else:
        lines = [(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        in_json = bool(lines) and lines[0][0].lstrip()[:1] in "{"
        entries = [(_json(line, where) if in_json else line, where) for line, where in lines]
    if not entries:
        raise ParameterError(f"prompts: {path} asks nothing; it is empty.")
    return [_question(entry, where) for entry, where in entries]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise CorruptFileError(f"{where}: it is no JSON: {e}.") from None


def _question(entry: Any, where: str) -> str | Messages:
    if isinstance(entry, Mapping):
        given = [name for name in ("prompt", "messages") if name in entry]
        if len(given) != 1:
            raise CorruptFileError(f'{where}: it must have either "prompt" or "messages".')
        entry = entry[given[0]]
    if isinstance(entry, str) and entry:
        return entry
    if isinstance(entry, list) and entry and all(isinstance(message, dict) for message in entry):
        return entry
    raise CorruptFileError(f"{where}: {json.dumps(entry)[:60]} is neither a text nor a list of messages.")
