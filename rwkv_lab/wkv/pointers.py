"""The one place where compiled code gets addresses from: each is taken from a tensor that is checked there and then.

What a kernel reads or writes is decided by sizes that are passed beside the addresses. So a tensor's dtype, device,
shape, strides, and the memory that is really behind it have to be what those sizes say: a storage may be smaller than
its tensors say, since `untyped_storage().resize_` does not ask them.
"""

import ctypes
from collections.abc import Collection

import torch
from torch import Tensor

from rwkv_lab.errors import KernelError, ParameterError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype in kernels/cpu/simd.h


class Span(ctypes.Structure):
    """Memory as kernels take it: where it begins, and how many bytes are there; `kernels/cpu/spans.h`."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


NOTHING = Span(None, 0)  # for what a call does without


def span(x: Tensor, shape: Collection[int], dtypes: torch.dtype | Collection[torch.dtype] = (*DTYPES,)) -> Span:
    """The memory of a contiguous tensor of that shape and of one of these dtypes.

    Raises:
        KernelError: it is another tensor.
        ParameterError: its memory was resized or freed.
    """
    if not x.is_contiguous():
        raise KernelError(f"A tensor of shape {list(x.shape)} for compiled code is not contiguous.")
    return _span(x, shape, dtypes, x.nbytes)


def strided_span(x: Tensor, shape: Collection[int], dtypes: torch.dtype | Collection[torch.dtype]) -> Span:
    """As `span`, of a tensor with any strides, which are passed on beside it."""
    return _span(x, shape, dtypes, _needed(x))


def span_of_new(x: Tensor) -> Span:
    """The memory of a tensor that `new` has just made, and that is known nowhere else."""
    return Span(x.data_ptr(), x.nbytes)


def _span(x: Tensor, shape: Collection[int], dtypes: torch.dtype | Collection[torch.dtype], needed: int) -> Span:
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if not x.is_cpu or x.layout is not torch.strided or x.is_neg():
        raise KernelError(f"A tensor for compiled code is a {type(x).__name__}, {x.layout}, on {x.device}.")
    if x.dtype not in wanted or x.shape != tuple(shape):
        raise KernelError(
            f"A tensor for compiled code is {x.dtype} {list(x.shape)}, not {', '.join(map(str, wanted))} {list(shape)}."
        )
    there, offset = x.untyped_storage().nbytes(), x.storage_offset()
    if offset:
        there -= offset * x.itemsize
    if needed > there:
        raise ParameterError(f"A tensor of shape {list(x.shape)} {missing_memory(x)}.")
    return Span(x.data_ptr(), there)


def check(code: int, function: str) -> None:
    """What an entry point of a kernel returned.

    Raises:
        KernelError: sizes, dtypes and memory that it was given do not go together; it has touched nothing.
    """
    if code:
        raise KernelError(f"{function} was given sizes, dtypes or memory that do not go together.")


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has one number for each index, and strides that say where; nested ones do not even have a
    shape."""
    return x.layout is torch.strided and not x.is_nested


def layout_of(x: Tensor) -> str:
    """How a tensor keeps its numbers, in a word."""
    return "nested" if x.is_nested else str(x.layout).removeprefix("torch.")


def missing_memory(x: Tensor) -> str:
    """What is wrong with the memory behind a tensor, to go behind its name; "" where it holds all its numbers."""
    if not x.is_cpu or x.layout is not torch.strided:
        return ""
    try:
        there, needed = x.untyped_storage().nbytes(), _needed(x)
    except (RuntimeError, NotImplementedError):  # a tensor of torch.func, which stands for others
        return ""
    needed += x.storage_offset() * x.itemsize if needed else 0
    return f"needs {needed} bytes, its memory has {there}: it was resized or freed" if needed > there else ""


def dense(x: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of it.

    Raises:
        ParameterError: its memory was resized or freed, and torch would copy whatever lies there.
    """
    if x.is_contiguous():
        return x
    if missing := missing_memory(x):
        raise ParameterError(f"A tensor of shape {list(x.shape)} {missing}.")
    return x.contiguous()


def _needed(x: Tensor) -> int:
    """Bytes from a tensor's first number to the end of its last."""
    if x.is_contiguous() or not x.numel():
        return x.nbytes
    return (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))) * x.itemsize


def new(shape: Collection[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU without values, whatever dtype and device are the default."""
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")
