"""Patterns on tensor names: one rule for every parameter that takes them.

A pattern is shell-style (`*`, `?`, `[ab]`; `*` also matches dots) and matches a name if it matches the whole name or
any run of its dotted parts: `blocks.0`, `att.key` and `blocks.*.att` all match `blocks.0.att.key.weight`, and
`blocks.1` does not match `blocks.10.att.key.weight`. Upper and lower case differ.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from rwkv_lab.errors import ParameterError

# Ratios of SequenceMatcher: of a whole run and of each of its parts. Below, words share letters by chance.
_NEAR, _NEAR_PARTS = 0.7, 0.6
_MOST_REPEATED = 3  # in a regular expression of a file


def is_quick(expression: str) -> bool:
    """Whether a regular expression of a file takes no time to speak of on any name: no group is repeated, and little
    else. With `(a|.)*` one can take hours on a name of 30 letters."""
    return len(re.findall(r"[*+{]", expression)) <= _MOST_REPEATED and not re.search(r"\)[*+{]", expression)


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
            near = _near(p, names)
            examples = dict.fromkeys(names[at] for at in (0, len(names) // 2, -1)) if names else ()
            raise ParameterError(
                f"{what}: the pattern {p!r} matches none of the {len(names)} {which}.\n"
                + (f"Did you mean {', '.join(near)}?" if near else f"There are, for example: {', '.join(examples)}")
            )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Runs of parts, as many as the pattern has, of which every part is near the pattern's; the nearest first."""
    wanted = pattern.split(".")
    runs: dict[str, float] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts) - len(wanted) + 1):
            run = parts[i : i + len(wanted)]
            if all(map(_is_near, wanted, run)):
                runs[".".join(run)] = _ratio(pattern, ".".join(run))
    return sorted((run for run in runs if runs[run] >= _NEAR), key=lambda run: -runs[run])[:4]


def _is_near(wanted: str, part: str) -> bool:
    """Whether a part of a pattern may be meant to be a part of a name: another number, another case, a few letters."""
    if fnmatchcase(part, wanted) or wanted.isdecimal() and part.isdecimal():
        return True
    return _ratio(wanted, part) >= _NEAR_PARTS


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower()).ratio()
