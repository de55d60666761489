"""Reads the header of a .safetensors file, and refuses one that does not add up to the last byte.

Format: 8 bytes N (little endian), N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the data without gaps.
"""

import json
from itertools import pairwise

from rwkv_lab.checkpoint.json_files import unique_keys
from rwkv_lab.checkpoint.source import SourceFile, TensorInfo, is_name
from rwkv_lab.errors import CorruptFileError

DTYPES = {  # torch's name by the format's
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """True for a file that begins with a length that fits into it, or goes on with the brace of a JSON object."""
    return len(head) >= 9 and (head[8:9] == b"{" or 0 < int.from_bytes(head[:8], "little") <= size - 8)


def read_safetensors_header(file: SourceFile) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors by name in file order, `__metadata__`).

    Raises:
        CorruptFileError: any disagreement between header, shapes, dtypes, offsets and the size of the file.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER or 8 + length > file.size:
        raise CorruptFileError(
            f"{file.path}: its header claims {length} bytes, the file has {file.size}: truncated, or not safetensors"
        )
    raw = file.read(8, length)
    header = _parse(raw, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFileError(f"{file.path}: __metadata__ in its header is not a dict of strings")
    tensors = {name: _tensor_info(name, entry, 8 + length, file) for name, entry in header.items()}
    _check_cover(tensors, 8 + length, file)
    return tensors, metadata


def _parse(raw: bytes, file: SourceFile) -> dict:
    if not raw.startswith(b"{"):
        raise CorruptFileError(f"{file.path}: its header starts with {raw[:8]!r}, not with a JSON object")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys(file.path, "its header"))
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise CorruptFileError(f"{file.path}: its header is not UTF-8 JSON ({e})") from e


def _tensor_info(name: str, entry, data_start: int, file: SourceFile) -> TensorInfo:
    def bad(why: str) -> CorruptFileError:
        return CorruptFileError(f"{file.path}: the tensor {name!r} in its header {why}")

    if not is_name(name):
        raise bad("has a name with control characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        raise bad(f"has the shape {shape!r}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise bad(f"has the offsets {offsets!r}")
    info = TensorInfo(name, tuple(shape), DTYPES[dtype], file, offset=data_start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise bad(
            f"has shape {shape} of {dtype}, that is {info.nbytes} bytes, but its offsets span {offsets[1] - offsets[0]}"
        )
    return info


def _check_cover(tensors: dict[str, TensorInfo], data_start: int, file: SourceFile) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    order = sorted(tensors.values(), key=lambda t: (t.offset, t.offset + t.nbytes))
    if order and order[0].offset != data_start:
        raise CorruptFileError(
            f"{file.path}: {order[0].offset - data_start} bytes before {order[0].name!r} belong to no tensor"
        )
    for before, after in pairwise(order):
        gap = after.offset - (before.offset + before.nbytes)
        if gap:
            what = "overlap" if gap < 0 else "leave a gap"
            raise CorruptFileError(
                f"{file.path}: the tensors {before.name!r} and {after.name!r} {what} ({abs(gap)} bytes)"
            )
    expected = order[-1].offset + order[-1].nbytes if order else data_start
    if file.size < expected:
        raise CorruptFileError(f"{file.path} looks truncated: expected {expected} bytes, have {file.size}")
    if file.size > expected:
        raise CorruptFileError(f"{file.path}: {file.size - expected} bytes after the last tensor belong to nothing")
