"""What a message says of a name that is not known: which there are, and the nearest."""

from collections.abc import Iterable
from difflib import get_close_matches

from rwkv_lab.errors import ParameterError


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean X?` where one of `words` is near, else empty."""
    by_small = {w.lower(): w for w in words}
    near = get_close_matches(word, list(by_small.values()), n=1) or get_close_matches(word.lower(), list(by_small), n=1)
    return f"; did you mean {by_small.get(near[0], near[0])}?" if near else ""


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> ParameterError:
    """The error for a parameter that `what` does not take."""
    allowed = list(allowed)
    return ParameterError(
        f"{what} has no parameter {name!r}{did_you_mean(name, allowed) or '.'}\nIt takes: {', '.join(allowed)}"
    )
