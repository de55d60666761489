"""What an adapter is known again by: its values, whatever file, layout, prefix or dtype they come in.

Of each matrix that it changes a sketch is kept: the change, Δ, projected on eight fixed directions u ⊗ v of signs,
uᵀ Δ v, without its length and rounded to bytes. A projection is linear, so that a cast moves it by as little as it
moves Δ, where a hash would be another one. The length depends on alpha, which a file may not state. Sketches of
unrelated changes stand at any angle; those of one change in two dtypes are parallel.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import lru_cache
from statistics import median

from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.random_numbers import draws
from rwkv_lab.peft.adapter import Adapter, Target

Content = Mapping[str, str]  # layer -> sketch, as text

_DIRECTIONS = 8
_PARALLEL = 0.99  # cosine of two sketches of one change; bytes and casts cost less than 0.001
_CLOSE = 0.6  # median over layers: a hundred unrelated ones stay below 0.2
_LEAST = 4  # layers that such a median takes
_BLANK = base64.b64encode(bytes(_DIRECTIONS)).decode()
_NOT_FINITE = base64.b64encode(b"\x80" * _DIRECTIONS).decode()  # of the same length; no projection is -128


def blank(adapter: Adapter) -> dict[str, str]:
    """A content of the same length as any of this adapter, where its values are not read yet."""
    return dict.fromkeys(adapter.targets, _BLANK)


def content_of(adapter: Adapter) -> dict[str, str]:
    """Reads the adapter's values, one matrix at a time."""
    return {x: _as_text(_sketch(target)) for x, target in adapter.targets.items()}


def same_layers(a: Content, b: Content) -> int:
    """How many matrices both change alike."""
    return sum(cosine > _PARALLEL for cosine in _cosines(a, b))


def without_change(content: Content) -> int:
    """How many matrices an adapter names and does not change."""
    return sum(text == _BLANK for text in content.values())


def is_same(new: Content, held: Content) -> bool:
    """Whether most of what an adapter changes is changed alike by the other one."""
    return 2 * same_layers(new, held) > len(new)


def closeness(new: Content, held: Content) -> float:
    """The median cosine of what two adapters change; 0 where it is that of unrelated ones, or of few matrices."""
    cosines = _cosines(new, held)
    middle = median(cosines) if len(cosines) >= _LEAST else 0.0
    return middle if middle > _CLOSE else 0.0


def _cosines(a: Content, b: Content) -> list[float]:
    pairs = [(_vector(a[x]), _vector(b[x])) for x in a if x in b]
    lengths = [(one, other, float(np.linalg.norm(one) * np.linalg.norm(other))) for one, other in pairs]
    return [float(one @ other) / length for one, other, length in lengths if length]


def _sketch(target: Target) -> torch.Tensor:
    factors = target.factors()
    if factors is None:  # no product that would be the change; its own values then
        flat = torch.cat([values.read().double().flatten() for _, values in sorted(target.tensors.items())])
        return _signs(len(flat), 0)[:, : len(flat)] @ flat
    left, right = factors  # [out, k], [k, in]
    u, v = _signs(left.shape[0], 0), _signs(right.shape[1], 1)
    return ((u @ left) * (v @ right.T)).sum(1)


def _signs(count: int, side: int) -> torch.Tensor:
    """`[8, count]` of 1 and -1, the same on every machine."""
    size = 1 << max(count - 1, 1).bit_length()
    return _all_signs(size, side)[:, :count]


@lru_cache(8)
def _all_signs(size: int, side: int) -> torch.Tensor:
    rows = [draws(0, i + side * _DIRECTIONS, "adapter content", 0, size) for i in range(_DIRECTIONS)]
    return torch.where(torch.stack(rows) < 0.5, -1.0, 1.0).double()


def _as_text(sketch: torch.Tensor) -> str:
    largest = float(sketch.abs().max())
    if largest == 0:
        return _BLANK
    if not largest < float("inf"):
        return _NOT_FINITE
    return base64.b64encode((sketch / largest * 127).round().to(torch.int8).numpy().tobytes()).decode()


def _vector(text: object) -> np.ndarray:
    if text == _NOT_FINITE:
        return np.zeros(_DIRECTIONS)
    try:
        found = np.frombuffer(base64.b64decode(str(text), validate=True), np.int8).astype(float)
    except ValueError:
        return np.zeros(_DIRECTIONS)
    return found if len(found) == _DIRECTIONS else np.zeros(_DIRECTIONS)
