"""Proof of a conversion: opens the output again and compares every tensor with its source.

The output is read back under BlinkDL's names, through the inverse of the table that wrote it.
"""

from collections.abc import Iterator

import torch

from rwkv_lab.checkpoint import TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.numerics import round_to
from rwkv_lab.checks import Check
from rwkv_lab.convert.plan import ConvertResult
from rwkv_lab.errors import ParameterError

_PIECE = 1 << 18  # elements compared at a time


def verify_convert(result: ConvertResult) -> list[Check]:
    """Compare the output of a conversion with its source, tensor by tensor, bit for bit after the one rounding that a
    dtype asks for.

    Raises:
        ParameterError: the result of a dry run, which wrote nothing.
        CorruptFileError, LayoutError: the output cannot be read back.
    """
    plan = result.plan
    if not result.outputs:
        raise ParameterError(f"{plan.out} was not written: this is the result of a dry run")
    dropped = {d.name for d in plan.dropped}
    with plan.source_opened(), open_checkpoint(plan.out) as written:
        source = plan.checkpoint
        missing = [n for n in source.info if n not in written.info and n not in dropped]
        extra = [n for n in written.info if n not in source.info]
        common = [n for n in source.info if n in written.info]
        wrong = [n for n in common if not _equal(source.info[n], written.info[n])]
        where = f", first {wrong[0]}" if wrong else ""
        checks = [
            Check("tensors missing from the re-opened output", len(missing), 0, not missing),
            Check("tensors in the output that the source does not have", len(extra), 0, not extra),
            Check(f"tensors that differ from their source, of {len(common)}{where}", len(wrong), 0, not wrong),
        ]
        if plan.layout is not None:
            found, expected = written.layout, plan.layout
            checks.append(Check("model read back", str(found), str(expected), str(found) == str(expected)))
    return checks


def _equal(source: TensorInfo, written: TensorInfo) -> bool:
    if source.numel != written.numel:
        return False
    pairs = zip(_pieces(source), _pieces(written), strict=True)
    return all(_same_bits(round_to(a, b.dtype), b) for a, b in pairs)


def _pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
    """Its values in order, `_PIECE` at a time."""
    left = torch.empty(0, dtype=info.dtype)
    for block in info.blocks():
        left = torch.cat([left, block]) if len(left) else block
        while len(left) >= _PIECE:
            yield left[:_PIECE]
            left = left[_PIECE:]
    if len(left):
        yield left


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
