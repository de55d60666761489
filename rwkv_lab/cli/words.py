"""`name=value`, the words in which the command line takes the parameters of a notebook."""

import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rwkv_lab.cli.notebooks import Notebook, Parameter
from rwkv_lab.errors import ParameterError
from rwkv_lab.suggestions import unknown_name


def parameters_from(words: Iterable[str], notebook: Notebook) -> dict[str, Any]:
    """The parameters that words give, for papermill: numbers, True, False and None where the notebook takes them.

    What is wrong with a value is said later, as Python does.

    Raises:
        ParameterError: a word that is no `name=value`, a name that the notebook does not have, or one given twice.
    """
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ParameterError(f"{word!r} sets no parameter. {_instead(word, notebook)}")
        if name not in notebook.parameters:
            name = name.lstrip("-").replace("-", "_") if word.startswith("--") else name
            if name in notebook.parameters:
                raise ParameterError(f"{word!r}: parameters have no dashes. Write {name}={shlex.quote(text)}")
            raise unknown_name(notebook.name, name, notebook.parameters)
        if name in given:
            raise ParameterError(f"{name} is given twice: {given[name]!r} and {text!r}. Leave one of them out.")
        given[name] = _value(notebook.parameters[name], text)
    return given


def described(notebook: Notebook) -> str:
    """The parameters as `--help` lists them: name, default and help."""
    lines = ["parameters, given as name=value:"]
    for one in notebook.parameters.values():
        value = ",".join(map(str, one.default)) if isinstance(one.default, list) else one.default
        default = f" (default: {value})" if one.default not in ("", [], {}, None) else ""
        head = f"  {one.name:<21} "
        lines += textwrap.wrap(
            f"{one.help}{default}", 110, initial_indent=head, subsequent_indent=" " * 24, break_on_hyphens=False
        ) or [head.rstrip()]
    return "\n".join([*lines, "", "Lists are words with commas between them, mappings are JSON, empty is name= ."])


def _instead(word: str, notebook: Notebook) -> str:
    """What to write in the place of a word without an equals sign."""
    option = word.lstrip("-").replace("-", "_")
    if word.startswith("-") and option in notebook.parameters:
        return f"Write {option}=… , without dashes."
    first = next(iter(notebook.parameters), "name")
    value = word if Path(word).exists() else "…"
    return f"Write name=value, such as {first}={shlex.quote(value) if value != '…' else value}"


def _value(parameter: Parameter, text: str) -> Any:
    """The value that a word stands for; the word itself where a text, a list or a mapping is taken, too."""
    kinds = parameter.kinds
    if text == "None" and "None" in kinds:
        return None
    if "bool" in kinds and text in ("True", "False"):
        return text == "True"
    if "str" in kinds or not kinds & {"int", "float"}:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
