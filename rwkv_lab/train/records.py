"""Records as examples: texts, prompts with responses, and conversations of which the assistant's turns are learned.

* `text`: a text, which is learned.
* `prompt` with `response` or `completion`: joined as they stand; the response is learned.
* `instruction`, `question` or `query`, with `input` or `context`, and `output`, `answer`, `response` or `completion`: a
  user's turn and the assistant's, by the chat template; with `system` before them.
* `messages` or `conversations`: a conversation by the chat template, with `system` and `tools`.

A record in which there is nothing to learn, such as an empty text or answer, is left out and counted. A field with
content that is not used is refused, unless `ignore` names it: nothing is left out by accident.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rwkv_lab.errors import ParameterError
from rwkv_lab.model.chat_template import TEMPLATES, UNWRITTEN, ChatTemplate, EmptyTurn, chat_template, render_turns
from rwkv_lab.paths import what_is_there
from rwkv_lab.text import counted
from rwkv_lab.train.examples import Example
from rwkv_lab.train.names import CHATS, INPUTS, KNOWN, MEANT, PROMPTS, RESPONSES, SYSTEMS, TEXTS, TOOLS, plain

_EMPTY: tuple[Any, ...] = (None, "", [], {}, ())
_SHOWN = 8  # names of fields in a message
_OF_MESSAGES = ("role", "from", "content", "value")  # these are always used


class _Empty(Exception):
    """There is nothing to learn in a record; says what is empty."""


class RecordReader:
    """Makes examples of records, and keeps count of what it does not use.

    Args:
        ignore: names of fields, or patterns of them, that need not be used.
        template: "world", or the path of a JSON file: see `read_template`.

    Raises:
        ParameterError: no such template.
    """

    def __init__(self, ignore: Sequence[str] = (), template: str = "world"):
        self._ignore, self._template = tuple(ignore), read_template(template)
        self._template_name = template
        self._unused: dict[str, tuple[str, int]] = {}  # name -> (place of the first, how many)
        self._ignored: Counter[str] = Counter()
        self._unwritten: Counter[str] = Counter()
        self._matched: set[str] = set()  # of `ignore`
        self._empty: Counter[str] = Counter()  # by what is empty
        self._first_empty = ""
        self._templated = self._unanswered = self._read = 0

    def example(self, record: Any, line: int, place: str) -> Example | None:
        """The example in a record; None where there is nothing to learn.

        Args:
            place: file and line, for messages.

        Raises:
            ParameterError: no record, a wrong type, two fields of which only one can be meant.
        """
        if not isinstance(record, Mapping):
            raise ParameterError(f"{place}: {MEANT}.")
        self._read += 1
        if not record:
            return self._count_empty("an object without fields", place)
        given = self._without_ignored(record, place)
        names = {name: value for name, value in given.items() if name in KNOWN}
        if not {*names} & {*TEXTS, *PROMPTS, *INPUTS, *RESPONSES, *CHATS}:
            raise ParameterError(f"{place}: {MEANT}; it has {_listed(list(map(str, record)))}.")
        form = _form(names, place)
        used: set[str] = set()
        try:
            turns, empty = getattr(self, f"_{form}")(names, used, place), ""
        except _Empty as e:
            turns, empty = (), str(e)
        for name, value in given.items():
            if name not in used and value not in _EMPTY:
                first, count = self._unused.get(name, (place, 0))
                self._unused[name] = (first, count + 1)
        return self._count_empty(empty, place) if empty else Example(turns, line, place)

    def _count_empty(self, what: str, place: str) -> None:
        self._empty[what] += 1
        self._first_empty = self._first_empty or place

    def check_rest(self, name: str, examples: Sequence[Example]) -> None:
        """After the last record of `name`: refuse fields with content that no example took up, and too many records
        that are empty.

        Raises:
            ParameterError: lists them all.
        """
        if self._empty and len(examples) < 2:
            raise ParameterError(
                f"{name}: {self._left_out()}\nThat leaves {len(examples)} to learn; give two at least."
            )
        if not self._unused:
            return
        fields_ = sorted(self._unused)
        first, _ = self._unused[fields_[0]]
        most = max(count for _, count in self._unused.values())
        raise ParameterError(
            f"{name}: {_listed(fields_)} would not be used ({first}; in up to {most:,} of {self._read:,} records).\n"
            f"Pass ignore={json.dumps(fields_[:_SHOWN])} to leave {'it' if len(fields_) == 1 else 'them'} out, or "
            "put what matters into the text."
        )

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer, where the chat template wrote any."""
        return (self._template.assistant_end,) if self._templated else ()

    def notes(self) -> list[str]:
        """What was ignored and how conversations are written, a sentence each."""
        counts = ", ".join(f"{name} ({count:,})" for name, count in sorted(self._ignored.items()))
        notes = [self._left_out()] if self._empty else []
        notes += [f"Ignored fields, with the number of records that have content there: {counts}."] if counts else []
        if self._templated:
            notes.append(
                f"{self._templated:,} of {self._read:,} records are written by the chat template "
                f"{self._template_name!r}; what the assistant says is learned."
            )
        if self._unwritten:
            counts = ", ".join(f"{name} ({count:,})" for name, count in sorted(self._unwritten.items()))
            notes.append(f"Fields of messages that no template writes, with the number of messages: {counts}.")
        if self._template_name != "world" and not self._templated:
            notes.append(f"The chat template {self._template_name!r} wrote nothing: no record is a conversation.")
        if idle := [pattern for pattern in self._ignore if pattern not in self._matched]:
            notes.append(f"ignore: no field is matched by {', '.join(map(repr, idle))}.")
        if self._unanswered:
            notes.append(
                f"{counted(self._unanswered, 'conversation ends', 'conversations end')} with turns without an answer; "
                "these are left out."
            )
        return notes

    def _left_out(self) -> str:
        count = self._empty.total()
        what = ", ".join(f"{what} ({n:,})" for what, n in self._empty.most_common())
        are = "record is empty and was" if self._read == 1 else "records are empty and were"
        return f"{count:,} of {self._read:,} {are} left out: {what}; the first is {self._first_empty}."

    def _is_ignored(self, name: Any) -> bool:
        matched = [pattern for pattern in self._ignore if fnmatchcase(str(name), pattern)]
        self._matched |= {*matched}
        return bool(matched)

    def _is_ignored_inside(self, name: str) -> bool:
        """Of a field of messages, which the notes call `messages.name`."""
        matched = [self._is_ignored(name), self._is_ignored(f"messages.{name}")]
        return any(matched) and name not in _OF_MESSAGES

    def _without_ignored(self, record: Mapping, place: str) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for name, value in record.items():
            key = plain(name) if isinstance(name, str) and plain(name) in KNOWN else str(name)
            if self._is_ignored(name):
                self._ignored[str(name)] += value not in _EMPTY
            elif key in given:
                raise ParameterError(f"{place} has the field {key!r} twice, in other letters; remove one.")
            else:
                given[key] = value
        return given

    def _text(self, given: Mapping[str, Any], used: set[str], place: str) -> tuple[tuple[bytes, bytes], ...]:
        used |= {*TEXTS}
        return ((b"", _bytes(_text_of(given, "text", place), "text", place)),)

    def _pair(self, given: Mapping[str, Any], used: set[str], place: str) -> tuple[tuple[bytes, bytes], ...]:
        answer = _one_of(given, RESPONSES, place) or "response"
        asked = _one_of(given, PROMPTS, place)
        context = _one_of(given, INPUTS, place)
        system = _one_of(given, SYSTEMS, place)
        if asked is None and context is not None:
            asked, context = context, None
        asked = asked or "prompt"
        said = {name: _text_of(given, name, place) for name in (asked, answer)}
        said |= {name: _text_of(given, name, place) for name in (context, system) if name and given[name] not in _EMPTY}
        used |= {*said}
        if not said[answer].strip():
            raise _Empty(f'no text in "{answer}"')
        if asked == "prompt" and len(said) == 2:
            return ((_bytes(said[asked], asked, place), _bytes(said[answer], answer, place)),)
        asks = "\n".join(filter(None, [said[asked], said.get(context or "", "")]))
        messages = [{"role": "system", "content": said[system]}] if system in said else []
        messages += [{"role": "user", "content": asks}, {"role": "assistant", "content": said[answer]}]
        return self._rendered(messages, None, place)

    def _chat(self, given: Mapping[str, Any], used: set[str], place: str) -> tuple[tuple[bytes, bytes], ...]:
        name = _one_of(given, CHATS, place) or CHATS[0]
        system, tools = _one_of(given, SYSTEMS, place), given.get("tools")
        used |= {name, *TOOLS, *([system] if system else [])}
        messages = _from_json(given[name], name, place)
        if messages in _EMPTY and not isinstance(messages, dict):
            raise _Empty(f'no messages in "{name}"')
        if not isinstance(messages, list):
            raise ParameterError(f'{place}: "{name}" must be a list of messages, each with a role and a content.')
        if system and given[system] not in _EMPTY:
            messages = [{"role": "system", "content": _text_of(given, system, place)}, *messages]
        return self._rendered(messages, _from_json(tools, "tools", place) or None, place)

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, place: str
    ) -> tuple[tuple[bytes, bytes], ...]:
        """(not learned, learned) in turn, of a conversation."""
        odd = next((n for n, m in enumerate(messages, 1) if not isinstance(m, Mapping)), None)
        if odd is not None:
            what = type(messages[odd - 1]).__name__
            raise ParameterError(f"{place}: message {odd} is no object with a role and a content, but {what}.")
        inside = Counter(name for m in messages for name in _fields_of(m))
        self._unwritten.update({name: inside[name] for name in UNWRITTEN if name in inside})
        ignored = {name: n for name, n in inside.items() if self._is_ignored_inside(name)}
        self._ignored.update({f"messages.{name}": n for name, n in ignored.items()})
        try:
            turns = render_turns(messages, self._template, tools, ignored)
        except EmptyTurn as e:
            raise _Empty(f"a turn of the {e.role} without text") from None
        except ParameterError as e:
            raise ParameterError(f"{place}: {e}") from None
        if not any(turn.is_assistant for turn in turns):
            raise _Empty("no turn of the assistant")
        self._templated += 1
        found, read = [], b""
        for turn in turns:
            text = _bytes(turn.text, turn.role, place)
            if turn.is_assistant:
                found.append((read, text))
            read = b"" if turn.is_assistant else read + text
        self._unanswered += bool(read)
        return tuple(found)


def _fields_of(message: Mapping[str, Any]) -> list[str]:
    """Names of the fields with content of a message, and of the parts of its content."""
    found = [name for name in message if message[name] not in _EMPTY]
    parts = [part for name in ("content", "value") if isinstance(message.get(name), list) for part in message[name]]
    inside = [name for part in parts if isinstance(part, Mapping) for name in part if part[name] not in _EMPTY]
    return found + [name for name in inside if name not in ("type", "text")]


def _form(given: Mapping[str, Any], place: str) -> str:
    """Which of the three a record is."""
    has = {
        "text": [n for n in TEXTS if n in given],
        "pair": [n for n in (*PROMPTS, *INPUTS, *RESPONSES) if n in given],
        "chat": [n for n in CHATS if n in given],
    }
    forms = [form for form, names in has.items() if any(given[n] not in _EMPTY for n in names)]
    forms = forms or [form for form, names in has.items() if names][:1]
    if len(forms) > 1:
        one, other = ('"' + '" or "'.join(has[form]) + '"' for form in forms[:2])
        raise ParameterError(
            f"{place} has {one} beside {other}; only one of the two can be meant.\n"
            f"Pass ignore={json.dumps(has[forms[1]])} or ignore={json.dumps(has[forms[0]])}, whichever is not meant."
        )
    return forms[0]


def _one_of(given: Mapping[str, Any], names: Sequence[str], place: str) -> str | None:
    """The one of some names that is there with content, else one that is there."""
    there = [name for name in names if name in given]
    full = [name for name in there if given[name] not in _EMPTY]
    if len(full) > 1:
        raise ParameterError(
            f'{place} has "{full[0]}" beside "{full[1]}"; only one of the two can be meant.\n'
            f"Pass ignore={json.dumps([full[1]])} or the other, whichever is to be left out."
        )
    return (full or there or [None])[0]


def _text_of(given: Mapping[str, Any], name: str, place: str) -> str:
    value = given.get(name)
    if value is None and name in given:  # as a Parquet file and JSON write an empty cell
        value = ""
    if not isinstance(value, str):
        missing = "is missing" if value is None else "is no text"
        what = "it must be a text" if name == "text" else "a prompt goes with a response, both are texts"
        raise ParameterError(f'{place}: "{name}" {missing}; {what}.')
    if not value.strip() and name == "text":
        raise _Empty('no text in "text"')
    return value


def _from_json(value: Any, name: str, place: str) -> Any:
    """What a cell of a table holds: messages are written there as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as e:
        raise ParameterError(f'{place}: "{name}" is text, and no JSON ({e}).') from None


def _bytes(text: str, name: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ParameterError(f'{place}: "{name}" holds half a surrogate pair, which is no text.') from None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ("the field " if len(names) == 1 else "the fields ") + ", ".join(map(repr, names[:_SHOWN])) + more


def read_template(which: str) -> ChatTemplate:
    """A chat template by its name, or from a JSON file of an object with the fields of `ChatTemplate`: `system`,
    `user`, `assistant` and `tool`, each with `{text}` where what was said goes, and `collapse_blank_lines`.

    Raises:
        ParameterError: neither a name nor such a file.
    """
    path = Path(os.path.expanduser(which))
    if which in TEMPLATES or not (path.suffix or path.exists() or path.is_symlink()):
        return chat_template(which)
    if not path.is_file():
        raise ParameterError(f"template={which!r}: there is no file {path}{what_is_there(path)}")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ParameterError(f"template={which!r} cannot be read as JSON: {e}.") from None
    known = [field.name for field in fields(ChatTemplate)]
    if not isinstance(found, dict) or not {*found} <= {*known}:
        odd = sorted({*found} - {*known})[:3] if isinstance(found, dict) else "no object"
        raise ParameterError(f"template={which!r}: it must be an object of {', '.join(known)}; found {odd}.")
    if not isinstance(found.get("collapse_blank_lines", True), bool):
        raise ParameterError(f"template={which!r}: collapse_blank_lines must be true or false.")
    return ChatTemplate(**found)
