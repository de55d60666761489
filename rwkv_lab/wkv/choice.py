"""Which backend runs: the chosen one, or the fastest available; and why a faster one is not available."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rwkv_lab.arguments import checked
from rwkv_lab.errors import KernelError
from rwkv_lab.torch_private import constant_while_tracing, takes_tangents, transformed
from rwkv_lab.wkv import cuda
from rwkv_lab.wkv.cpu import SOURCES
from rwkv_lab.wkv.loader import cpu_build, cpu_library, cuda_build, failed

log = logging.getLogger("rwkv_lab")

_chosen = "auto"  # a plain global: torch.compile follows it; threads of one process share it
_told: set[str] = set()
_only_traced: ContextVar[bool] = ContextVar("operators are traced and not run", default=False)


@checked
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


@contextmanager
def trace_operators() -> Iterator[None]:
    """Inside the block, in this thread, operators that are called with backend="auto" appear as `torch.ops.rwkv_lab.*`
    in what torch.export traces. Nothing is compiled: tracing needs the shapes alone, and no compiler."""
    before = _only_traced.set(True)
    try:
        yield
    finally:
        _only_traced.reset(before)


@constant_while_tracing  # torch.compile cannot look into a ContextVar
def only_traced() -> bool:
    """Whether `trace_operators` is on."""
    return _only_traced.get()


def fastest(name: str, device: str, double: bool, width: int) -> str | None:
    """The compiled backend for operator `name` on such inputs, whose state has rows of `width`; None where
    the forms in plain torch are to compute it."""
    if device not in ("cpu", "cuda") or double or takes_tangents() or transformed():
        return None
    why = unfit(name, device, width) or problem(name, device)
    if why is not None:
        _tell(why)
        return None
    return device


def unfit(name: str, backend: str, width: int) -> str | None:
    """Why a compiled backend has nothing for this head size, in a sentence; None if it has."""
    if backend != "cuda" or name == "wkv4" or width in cuda.HEAD_SIZES:
        return None
    sizes = ", ".join(map(str, cuda.HEAD_SIZES))
    return f'backend="cuda" is compiled for head sizes {sizes}, and this one is {width}; use "chunked" for it.'


# torch.compile calls it while tracing, without looking inside, where sources are compiled.
@constant_while_tracing
def problem(name: str, backend: str) -> str | None:
    """Why a compiled backend cannot run operator `name` here, in a sentence; None if it can. Compiles it if need be."""
    try:
        cuda.library(SOURCES[name]) if backend == "cuda" else cpu_library(SOURCES[name])
    except KernelError as error:
        return str(error)
    return None


def available(backend: str) -> bool:
    """Whether a compiled backend is there or can be expected to come out of its sources. Compiles nothing."""
    try:
        for source in SOURCES.values():
            cuda_build(source, cuda.architectures()) if backend == "cuda" else cpu_build(source)
    except KernelError:
        return False
    return not any(failed(backend, source) for source in SOURCES.values())


@constant_while_tracing
def _tell(why: str) -> None:
    """Say once per process why the compiled operators are not used."""
    if why not in _told:
        _told.add(why)
        log.warning("The WKV operators run in plain torch, which is slower: %s", why)
