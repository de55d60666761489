"""Proof of a conversion: opens the output again and compares every tensor with its source.

The output is read back under BlinkDL's names, through the inverse of the table that wrote it. Of tensors that lie in
both files as they are, the CRC-32 of the output's bytes is compared with that of the source's: taken as they were read
for writing, or stated in the source's header and compared with them then. Of others both are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from isal.isal_zlib import crc32

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.foreign_format import HALVED, general_name
from rwkv_lab.checkpoint.numerics import round_to
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.checkpoint.stream import WORKERS, OneLarge, one_torch_thread_each
from rwkv_lab.checks import Check
from rwkv_lab.convert.adapters import verify_adapter
from rwkv_lab.convert.plan import ConvertPlan, ConvertResult, place_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.progress import Progress

Pair = tuple[TensorInfo, TensorInfo]  # (of the source, as written)

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
        pairs = {n: (source.info[n], written.info[n]) for n in source.info if n in written.info}
        found = _compared(pairs, _Known(_halvings(plan), result.checksums), f"comparing {plan.out.name}")
        blocks = [n for n in pairs if _in_blocks(written.info[n])]
        wrong = [n for n in pairs if n not in blocks and found[n]]
        where = f", first {wrong[0]}" if wrong else ""
        checks = [
            Check("tensors missing from the re-opened output", len(missing), 0, not missing),
            Check("tensors in the output that the source does not have", len(extra), 0, not extra),
            Check(
                f"tensors that differ from their source, of {len(pairs) - len(blocks)}{where}", len(wrong), 0, not wrong
            ),
        ]
        if blocks:
            most = max(found[n] for n in blocks)
            what = f"largest difference of the values of {len(blocks)} quantised tensors, of what their blocks allow"
            checks.append(Check(what, round(most, 4), 1, most <= 1))
        if plan.layout is not None:
            found_layout, expected = str(written.layout), str(plan.layout)
            same = found_layout == expected
            values = ("the source's", "the source's") if same else (found_layout, expected)
            checks.append(Check("layout of the model, read back", *values, same))
    return checks


def _halvings(plan: ConvertPlan) -> dict[str, int]:
    """How often `rescale` halves each tensor of the source that it halves at all."""
    if not plan.spec.rescale or plan.format is None:
        return {}
    rows = {row.ours for row in plan.format.rows if row.transform is HALVED}
    layers = {name: layer for name in plan.checkpoint.info for row, layer in [general_name(name)] if row in rows}
    return {name: layer // plan.spec.rescale for name, layer in layers.items() if layer >= plan.spec.rescale}


@dataclass(frozen=True)
class _Known:
    """What is known of the source beside its files."""

    halvings: Mapping[str, int]  # by name
    checksums: Mapping[str, int]  # as of `ConvertResult`

    def crc32(self, source: TensorInfo) -> int | None:
        """Of its bytes; None where it is not known."""
        return self.checksums.get(place_of(source)) if source.crc32 is None else source.crc32


def _compared(pairs: Mapping[str, Pair], known: _Known, label: str) -> dict[str, float]:
    """What is wrong with each tensor: of quantised ones as `quantised.excess`, else 1 where any bit differs.

    A few threads take one tensor each, the largest first, as when writing.
    """
    names = sorted(pairs, key=lambda n: -pairs[n][0].nbytes)
    total, found, large = sum(source.nbytes for source, _ in pairs.values()), dict[str, float](), OneLarge()
    with one_torch_thread_each(), Progress(label, total) as progress, ThreadPoolExecutor(WORKERS) as pool:
        try:  # an interrupt may come while work is handed out
            futures = {pool.submit(_difference, n, *pairs[n], known, large): n for n in names}
            for future in as_completed(futures):
                name = futures[future]
                found[name] = future.result()
                progress.advance(pairs[name][0].nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _difference(name: str, source: TensorInfo, written: TensorInfo, known: _Known, large: OneLarge) -> float:
    with large.held(source.gathered + written.gathered):
        return _difference_of(source, written, known.crc32(source), known.halvings.get(name, 0))


def _difference_of(source: TensorInfo, written: TensorInfo, crc: int | None, halvings: int) -> float:
    if source.numel != written.numel:
        return float("inf")
    if _in_blocks(written):
        from rwkv_lab.convert.quantised import excess

        return excess(source, written)
    if source.plain and written.plain and source.dtype == written.dtype:
        return float(not _same_bytes(source, written) if crc is None else not _has_crc(written, crc))
    pairs = zip(source.pieces(_PIECE), written.pieces(_PIECE), strict=True)
    return float(not all(_same_bits(_rounded(a, b.dtype, halvings), b) for a, b in pairs))


def _rounded(values: torch.Tensor, dtype: torch.dtype, halvings: int) -> torch.Tensor:
    """What a dtype leaves of values that lie in it halved so often."""
    return round_to(values.double() / 2**halvings, dtype) * 2**halvings if halvings else round_to(values, dtype)


def _in_blocks(info: TensorInfo) -> bool:
    return info.derived is not None and bool(info.derived.quantised)


def _has_crc(info: TensorInfo, expected: int) -> bool:
    """Whether the bytes in the file have this checksum.

    Raises:
        CorruptFileError: they have it, and not the one that was saved with them.
    """
    buffer, crc = bytearray(min(BLOCK, info.nbytes)), 0
    for start in range(0, info.nbytes, BLOCK):
        block = memoryview(buffer)[: min(BLOCK, info.nbytes - start)]
        info.file.read_into(block, info.offset + start)
        crc = crc32(block, crc)
    if crc != expected:
        return False
    info.check(crc)
    return True


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors that lie in their files as they are have the same bytes.

    Raises:
        CorruptFileError: the bytes of one do not have the checksum that was saved with them.
    """
    ours, theirs, crc = bytearray(), bytearray(), 0
    recorded = a.crc32 is not None or b.crc32 is not None
    for start in range(0, a.nbytes, BLOCK):
        size = min(BLOCK, a.nbytes - start)
        if len(ours) != size:
            ours, theirs = bytearray(size), bytearray(size)
        a.file.read_into(memoryview(ours), a.offset + start)
        b.file.read_into(memoryview(theirs), b.offset + start)
        if ours != theirs:
            return False
        if recorded:
            crc = crc32(ours, crc)
    a.check(crc)  # of equal bytes the checksum is that of both
    b.check(crc)
    return True


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
