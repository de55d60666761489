"""What Python and the C++ of `kernels/cpu` have to agree on: structs, enums and argument types.

The names are those of the C++ sources; a test compares order and types with their text.
"""

import ctypes

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PACKED_FORMATS = {8: 3, 4: 4}  # bits per weight -> Tensor.format
NONE, TANH, SIGMOID, RELU_SQUARE = range(4)  # Activation of mix.cpp


class Tensor(ctypes.Structure):
    """A parameter as the step reads it; `weights.h`."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("turned", ctypes.c_int32),
    ]


class Model(ctypes.Structure):
    """A model and its sizes; `step.h`."""

    _fields_ = [
        ("tensors", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("dtype", "L", "C", "A", "F", "V", "H", "N")),
        ("norm_eps", ctypes.c_float),
        ("head_norm_eps", ctypes.c_float),
        ("generation", ctypes.c_int32),
        ("rescale", ctypes.c_int32),
    ]


class Call(ctypes.Structure):
    """Tokens, and states before and after; `step.h`."""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("B", ctypes.c_int64),
        ("wkv", ctypes.c_void_p),
        ("wkv_strides", ctypes.c_int64 * 5),
        ("att_shift", ctypes.c_void_p),
        ("ffn_shift", ctypes.c_void_p),
        ("att_strides", ctypes.c_int64 * 2),
        ("ffn_strides", ctypes.c_int64 * 2),
        ("new_wkv", ctypes.c_void_p),
        ("new_att_shift", ctypes.c_void_p),
        ("new_ffn_shift", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


class Product(ctypes.Structure):
    """One matrix product of the prefill; `matmul.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "k", "n", "w_dtype", "w_along_n", "w_along_k")),
        *((name, ctypes.c_int64) for name in ("y_dtype", "y_apart", "add")),
    ]


class Laying(ctypes.Structure):
    """Activations to be laid out for a product; `mix.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "laid")),
        *((name, ctypes.c_int64) for name in ("apart", "k", "activation")),
    ]
