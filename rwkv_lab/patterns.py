"""Patterns on tensor names: one rule for every parameter that takes them.

A pattern is shell-style (`*`, `?`, `[ab]`; `*` also matches dots) and matches a name if it matches the whole name or
any run of its dotted parts: `blocks.0`, `att.key` and `blocks.*.att` all match `blocks.0.att.key.weight`, and
`blocks.1` does not match `blocks.10.att.key.weight`. Upper and lower case differ.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from rwkv_lab.errors import ParameterError


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches the whole of `name` or a run of its dotted parts."""
    return any(fnmatchcase(name, p) for p in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether at least one of the patterns matches."""
    return any(matches(name, p) for p in patterns)


def is_selected(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Whether `name` is included (no patterns include everything) and not excluded."""
    return (not include or matches_any(name, include)) and not matches_any(name, exclude or ())


def refuse_unmatched(what: str, patterns: Iterable[str] | None, names: Sequence[str], which: str) -> None:
    """Refuse a pattern that matches none of the names, so that a typo does not select nothing silently.

    Args:
        what: the parameter, for the message.
        which: what the names are, for the message: "tensors that would change".
    Raises:
        ParameterError: with the nearest names.
    """
    for p in patterns or ():
        if not any(matches(n, p) for n in names):
            raise ParameterError(
                f"{what}: the pattern {p!r} matches none of the {len(names)} {which}.\n"
                f"There are, for example: {', '.join(_near(p, names))}"
            )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Runs of parts, as many as the pattern has, and whole names that are near it; the first names where none is."""
    count, runs = pattern.count(".") + 1, []
    for name in names:
        parts = name.split(".")
        runs += [".".join(parts[i : i + count]) for i in range(len(parts) - count + 1)]
    return get_close_matches(pattern, dict.fromkeys([*runs, *names]), n=4, cutoff=0.4) or list(names[:2])
