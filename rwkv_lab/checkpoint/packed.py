"""Checkpoints whose matrices rwkv_lab has stored in 8 or 4 bits: they are read as float32, matrix by matrix.

In place of a matrix `NAME` `[out,in]` such a file has the parts of one kind:

* int8: `NAME.int8` int8 `[out,in]`, `NAME.scale` float32 `[out]`
* int4: `NAME.int4` uint8 `[out,in/32,16]`, `NAME.scales` float32 `[out,in/32]`, `NAME.zero_points` uint8
* nf4: `NAME.nf4` uint8 `[out,in/2]`, the first value of a byte in its high half, `NAME.absmax` float32 `[out·in/64]`
* int8-grouped: `NAME.int8_codes` int8, `NAME.int8_scales` bfloat16, as `rwkv_lab.checkpoint.grouped` has them
* int4-grouped: `NAME.int4_codes` int16, `NAME.int4_scales` bfloat16, likewise

and a note `rwkv_lab.packed`. `export` writes the first three: the numbers of the ONNX graphs twice, and those of
bitsandbytes. `save_pretrained` writes what the model has. A model computes with all of them as they lie in the file.
Where codes are padded, the note `rwkv_lab.packed.columns` has the number of columns by name, as JSON.
`rwkv_lab.packed.activations` has what products of many tokens read, "int8" or "float32".
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rwkv_lab.checkpoint.four_bits import from_4_bits
from rwkv_lab.checkpoint.grouped import PADDING, code_shapes, padded, restored
from rwkv_lab.checkpoint.rounding import BLOCK, NF4_BLOCK, NF4_LEVELS
from rwkv_lab.checkpoint.source import Derived, TensorInfo
from rwkv_lab.errors import CorruptFileError, LayoutError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.progress import human_bytes

NOTE, VERSION = "rwkv_lab.packed", "1"
COLUMNS, ACTIVATIONS = f"{NOTE}.columns", f"{NOTE}.activations"
PARTS: dict[str, tuple[str, ...]] = {  # kind -> what is appended to the name, codes first
    "int8": ("int8", "scale"),
    "int4": ("int4", "scales", "zero_points"),
    "nf4": ("nf4", "absmax"),
    "int8-grouped": ("int8_codes", "int8_scales"),
    "int4-grouped": ("int4_codes", "int4_scales"),
}
GROUPED = {"int8-grouped": 8, "int4-grouped": 4}  # kind -> bits
Shape = tuple[int, ...]


def shown(kind: str) -> str:
    """What the option `weights` calls a kind, and messages; a type of GGUF keeps its name."""
    return kind.removesuffix("-grouped")


def part_shapes(kind: str, shape: Shape) -> dict[str, tuple[Shape, str]]:
    """Shape and dtype of every part of a matrix `[out,in]`, by what its name ends in."""
    rows, columns = shape
    if kind == "int8":
        return {"int8": (shape, "int8"), "scale": ((rows,), "float32")}
    if bits := GROUPED.get(kind):
        codes, scales = code_shapes(rows, columns, bits)
        ends = PARTS[kind]
        return {ends[0]: (codes, "int8" if bits == 8 else "int16"), ends[1]: (scales, "bfloat16")}
    if kind == "nf4":
        scales = -(-rows * columns // NF4_BLOCK)
        return {"nf4": ((rows, columns // 2), "uint8"), "absmax": ((scales,), "float32")}
    blocks = columns // BLOCK
    return {
        "int4": ((rows, blocks, BLOCK // 2), "uint8"),
        "scales": ((rows, blocks), "float32"),
        "zero_points": ((rows, (blocks + 1) // 2), "uint8"),
    }


def unpacked(tensors: Mapping[str, TensorInfo], notes: Mapping[str, str]) -> Mapping[str, TensorInfo]:
    """The tensors of a file with its packed matrices under their own names; as they are in any other file.

    Raises:
        LayoutError: packed by a newer rwkv_lab.
        CorruptFileError: a part that is missing, or of another shape or dtype.
    """
    if NOTE not in notes or not tensors:
        return tensors
    path = next(iter(tensors.values())).file.path
    if notes[NOTE] != VERSION:
        raise LayoutError(f"{path} is packed in form {notes[NOTE]!r:.40}, and {VERSION!r} is read. Update rwkv_lab.")
    ends = {f".{parts[0]}": kind for kind, parts in PARTS.items()}
    columns = _columns(notes, str(path))
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name in tensors:
        stem, dot, end = name.rpartition(".")
        if kind := ends.get(dot + end):
            parts = [f"{stem}.{part}" for part in PARTS[kind]]
            found[stem] = _matrix(stem, kind, tensors, parts, str(path), columns.get(stem))
            used |= {*parts}
    rest = {name: info for name, info in tensors.items() if name not in used}
    if twice := rest.keys() & found.keys():
        raise CorruptFileError(f"{path} has {sorted(twice)[0]} packed and as it is.")
    return rest | found


def parts_of(info: TensorInfo) -> tuple[str, list[TensorInfo]] | None:
    """Kind and parts of a matrix that a model can compute with as it lies in the file; None of any other."""
    derived = info.derived
    if derived is None or derived.quantised not in PARTS:
        return None
    return derived.quantised, [derived.of, *derived.others]


def values_of(kind: str, parts: Sequence[torch.Tensor], columns: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The matrix `[out,in]` of its parts: float32, code times scale; in `dtype` where that of the codes is wider."""
    codes, scales, *others = parts
    if kind in GROUPED:
        return restored(codes, scales, columns, GROUPED[kind], dtype).contiguous()
    if kind == "int8":
        found = codes.float() * scales[:, None]
    elif kind == "int4":
        zeros = _singles(others[0])[:, : scales.shape[1], None]
        found = ((_singles(codes).float() - zeros.float()) * scales[..., None]).flatten(1)
    else:
        n = len(codes) * columns
        found = from_4_bits(codes, scales, n, torch.float32, NF4_BLOCK, NF4_LEVELS).view(-1, columns)
    return found if dtype is None else found.to(dtype)


def in_few_bits(infos: Iterable[TensorInfo]) -> str:
    """Which matrices have 8 bits or fewer in the file, those of GGUF too, in words: how many of which form, their bytes
    there and as float32; "" where none has."""
    counts, sizes, wide = Counter[str](), Counter[str](), 0
    for info in infos:
        if info.derived is not None and info.derived.quantised:
            kind = shown(info.derived.quantised)
            counts[kind] += 1
            sizes[kind] += sum(part.nbytes for part in (info.derived.of, *info.derived.others))
            wide += info.nbytes
    forms = ", ".join(f"{count} in {kind} ({human_bytes(sizes[kind])})" for kind, count in counts.items())
    return f"{forms}; {human_bytes(wide)} as float32" if forms else ""


def refuse_packed(path: Path, infos: Iterable[TensorInfo], job: str) -> None:
    """Refuse a model in 8 or 4 bits where weights are needed as they were before.

    Args:
        job: that needs them, as the beginning of a sentence.
    Raises:
        LayoutError: says how it is packed, and what to do.
    """
    if kinds := Counter(shown(found[0]) for info in infos if (found := parts_of(info))):
        described = ", ".join(f"{count} in {kind}" for kind, count in kinds.items())
        raise LayoutError(
            f"{path} is packed: of its matrices {described}. "
            f"{job} needs weights in 16 or 32 bits: give the model it was packed from.\n"
            "What is left of them, rounded as they are:\n"
            f'RWKV_Dual.from_pretrained("{path}", weights="dense").save_pretrained(folder)'
        )


def columns_note(columns: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """What the file says of matrices, name -> (columns, bits), whose rows of codes are longer than they are."""
    longer = {name: n for name, (n, bits) in columns.items() if padded(n, bits) != n}
    return {COLUMNS: json.dumps(longer)} if longer else {}


def _columns(notes: Mapping[str, str], path: str) -> dict[str, int]:
    try:
        found = json.loads(notes.get(COLUMNS, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(type(n) is int for n in found.values()):
        raise CorruptFileError(f"{path}: its note {COLUMNS} is {notes[COLUMNS]!r:.60}, no numbers of columns by name.")
    return found


def _matrix(
    name: str, kind: str, tensors: Mapping[str, TensorInfo], parts: list[str], path: str, columns: int | None
) -> TensorInfo:
    if missing := [part for part in parts if part not in tensors]:
        raise CorruptFileError(f"{path} has {parts[0]} and no {missing[0]}.")
    codes, *others = (tensors[part] for part in parts)
    per_code = {"int8": 1, "int8-grouped": 1, "int4-grouped": 4}.get(kind, 2)
    shape = (codes.shape[0], per_code * math.prod(codes.shape[1:])) if len(codes.shape) > 1 else (0, 0)
    if columns is not None and kind in GROUPED:
        if not 0 <= shape[1] - columns < PADDING[GROUPED[kind]]:
            raise CorruptFileError(f"{path}: {name} would have {columns} columns, {parts[0]} has codes of {shape[1]}.")
        shape = (shape[0], columns)
    expected = part_shapes(kind, shape)
    for info, (needed, dtype) in zip((codes, *others), expected.values(), strict=True):
        if info.shape != needed or info.dtype_name != dtype:
            raise CorruptFileError(
                f"{path}: {info.name} is {info.dtype_name} {list(info.shape)}; as a part of {name} {list(shape)} "
                f"it would be {dtype} {list(needed)}."
            )
    compute = partial(_read_values, kind, others, shape[1])
    derived = Derived(codes, compute, quantised=kind, others=tuple(others))
    return replace(codes, name=name, shape=shape, dtype_name="float32", crc32=None, storage=None, derived=derived)


def _read_values(kind: str, others: list[TensorInfo], columns: int, codes: torch.Tensor) -> torch.Tensor:
    return values_of(kind, [codes, *(info.read() for info in others)], columns)


def _singles(pairs: torch.Tensor) -> torch.Tensor:
    """Numbers of 4 bits, two to a byte, the first in its low half: `[...,n]` -> `[...,2n]`."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
