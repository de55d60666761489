"""Shell-style patterns on tensor names, checked so that a typo does not silently select nothing."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from rwkv_lab.errors import ParameterError


def refuse_unmatched(what: str, patterns: Sequence[str] | None, names: Sequence[str], which: str) -> None:
    """Refuse a pattern that fits none of the names; `which` tensors they are is for the message.

    Raises:
        ParameterError: with the nearest names.
    """
    for p in patterns or []:
        if not any(fnmatchcase(n, p) for n in names):
            near = get_close_matches(p, names, n=2, cutoff=0.5) or names[:2]
            raise ParameterError(
                f"{what}: the pattern {p!r} matches none of the {len(names)} {which}.\n"
                f"There are, for example: {', '.join(near)}"
            )


def select(names: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> set[str]:
    """Names that match some pattern of `include` (all if it is None or empty) and none of `exclude`.

    Raises:
        ParameterError: a pattern that matches no name, or patterns that leave nothing.
    """
    names = list(names)
    for what, patterns in (("include", include), ("exclude", exclude)):
        refuse_unmatched(what, patterns, names, "tensors that would change")
    chosen = {n for n in names if matches(n, include, exclude)}
    if names and not chosen:
        raise ParameterError(
            f"include and exclude keep out all {len(names)} tensors that would change; the output would be the base.\n"
            "Loosen them, or say alpha=0 if the base is what you want."
        )
    return chosen


def pattern_list(what: str, patterns: Sequence[str] | None) -> list[str] | None:
    """The patterns as a list; None where there are none, and an empty list says that too.

    Raises:
        ParameterError: something other than a sequence of texts.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise ParameterError(f"{what}={patterns!r}: it must be a list of patterns")
    wrong = next((p for p in patterns if not isinstance(p, str)), None)
    if wrong is not None:
        raise ParameterError(f"{what} holds {wrong!r}: a pattern is a text such as 'blocks.0.*'")
    return list(patterns) or None


def matches(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Whether `name` is included and not excluded."""
    wanted = not include or any(fnmatchcase(name, p) for p in include)
    return wanted and not any(fnmatchcase(name, p) for p in exclude or [])
