"""Matrices with adapters worked in, or taken out: in pieces of rows, in the precision of the merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

from rwkv_lab import peft
from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.adapter_set import AdapterSet
from rwkv_lab.merge.changed_tensors import ChangedTensor, Computed, from_tuned
from rwkv_lab.merge.low_rank import can_be_fused, low_rank_change
from rwkv_lab.names import is_block_matrix
from rwkv_lab.peft.adapter import Target, Values
from rwkv_lab.peft.settings import WHOLE_MATRIX

PIECES = 96  # of a block's bytes that one thread holds at most: a dozen matrices of float64 from 16-bit weights, twice


def adapted_tensors(base: Checkpoint, adapters: AdapterSet, precision: torch.dtype) -> list[ChangedTensor]:
    """One change per adapted matrix, per matrix that is only quantised, and per whole tensor.

    Raises:
        ParameterError: whole tensors that are to be taken out again.
    """
    n_layer = base.layout.n_layer if base.layout else 0
    steps: dict[str, list[tuple[Target, float]]] = {}
    whole: dict[str, tuple[Values, float]] = {}
    for i, adapter in enumerate(adapters.adapters):
        for x, target in adapter.targets.items():
            if weight := adapters.weight(i, f"{x}.weight", n_layer):
                steps.setdefault(f"{x}.weight", []).append((target, weight))
        for name, values in adapter.full.items():
            if weight := adapters.weight(i, name, n_layer):
                whole[name] = values, weight
    if adapters.unmerge and whole:
        raise ParameterError(
            f"{next(iter(whole))} stands whole in an adapter; what it replaced cannot be had from the merged file.\n"
            "Take the base that it was merged into."
        )
    lost = next((n for n, of in steps.items() for target, _ in of if not target.can_be_undone), None)
    if adapters.unmerge and lost:
        raise ParameterError(
            f"{lost}: a DoRA sets the length of every row, and what it was is in no file any more.\n"
            "Take the base that it was merged into."
        )
    quant = "none" if adapters.unmerge else adapters.quant
    action = "unmerge" if adapters.unmerge else adapters.method
    out = []
    for name, info in base.info.items():
        packed = quant != "none" and name not in whole and is_block_matrix(name, info.shape)
        if name in steps:
            out.append(_changed(name, info, steps[name], quant, adapters.unmerge, precision, action))
        elif packed and (steps or whole):
            out.append(_changed(name, info, [], quant, False, precision, "quantise"))
    return out + [from_tuned(n, base.info.get(n), cast(TensorInfo, v), w, precision) for n, (v, w) in whole.items()]


def memory_for(base: Checkpoint, adapters: AdapterSet, precision: torch.dtype) -> int:
    """Bytes that one thread holds at most: an adapter's parts for one matrix in the precision, and pieces of it."""
    parts: dict[str, int] = {}
    piece = BLOCK
    for adapter in adapters.adapters:
        for x, target in adapter.targets.items():
            # As it is stored, twice in the precision or, as factors, in float64.
            size = sum(math.prod(v.shape) * (v.dtype.itemsize + 2 * 8) for v in target.tensors.values())
            parts[x] = parts.get(x, 0) + size
    for name, info in base.info.items():
        targets = [a.targets[name[:-7]] for a in adapters.adapters if name[:-7] in a.targets]
        if targets:
            rows = _row_multiple(info, targets, adapters.quant)
            piece = max(piece, rows * info.shape[1] * info.dtype.itemsize)
    return max(parts.values()) + PIECES * piece


def _changed(
    name: str,
    info: TensorInfo,
    steps: list[tuple[Target, float]],
    quant: str,
    unmerge: bool,
    precision: torch.dtype,
    action: str,
) -> ChangedTensor:
    multiple = _row_multiple(info, [target for target, _ in steps], quant)

    def compute() -> Iterator[Computed]:
        ready = [target.prepared(weight, precision) for target, weight in steps]
        absmax = _largest(info, ready[:1], multiple, precision) if quant in WHOLE_MATRIX else None
        first = 0
        for rows in _row_blocks(info, multiple):
            before = values = rows.to(precision)  # [rows, in]
            if unmerge:
                for target in reversed(ready):
                    values = _restored(name, target, values, first)
            for i, target in enumerate([] if unmerge else ready):
                values = target.residual_rows(values, first)
                if i == 0 and quant != "none":
                    values = peft.quantised_and_back(values, quant, absmax)
                values = target.adapted_rows(values, first)
            if not ready:
                values = peft.quantised_and_back(values, quant, absmax)
            first += len(values)
            yield values.flatten(), before.flatten()

    fused = None
    if steps and quant == "none" and not unmerge and can_be_fused(info, precision):
        fused = partial(_in_one_pass, info, multiple, steps, compute)
    source = "base + tuned" if steps else "base"
    return ChangedTensor(name, action, source, info.shape, info.dtype, compute=compute, compute_rounded=fused)


def _in_one_pass(
    info: TensorInfo,
    multiple: int,
    steps: list[tuple[Target, float]],
    compute: Callable[[], Iterator[Computed]],
) -> Iterator[Computed]:
    """As `compute`, in compiled code where it can be had and the change has factors."""
    change = low_rank_change(steps)
    if change is None:
        yield from compute()
        return
    first = 0
    for rows in _row_blocks(info, multiple):
        yield change.added_to(rows, first)
        first += len(rows)


def _largest(info: TensorInfo, ready: Sequence[Target], multiple: int, precision: torch.dtype) -> torch.Tensor:
    """The largest magnitude in what training froze of a matrix."""
    largest, first = torch.zeros((), dtype=torch.float32, device="cpu"), 0
    for rows in _row_blocks(info, multiple):
        values = rows.to(precision)
        for target in ready:
            values = target.residual_rows(values, first)
        largest = torch.maximum(largest, values.float().abs().amax())
        first += len(rows)
    return largest


def _restored(name: str, target: Target, values: torch.Tensor, first: int) -> torch.Tensor:
    try:
        return target.restored_rows(values, first)
    except torch.linalg.LinAlgError as e:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericsError(f"{name}: this bat cannot be undone, its I + D has no inverse.") from e


def _row_multiple(info: TensorInfo, targets: Sequence[Target], quant: str) -> int:
    """Rows that belong together: of an adapter's tile, and of blocks of 64 values that share a scale."""
    whole_blocks = 64 // math.gcd(info.shape[1], 64) if quant in ("nf4", "fp4") else 1
    return math.lcm(whole_blocks, *(t.row_multiple for t in targets))


def _row_blocks(info: TensorInfo, multiple: int) -> Iterator[torch.Tensor]:
    """Its rows in order, `[rows, in]`, in such multiples; a strided tensor comes whole and is cut here."""
    columns = info.shape[1]
    at_once = max(BLOCK // info.dtype.itemsize // (columns * multiple), 1) * multiple
    for block in info.blocks(multiple=columns * multiple):
        yield from block.view(-1, columns).split(at_once)
