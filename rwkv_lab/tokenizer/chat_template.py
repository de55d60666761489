"""Chat templates among the files of a tokenizer, as Hugging Face's libraries save them."""

import json
from collections.abc import Mapping
from typing import Any

from rwkv_lab.errors import CorruptFileError

TEMPLATE = "chat_template.jinja"
TEMPLATE_FILES = (TEMPLATE, "chat_template.json", "tokenizer_config.json")  # the first that has one counts


def template_of(files: Mapping[str, bytes]) -> str | None:
    """The template among the files of a tokenizer, None where there is none; of several the one called "default".

    Raises:
        CorruptFileError: a template that is not UTF-8.
    """
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode()
        except UnicodeDecodeError as e:
            raise CorruptFileError(f"{TEMPLATE} beside the model is not UTF-8 ({e}); copy it again.") from e
    for name in TEMPLATE_FILES[1:]:
        found = json_object(files.get(name)).get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def json_object(data: bytes | None) -> dict[str, Any]:
    """The object in a JSON text; an empty one where there is none."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
