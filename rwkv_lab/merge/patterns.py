"""Which tensors include and exclude select."""

from collections.abc import Iterable, Sequence

from rwkv_lab.errors import ParameterError
from rwkv_lab.patterns import is_selected, refuse_unmatched


def select(names: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> set[str]:
    """Names that match some pattern of `include` (all if it is None or empty) and none of `exclude`.

    Raises:
        ParameterError: a pattern that matches no name, or patterns that leave nothing.
    """
    names = list(names)
    for what, patterns in (("include", include), ("exclude", exclude)):
        refuse_unmatched(what, patterns, names, "tensors that would change")
    chosen = {n for n in names if is_selected(n, include, exclude)}
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
