"""Conversations as text: what a chat template makes of messages. `chat.py` has what a model answers."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rwkv_lab.arguments import check_fields, checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.suggestions import did_you_mean

# Names of roles and fields in use; the first of each is OpenAI's, the others are those of ShareGPT and its relatives.
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt"),
    "tool": ("tool", "function", "observation", "ipython"),
}
_ROLE_FIELDS, _TEXT_FIELDS = ("role", "from"), ("content", "value")
UNWRITTEN = ("id", "tool_call_id", "name", "type")  # say which call an answer belongs to; no template writes them
_OF_TEXT = (None, "text", "input_text", "output_text")  # types of parts of a content
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class Turn:
    """A piece of a conversation's text; the texts of all pieces, joined, are what the model reads.

    text: with the blank lines and role names that the template adds.
    role: "system", "user", "assistant" or "tool".
    is_assistant: whether the assistant writes this piece, the end of its turn included. The role name before it is a
        piece of its own, which the assistant does not write.
    """

    text: str
    role: str
    is_assistant: bool


@dataclass(frozen=True)
class ChatTemplate:
    """How the turns of a conversation are written; `{text}` stands for what was said, once in each.

    collapse_blank_lines: whether blank lines inside what was said become one newline, as they must where a blank line
        ends a turn.

    Raises:
        ParameterError: a turn without `{text}`, or an assistant's turn that nothing ends.
    """

    system: str = "System: {text}\n\n"
    user: str = "User: {text}\n\n"
    assistant: str = "Assistant: {text}\n\n"
    tool: str = "User: Function output:\n{text}\n\n"
    collapse_blank_lines: bool = True

    def __post_init__(self) -> None:
        for part in fields(self)[:4]:
            written = getattr(self, part.name)
            if not isinstance(written, str) or written.count("{text}") != 1:
                raise ParameterError(
                    f"ChatTemplate: {part.name}={written!r} must hold {{text}} once, where what was said goes."
                )
        if not self.assistant_end:
            raise ParameterError(f"ChatTemplate: assistant={self.assistant!r} needs something behind {{text}}: the end")
        check_fields(self)

    @property
    def user_start(self) -> str:
        """What is before a user's text."""
        return self.user.partition("{text}")[0].rstrip(" ")

    @property
    def assistant_start(self) -> str:
        """What is before an answer, without blanks at its end: the model writes these as part of its first token."""
        return self.assistant.partition("{text}")[0].rstrip(" ")

    @property
    def assistant_end(self) -> str:
        """What ends an answer."""
        return self.assistant.partition("{text}")[2]


class EmptyTurn(ParameterError):
    """A turn of the user or of the assistant without text."""

    def __init__(self, where: str, role: str):
        super().__init__(f"{where} ({role}) has no text; its {' or '.join(_TEXT_FIELDS)} must hold what was said.")
        self.role = role


TEMPLATES = {"world": ChatTemplate()}


def chat_template(template: str | ChatTemplate) -> ChatTemplate:
    """A template by its name, or as it was given.

    Raises:
        ParameterError: no such template.
    """
    if isinstance(template, ChatTemplate):
        return template
    if isinstance(template, str) and template in TEMPLATES:
        return TEMPLATES[template]
    hint = did_you_mean(template, TEMPLATES) if isinstance(template, str) else ""
    raise ParameterError(f"template={template!r}: it is one of {', '.join(TEMPLATES)}, or a ChatTemplate{hint}.")


@checked
def render_turns(
    messages: Sequence[Mapping[str, Any]],
    template: str | ChatTemplate = "world",
    tools: Sequence[Mapping[str, Any]] | None = None,
    ignore: Iterable[str] = (),
) -> list[Turn]:
    """What a model reads of a conversation, piece by piece.

    Args:
        messages: `{"role": …, "content": …}` or `{"from": …, "value": …}`, in this order; roles are system, user,
            assistant and tool, under any name in use (human, gpt, function, …). An assistant's `tool_calls` are written
            as JSON. A system message without text is left out.
        template: "world", that of the World models, or one of your own.
        tools: descriptions of the functions that the model may call; they are written into the system turn.
        ignore: fields of messages that need not be used.

    Raises:
        ParameterError: no message, one without role or text, an unknown role, or a field that would not be used. Names
            the message by its number, from 1.
    """
    template = chat_template(template)
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ParameterError(
            f"messages is a {type(messages).__name__}; it must be a list of messages:\n"
            '[{"role": "user", "content": "Hello"}]'
        )
    ignore = {ignore} if isinstance(ignore, str) else {*ignore}
    said = [_said(message, f"message {number}", ignore) for number, message in enumerate(messages, 1)]
    if not said:
        raise ParameterError("messages is empty; a conversation needs one message at least.")
    if tools:
        said = _with_tools(said, tools)
    return [turn for role, text in said if text or role != "system" for turn in _turns(role, text, template)]


def _turns(role: str, text: str, template: ChatTemplate) -> list[Turn]:
    text = text.replace("\r\n", "\n").strip()
    if template.collapse_blank_lines:
        text = _BLANK_LINES.sub("\n", text)
    if role != "assistant":
        return [Turn(getattr(template, role).replace("{text}", text), role, is_assistant=False)]
    start = template.assistant_start
    answer = template.assistant.replace("{text}", text)[len(start) :]
    return [Turn(start, role, is_assistant=False), Turn(answer, role, is_assistant=True)]


def _said(message: Any, where: str, ignore: set[str]) -> tuple[str, str]:
    """(role, text) of a message."""
    if not isinstance(message, Mapping):
        raise ParameterError(f"{where} is a {type(message).__name__}; it must have a role and a content.")
    role = _role(message, where)
    if len(given := [name for name in _TEXT_FIELDS if message.get(name)]) > 1:
        raise ParameterError(f"{where} has both {' and '.join(given)}; only one of them can be what was said.")
    text = _text(next((message[name] for name in _TEXT_FIELDS if message.get(name) is not None), None), where, ignore)
    if role == "assistant" and message.get("tool_calls"):
        text = "\n".join([*filter(None, [text]), *_calls(message["tool_calls"], where)])
        ignore = ignore | {"tool_calls"}
    known = {*_ROLE_FIELDS, *_TEXT_FIELDS, *UNWRITTEN, *ignore}
    if unused := [name for name, value in message.items() if name not in known and value not in (None, "", [], {})]:
        raise ParameterError(
            f"{where} ({role}) has {unused[0]!r}, which the template does not write.\n"
            f"Put it into the content, or pass ignore={[*unused]} to leave it out."
        )
    if not text.strip() and role in ("user", "assistant"):
        raise EmptyTurn(where, role)
    return role, text


def _role(message: Mapping[str, Any], where: str) -> str:
    given = [message[name] for name in _ROLE_FIELDS if message.get(name) is not None]
    if not given:
        raise ParameterError(f"{where} has no role; it must be one of {', '.join(_ROLES)}.")
    found = [next((role for role, names in _ROLES.items() if str(one).lower() in names), None) for one in given]
    if None in found:
        odd = given[found.index(None)]
        hint = did_you_mean(str(odd), [name for names in _ROLES.values() for name in names])
        raise ParameterError(f"{where} has the role {odd!r}; it must be one of {', '.join(_ROLES)}{hint}.")
    if len({*found}) > 1:
        raise ParameterError(f"{where} has the roles {given[0]!r} and {given[1]!r}; only one of them can be meant.")
    return str(found[0])


def _text(content: Any, where: str, ignore: set[str]) -> str:
    """The text of a content, which may be a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ParameterError(f"{where}: its content must be a text or a list of parts; it is {type(content).__name__}.")
    return "".join(_part(part, f"{where}, part {n} of its content", ignore) for n, part in enumerate(content, 1))


def _part(part: Any, where: str, ignore: set[str]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ParameterError(f"{where} must be a text; it is {type(part).__name__}.")
    if part.get("type") not in _OF_TEXT or not isinstance(part.get("text"), str):
        raise ParameterError(f"{where} is no text, but {str(part.get('type', dict(part)))[:60]!r}; take it out.")
    known = {"type", "text", *ignore}
    if unused := [name for name, value in part.items() if name not in known and value not in (None, "", [], {})]:
        raise ParameterError(
            f"{where} has {unused[0]!r}, which the template does not write.\n"
            f"Put it into the text, or pass ignore={[*unused]} to leave it out."
        )
    return part["text"]


def _calls(calls: Any, where: str) -> list[str]:
    """The calls of functions that an assistant makes, as blocks of JSON."""
    blocks = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ParameterError(f'{where}: a tool call needs a "name" and "arguments"; given {str(call)[:80]!r}.')
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError as e:
            raise ParameterError(f"{where}: the arguments of {function['name']} are no JSON ({e}).") from None
        blocks.append(f"```json\n{_json({'name': function['name'], 'arguments': arguments}, where)}\n```")
    return blocks


def _with_tools(said: list[tuple[str, str]], tools: Any) -> list[tuple[str, str]]:
    described = "Tools:\n" + _json(list(tools), "tools")
    first, rest = (said[0][1], said[1:]) if said[0][0] == "system" else ("", said)
    return [("system", "\n".join(filter(None, [first, described]))), *rest]


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as e:
        raise ParameterError(f"{where} cannot be written as JSON: {e}.") from None
