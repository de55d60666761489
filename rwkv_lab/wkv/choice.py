"""Which backend "auto" stands for, while somebody compares backends."""

from collections.abc import Iterator
from contextlib import contextmanager

_chosen = "auto"  # a plain global: torch.compile follows it; threads of one process share it


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block, operators that are called with backend="auto" use this one, whatever the length."""
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen_backend() -> str:
    """The name that `use_backend` set, else "auto"."""
    return _chosen
