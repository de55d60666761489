"""Proof of a conversion: opens the output again and compares every tensor with its source.

The output is read back under BlinkDL's names, through the inverse of the table that wrote it.
"""

from collections.abc import Iterator

import torch

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.gguf_types import BY_NAME
from rwkv_lab.checkpoint.numerics import round_to
from rwkv_lab.checks import Check
from rwkv_lab.convert.adapters import verify_adapter
from rwkv_lab.convert.plan import ConvertResult
from rwkv_lab.convert.quantised import excess
from rwkv_lab.errors import ParameterError

_PIECE = 1 << 18  # elements compared at a time


@checked
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
    if plan.as_adapter:
        return verify_adapter(plan)
    dropped = {d.name for d in plan.dropped}
    with plan.source_opened(), open_checkpoint(plan.out) as written:
        source = plan.checkpoint
        missing = [n for n in source.info if n not in written.info and n not in dropped]
        extra = [n for n in written.info if n not in source.info]
        common = [n for n in source.info if n in written.info]
        blocks = [n for n in common if _in_blocks(written.info[n])]
        wrong = [n for n in common if n not in blocks and not _equal(source.info[n], written.info[n])]
        where = f", first {wrong[0]}" if wrong else ""
        checks = [
            Check("tensors missing from the re-opened output", len(missing), 0, not missing),
            Check("tensors in the output that the source does not have", len(extra), 0, not extra),
            Check(
                f"tensors that differ from their source, of {len(common) - len(blocks)}{where}",
                len(wrong),
                0,
                not wrong,
            ),
        ]
        if blocks:
            most = max(_excess(source.info[n], written.info[n]) for n in blocks)
            what = f"largest difference of the values of {len(blocks)} quantised tensors, of what their blocks allow"
            checks.append(Check(what, round(most, 4), 1, most <= 1))
        if plan.layout is not None:
            found, expected = written.layout, plan.layout
            checks.append(Check("model read back", str(found), str(expected), str(found) == str(expected)))
    return checks


def _in_blocks(info: TensorInfo) -> bool:
    return info.derived is not None and bool(info.derived.quantised)


def _excess(source: TensorInfo, written: TensorInfo) -> float:
    """As `quantised.excess`, of whole tensors, piece by piece; infinity where they have not the same size."""
    assert written.derived is not None, f"{written.name} is not quantised"
    if source.numel != written.numel:
        return float("inf")
    kind = written.derived.quantised
    nbytes = _PIECE // BY_NAME[kind].elements * BY_NAME[kind].nbytes
    pieces = zip(_pieces(source), _pieces(written), _pieces(written.derived.of, nbytes), strict=True)
    return max(excess(*piece, kind) for piece in pieces)


def _equal(source: TensorInfo, written: TensorInfo) -> bool:
    if source.numel != written.numel:
        return False
    pairs = zip(_pieces(source), _pieces(written), strict=True)
    return all(_same_bits(round_to(a, b.dtype), b) for a, b in pairs)


def _pieces(info: TensorInfo, size: int = _PIECE) -> Iterator[torch.Tensor]:
    """Its values in order, `size` at a time."""
    left = torch.empty(0, dtype=info.dtype)
    for block in info.blocks():
        left = torch.cat([left, block]) if len(left) else block
        while len(left) >= size:
            yield left[:size]
            left = left[size:]
    if len(left):
        yield left


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
