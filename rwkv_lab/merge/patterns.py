"""Shell-style patterns on tensor names, checked so that a typo does not silently select nothing."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from rwkv_lab.errors import ParameterError


def select(names: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> set[str]:
    """Names that match some pattern of `include` (None: all) and none of `exclude`.

    Raises:
        ParameterError: a pattern that matches no name, or one where a list is expected.
    """
    names = list(names)
    for what, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ParameterError(f"{what}={patterns!r}: it must be a list of patterns")
    for what, patterns in (("include", include or []), ("exclude", exclude or [])):
        for p in patterns:
            if not any(fnmatchcase(n, p) for n in names):
                near = get_close_matches(p, names, n=2, cutoff=0.5) or names[:2]
                raise ParameterError(
                    f"{what}: the pattern {p!r} matches none of the {len(names)} tensors that would change.\n"
                    f"There are, for example: {', '.join(near)}"
                )
    return {n for n in names if matches(n, include, exclude)}


def matches(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Whether `name` is included and not excluded."""
    wanted = include is None or any(fnmatchcase(name, p) for p in include)
    return wanted and not any(fnmatchcase(name, p) for p in exclude or [])
