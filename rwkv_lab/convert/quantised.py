"""Matrices in blocks of fewer bits: made by the package gguf, and compared with what they were made from."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from rwkv_lab.checkpoint.gguf_types import BY_NAME, TensorType
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.errors import NumericsError, ParameterError

# Largest difference between a value and what a block makes of it, in the block's steps: half a step from rounding (a
# whole one at the end of Q4_0's range that has no level), and the step itself is rounded to float16, times the levels.
STEPS = {"Q8_0": 0.5 + 127 * 2**-11, "Q4_0": 1 + 8 * 2**-11}
LEVELS = {"Q8_0": 127, "Q4_0": 8}
_SMALLEST = 2.0**-24  # of float16, in which the step is stored


def require_gguf(what: str) -> None:
    """Refuse a job that the package gguf is missing for.

    Raises:
        ParameterError: it is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise ParameterError(f"{what} needs the package gguf.\nInstall it: pip install 'rwkv_lab[convert]'") from e


def fits(shape: tuple[int, ...], kind: str) -> bool:
    """Whether rows of this length are whole blocks."""
    return len(shape) >= 2 and shape[-1] % BY_NAME[kind].elements == 0


def quantised(t: OutTensor, kind: str) -> OutTensor:
    """The tensor in blocks, made from the values of its source before any rounding."""
    blocks, source = t.compute, t.source
    if source is not None:
        blocks = lambda: source.blocks(BY_NAME[kind].elements)  # noqa: E731
    assert blocks is not None, f"{t.name} has neither a source nor a computation"
    compute = lambda: _blocks(t.name, blocks(), BY_NAME[kind])  # noqa: E731
    return OutTensor(t.name, t.shape, torch.uint8, compute=compute, quantised=kind)


def _blocks(name: str, values: Iterable[torch.Tensor], kind: TensorType) -> Iterator[torch.Tensor]:
    from gguf import GGMLQuantizationType, quantize

    for piece in values:
        flat = piece.float().flatten()
        largest = float(flat.abs().max()) if len(flat) else 0.0
        if not largest / LEVELS[kind.name] <= torch.finfo(torch.float16).max:  # NaN is not, too
            raise NumericsError(
                f"{name} has a value that no block of {kind.name} can hold: {largest}.\n"
                "Repair the source, or choose another dtype."
            )
        data = quantize(flat.numpy(), GGMLQuantizationType(kind.number))
        yield torch.from_numpy(np.ascontiguousarray(data).reshape(-1))


def excess(values: torch.Tensor, made: torch.Tensor, blocks: torch.Tensor, kind: str) -> float:
    """By how much the largest difference exceeds what the blocks allow: 1 and less is right.

    Args:
        values: of the source, flat.
        made: what the blocks mean, flat float32.
        blocks: their bytes, flat uint8; a block begins with its step in float16.
    """
    steps = blocks.view(-1, BY_NAME[kind].nbytes)[:, :2].contiguous().view(torch.float16).float().abs()
    allowed = STEPS[kind] * steps + LEVELS[kind] * _SMALLEST
    found = (values.float() - made).abs().view(-1, BY_NAME[kind].elements)
    return float((found / allowed).max()) if found.numel() else 0.0
