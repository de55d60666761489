"""Chat templates of Hugging Face: Jinja, in its sandbox, since a template is code that came with a model."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rwkv_lab.errors import ParameterError
from rwkv_lab.tokenizer.chat_template import json_object

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Texts of tokens that templates name: bos_token, eos_token, …"""
    stated = json_object(files.get("special_tokens_map.json")) | json_object(files.get("tokenizer_config.json"))
    texts = {name: stated.get(name) for name in _SPECIAL}
    texts = {name: text.get("content") if isinstance(text, dict) else text for name, text in texts.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def render_chat(
    path: Path, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, special: Mapping[str, str]
) -> str:
    """A conversation as the text that a model was trained on.

    Raises:
        ParameterError: jinja2 is missing, or the template refuses the messages.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as e:
        raise ParameterError(f"{path} needs the package jinja2.\nInstall it: pip install jinja2") from e

    def refuse(message: str) -> None:
        raise ParameterError(f"The chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    try:
        return environment.from_string(path.read_text("utf-8")).render(**given, **special)
    except ParameterError:
        raise
    except (TemplateError, TypeError, ValueError, AttributeError, OverflowError, OSError) as e:
        raise ParameterError(f"{path} cannot be applied to these messages: {e}") from e
