"""What Python and the C++ of `kernels/cpu` have to agree on: enums, structs, and the arguments of functions.

Names are those of the C++ sources; `tests/model/cpu/test_abi.py` compares order and types with their text.
"""

import ctypes
from collections.abc import Mapping

from rwkv_lab.wkv.cpu import library_on_torch_threads
from rwkv_lab.wkv.loader import cpu_library
from rwkv_lab.wkv.pointers import DTYPES, Span

__all__ = ["DTYPES"]

POINTER, INT32, INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double

# Kinds of `rwkv_lab.checkpoint.packed` -> INT8, INT4, ROWS8, BLOCKS4, NF4 in weights.h
QUANTISED = {"int8-grouped": 3, "int4-grouped": 4, "int8": 5, "int4": 6, "nf4": 7}
PATHS = {"any": 1, "avx2": 2, "avx_vnni": 3, "avx512_vnni": 4}  # IntegerPath in integer.h
NONE, TANH, SIGMOID, RELU_SQUARE = range(4)  # Activation in mix.cpp


class Tensor(ctypes.Structure):
    """A parameter as the step reads it; weights.h."""

    _fields_ = [
        ("data", POINTER),
        ("scales", POINTER),
        ("format", INT32),
        ("rows", INT32),
        ("columns", INT32),
        ("transposed", INT32),
        ("bytes", INT64),
        ("scales_bytes", INT64),
        ("zeros", POINTER),
        ("zeros_bytes", INT64),
    ]


class Model(ctypes.Structure):
    """A model and its sizes; step.h."""

    _fields_ = [
        ("tensors", POINTER),
        *((name, INT32) for name in ("dtype", "L", "C", "A", "F", "V", "H", "N")),
        ("norm_eps", FLOAT),
        ("head_norm_eps", FLOAT),
        ("generation", INT32),
        ("rescale", INT32),
        ("n_tensors", INT64),
    ]


class Call(ctypes.Structure):
    """Tokens, and states before and after; step.h."""

    _fields_ = [
        ("tokens", POINTER),
        ("B", INT64),
        ("wkv", POINTER),
        ("wkv_strides", INT64 * 5),
        ("att_shift", POINTER),
        ("ffn_shift", POINTER),
        ("att_strides", INT64 * 2),
        ("ffn_strides", INT64 * 2),
        ("new_wkv", POINTER),
        ("new_att_shift", POINTER),
        ("new_ffn_shift", POINTER),
        ("logits", POINTER),
        ("threads", INT64),
        *(
            (f"{name}_bytes", INT64)
            for name in ("tokens", "wkv", "att", "ffn", "new_wkv", "new_att", "new_ffn", "logits")
        ),
    ]


class Product(ctypes.Structure):
    """One matrix product of the prefill; matmul.h."""

    _fields_ = [
        *((name, POINTER) for name in ("x", "w", "y")),
        *((name, INT64) for name in ("rows", "k", "n", "w_dtype", "w_stride_n", "w_stride_k")),
        *((name, INT64) for name in ("y_dtype", "y_stride", "add", "x_bytes", "w_bytes", "y_bytes")),
        ("scales", POINTER),
        ("scales_bytes", INT64),
        ("integers", INT64),
        ("zeros", POINTER),
        ("zeros_bytes", INT64),
    ]


class Packing(ctypes.Structure):
    """Activations that are to be packed for a product; mix.cpp."""

    _fields_ = [
        *((name, POINTER) for name in ("y", "packed")),
        *((name, INT64) for name in ("stride", "k", "activation", "y_bytes", "packed_bytes")),
    ]


_NORM = (Span, Span, DOUBLE, INT64)  # weight, bias, eps, dtype

# Function -> its arguments. All return a number; where they are given memory, 0 says that it fits the sizes.
PREFILL = {
    "has_pairs": (),
    "packed_floats": (INT64,) * 3,
    "has_integer_path": (INT64,),
    "integer_path": (),
    "multiply_all": (Span, *(INT64,) * 3),
    "embed": (Span, Span, *_NORM, *(INT64,) * 3, Span, INT64),
    "norm_out": (Span, *_NORM, INT64, INT64, Span, INT64, INT64),
    "mix_in": (Span, *_NORM, *(INT64,) * 3, Span, Span, INT64, Span, INT64, Span, Span, INT64, INT64),
    "activate": (Span, *(INT64,) * 4),
    "gates7": (*(Span,) * 12, *(INT64,) * 5),
    "decays6": (Span, Span, *(INT64,) * 4),
    "heads_out": (Span, *_NORM[:3], *(Span,) * 5, *(INT64,) * 5, Span, INT64, INT64),
    "gate4": (Span, Span, INT64, INT64, Span, INT64, INT64),
    "add_gated": (*(Span,) * 3, *(INT64,) * 3),
}
STEP = {"step": (POINTER, POINTER)}
PACK = {"pack": (Span, *(INT64,) * 4, Span, Span, INT64), "pack_nf4": (Span, INT64, INT64, Span, Span, INT64)}


def prefill_library() -> ctypes.CDLL:
    """The functions of mix.cpp.

    Raises:
        KernelError: as `cpu_library`.
    """
    return _declared(library_on_torch_threads("mix"), PREFILL)


def step_library() -> ctypes.CDLL:
    """The function `step` of step.cpp.

    Raises:
        KernelError: as `cpu_library`.
    """
    return _declared(cpu_library("step"), STEP)


def packing_library() -> ctypes.CDLL:
    """The functions of pack.cpp.

    Raises:
        KernelError: as `cpu_library`.
    """
    return _declared(cpu_library("pack"), PACK)


def _declared(library: ctypes.CDLL, functions: Mapping[str, tuple]) -> ctypes.CDLL:
    """The library, its functions told their arguments: a wrong number or type of them raises ArgumentError."""
    if library not in _known:
        for name, arguments in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = INT64, arguments
        _known.add(library)
    return library


_known: set[ctypes.CDLL] = set()
