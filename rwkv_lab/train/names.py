"""The names under which records keep what is trained on, and which of them go together."""

from collections.abc import Iterable

TEXTS = ("text",)
PROMPTS = ("prompt", "instruction", "question", "query")
INPUTS = ("input", "context")  # beside a prompt, or as the prompt itself
RESPONSES = ("response", "completion", "output", "answer")
SYSTEMS = ("system", "system_prompt")
CHATS = ("messages", "conversations", "conversation")
TOOLS = ("tools",)

KNOWN = (*TEXTS, *PROMPTS, *INPUTS, *RESPONSES, *SYSTEMS, *CHATS, *TOOLS)
MEANT = (
    'it must be an object with "text", with "prompt" and "response" (or instruction, input and output; question and '
    'answer; …), or with "messages"'
)


def plain(name: str) -> str:
    """A name as it is compared: `Question` and `question` are one."""
    return name.strip().lower()


def is_record(names: Iterable[str]) -> bool:
    """Whether these are the names of a record: of a text, of a prompt and its response, or of messages."""
    found = {plain(name) for name in names}
    asked, answered = found & {*PROMPTS, *INPUTS}, found & {*RESPONSES}
    return bool(found & {*TEXTS, *CHATS}) or bool(asked and answered)
