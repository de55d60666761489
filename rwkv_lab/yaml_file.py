"""YAML files that people write: read by PyYAML's safe loader, never more, and without names that stand twice."""

from pathlib import Path
from typing import Any

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.paths import missing_file

_MAX = 1_000_000  # bytes


def read_mapping(path: Path, what: str, has: str) -> dict:
    """The mapping in a YAML file.

    Args:
        what: what such a file is called, for messages: "a recipe".
        has: what it has, for messages.

    Raises:
        ParameterError: no such file, no mapping in it, or a name that stands twice.
        CorruptFileError: it is not YAML, or cannot be read.
    """
    import yaml  # here, because most work needs none

    if not path.is_file():
        raise missing_file(path)
    try:
        if path.stat().st_size > _MAX:
            raise CorruptFileError(f"{path} has {path.stat().st_size} bytes; {what} has at most {_MAX}")
        loader = yaml.SafeLoader(path.read_text())
        tree = loader.get_single_node()
        _refuse_repeated(path, tree)
        asked = None if tree is None else loader.construct_document(tree)
    except OSError as e:
        raise CorruptFileError(f"cannot read {what} {path}: {e.strerror}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: bytes that are no text, a 30th of February
        said = str(e).split("\n")[0]
        raise CorruptFileError(f"{path} is not YAML ({said})") from e
    if not isinstance(asked, dict):
        raise ParameterError(f"{path} holds no mapping; {what} has {has}")
    return asked


def _refuse_repeated(path: Path, tree: Any) -> None:
    """YAML's own reader takes the last of two values of one name, and forgets the other."""
    waiting, seen = [tree], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))  # an alias is the same node again, and may stand inside itself
        names = set()
        for child in node.value:
            if not isinstance(child, tuple):
                waiting.append(child)
                continue
            key, value = child
            if isinstance(key.value, str) and (key.tag, key.value) in names:
                line = key.start_mark.line + 1
                raise ParameterError(f"{path}: {key.value!r} stands twice in one mapping, again in line {line}")
            names |= {(key.tag, key.value)} if isinstance(key.value, str) else set()
            waiting += [key, value]
