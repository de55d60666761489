"""About how long work on a model takes here, before it begins: formulas of its size times rates that are measured now.

Each rate is measured for a twentieth of a second and then taken for ten seconds: a plan asks for some a dozen times.
Estimates are meant to tell a minute from an hour: caches, other processes and the operators themselves make them off by
a factor of two or so.
"""

import time
from collections.abc import Callable, Hashable

import torch

from rwkv_lab.machine import memory_free
from rwkv_lab.progress import human_bytes, human_seconds

_MEASURED = 0.05  # seconds of measuring a rate
_VALID = 10.0  # seconds for which it is taken then
_rates: dict[Hashable, tuple[float, float]] = {}  # what was measured -> when, and the seconds of one call
_WIDTH = 1024  # of the matrix that a rate is measured with
_IN_RNN_MODE = 900  # products of two numbers in the time that a layer of RWKV-7 takes for a token through torch
_IN_REFERENCE = 45  # the same of the WKV operator's reference alone
_IN_WRITING = 400  # calls of torch in the time that choosing a token takes, and decoding and showing its text
_FILE_COPY = 4  # copies in memory in the time that copying a file takes which the system has in memory
_LOAD = 3.5  # copies of a checkpoint in the time that loading it takes: docs/scaling.md
_IN_FIGURE = 600_000  # the same of a figure, painted for light pages and for dark ones
_IN_STATISTICS = 70  # copies in memory in the time that the statistics of values take

MEANS = "estimated from the sizes and from short work of torch, timed now; other processes may double it"
OF_FILES = "estimated from the sizes and from short work, timed now; a slow disk and other processes make it longer"


def product_seconds(rows: int, values: int, dtype: torch.dtype) -> float:
    """Seconds of the products of all matrices of a model, of so many `values`, with `rows` tokens at once."""
    rows_measured = min(rows, 256)
    x, w = torch.ones(rows_measured, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    return _seconds(("product", rows_measured, dtype), lambda: x @ w) * (rows / rows_measured) * values / w.numel()


def forward_seconds(tokens: int, rows: int, values: int, layers: int, dtype: torch.dtype, backend: str) -> float:
    """Seconds of a pass over `rows` sequences of `tokens` at once."""
    loops = layers * tokens * _IN_REFERENCE * _call_seconds() if backend == "reference" else 0.0
    return product_seconds(rows * tokens, values, dtype) + loops


def stepping_seconds(tokens: int, rows: int, values: int, layers: int, dtype: torch.dtype, backend: str) -> float:
    """Seconds of the same token by token; backend "cpu" has compiled steps."""
    calls = 1 if backend == "cpu" else _IN_RNN_MODE
    return tokens * (product_seconds(rows, values, dtype) + layers * calls * _call_seconds())


def writing_seconds(tokens: int, vocabulary: int, values: int, layers: int, dtype: torch.dtype) -> float:
    """Seconds of writing so many tokens one after the other, each drawn from a vocabulary of this size."""
    logits = torch.rand(vocabulary)
    drawing = _seconds(("sort", vocabulary), lambda: logits.sort(descending=True)) + _IN_WRITING * _call_seconds()
    return tokens * drawing + stepping_seconds(tokens, 1, values, layers, dtype, "cpu")


def file_seconds(size: float) -> float:
    """Seconds of copying so many bytes from file to file, as far as the processor's part goes."""
    x = torch.ones(2**20)
    return _FILE_COPY * _seconds("copy", x.clone) * size / (x.numel() * x.itemsize)


def loading_seconds(size: float) -> float:
    """Seconds of loading a model from a checkpoint of so many bytes."""
    return file_seconds(_LOAD * size)


def statistics_seconds(size: float) -> float:
    """Seconds of reading so many bytes of a checkpoint, and of the statistics of their values."""
    return file_seconds(_IN_STATISTICS / _FILE_COPY * size)


def figure_seconds(count: int) -> float:
    """Seconds of drawing so many figures."""
    return count * _IN_FIGURE * _call_seconds()


def running_seconds(models: int, size: float, values: int, layers: int, read: float, written: float) -> float:
    """Seconds of loading so many models in float32, and of each reading and then writing tokens.

    Args:
        size: bytes of one model's file.
        values: of one model.
        read, written: tokens of each model.
    """
    at_once = forward_seconds(1, max(round(read), 1), values, layers, torch.float32, "cpu")
    token = stepping_seconds(1, 1, values, layers, torch.float32, "cpu")
    return models * (loading_seconds(size) + at_once + token * written)


def _call_seconds() -> float:
    """Seconds of a call of torch on next to nothing."""
    x = torch.ones(64)
    return _seconds("call", lambda: x * x)


def svd_seconds(shape: tuple[int, int]) -> float:
    """Seconds of the singular values of a matrix: of a small one timed now, by the cube of the size."""
    small = torch.rand(128, 128)
    least, most = min(shape), max(shape)
    return _seconds("svd", lambda: torch.linalg.svdvals(small)) * (least / 128) ** 2 * (most / 128)


def in_words(seconds: float, means: str = MEANS) -> str:
    """An estimate as a plan shows it, with what it is made of."""
    return f"about {human_seconds(max(seconds, 1.0))}, {means}"


def memory_in_words(needed: float) -> str:
    """What is needed beside what is free."""
    return f"about {human_bytes(needed)}; {human_bytes(memory_free())} are free"


def _seconds(what: Hashable, work: Callable[[], object]) -> float:
    """The least seconds of one call, of as many as fit into the time: others' work makes calls slower, never faster."""
    when, least = _rates.get(what, (float("-inf"), 0.0))
    if (now := time.perf_counter()) - when < _VALID:
        return least
    work()  # the first call sets things up
    least, end = float("inf"), time.perf_counter() + _MEASURED
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    _rates[what] = now, least
    return least
