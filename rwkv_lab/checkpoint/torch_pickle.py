"""Reads the pickle inside a torch checkpoint without ever running it.

A pickle is a program for a small stack machine. `pickletools` takes it apart; the machine here knows only the
instructions that `torch.save` writes for a dict of tensors, and builds descriptions from them: no name is imported,
nothing is called. An instruction or a global that is not on the lists below makes the file unsafe.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from rwkv_lab.checkpoint.unusable import what_to_do_about
from rwkv_lab.errors import CorruptFileError, LayoutError, RwkvLabError, UnsafeFileError

STORAGE_DTYPES = {  # torch's name of the dtype by that of the class
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_NEWER_TENSOR = "torch._utils _rebuild_tensor_v3"  # written for dtypes without a storage class of their own
_PARAMETER = "torch._utils _rebuild_parameter"
_GLOBALS = {_ORDERED_DICT, _TENSOR, _PARAMETER} | {f"torch {s}" for s in STORAGE_DTYPES}


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle describes it: a view of the record `key`."""

    key: str
    dtype: str  # torch's name
    storage_numel: int
    storage_offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str  # torch's name
    numel: int


def read_tensor_pickle(data: bytes, where: str) -> dict:
    """The dict that the pickle holds, with a `PickledTensor` in the place of every tensor.

    Args:
        data: bytes of the pickle.
        where: name of the file, for messages.
    Raises:
        UnsafeFileError: the pickle asks for anything but tensors, dicts, lists, numbers and strings.
        CorruptFileError: it is not a pickle, is cut off, or does not hold a dict.
        LayoutError: tensors of a dtype such as float8.
    """
    try:
        value = _run(data, where)
    except RwkvLabError:
        raise
    except Exception as e:  # whatever else a broken pickle does to the machine: index, type, value and unicode errors
        raise CorruptFileError(f"{where}: its pickle is damaged ({type(e).__name__}: {e})") from e
    if not isinstance(value, dict):
        raise CorruptFileError(f"{where} holds {_describe(value)}, not a dict of tensors; save model.state_dict()")
    return value


def _run(data: bytes, where: str):
    stack: list = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, object] = {}

    def pop_to_mark() -> list:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for opcode, arg, _ in cast(Iterator[tuple[pickletools.OpcodeInfo, Any, int]], pickletools.genops(data)):
        op = opcode.name
        if op in ("PROTO", "FRAME"):
            pass
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(arg)
        elif op in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op])
        elif op in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[op]())
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(op[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif op == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif op == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif op == "APPENDS":
            items = pop_to_mark()
            stack[-1].extend(items)
        elif op == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            _set_items(stack[-1], [key, value])
        elif op == "SETITEMS":
            items = pop_to_mark()
            _set_items(stack[-1], items)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            if op == "STACK_GLOBAL":
                module, name = stack[-2:]
                del stack[-2:]
                arg = f"{module} {name}"
            if arg == _NEWER_TENSOR:
                raise LayoutError(
                    f"{where} holds tensors of a dtype that is not supported here, such as float8.\n"
                    "Save it as bfloat16, float16 or float32."
                )
            if arg not in _GLOBALS:
                asked = arg.replace(" ", ".")
                raise UnsafeFileError(
                    f"{where}: its pickle asks for {asked}, which is not a tensor. Nothing was run.\n"
                    f"{what_to_do_about(asked)}"
                )
            stack.append(_Global(arg))
        elif op == "BINPERSID":
            stack.append(_storage(stack.pop(), where))
        elif op == "REDUCE":
            args = stack.pop()
            stack.append(_rebuild(stack.pop(), args, where))
        elif op == "BUILD":
            stack.pop()  # state_dict()'s `_metadata`: nothing that a tensor needs
        elif op == "STOP":
            return stack.pop()
        else:
            raise UnsafeFileError(f"{where}: its pickle uses {op}, which no file of tensors needs. Nothing was run.")
    raise CorruptFileError(f"{where}: its pickle has no end")


def _set_items(target, items: list) -> None:
    if not isinstance(target, dict):
        raise UnsafeFileError("the pickle sets items on something that is not a dict. Nothing was run.")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # another type may take for ever to hash or to print
            raise CorruptFileError(f"the pickle has {_describe(key)} where a name is expected")
        if key in target:
            raise CorruptFileError(f"the name {key!r} appears twice in the file")
        target[key] = value


def _storage(pid, where: str) -> _Storage:
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Global)):
        raise UnsafeFileError(f"{where}: its pickle refers to an object outside the file. Nothing was run.")
    _, kind, key, _device, numel = pid
    dtype = STORAGE_DTYPES.get(kind.name.removeprefix("torch "))
    if dtype is None:
        raise UnsafeFileError(f"{where}: {kind.name} is not a storage. Nothing was run.")
    if not isinstance(key, str):
        raise CorruptFileError(f"{where}: a storage is called by {_describe(key)}, not by the name of a record")
    return _Storage(key, dtype, _size(numel))


def _rebuild(function, args, where: str):
    name = function.name if isinstance(function, _Global) else None
    if name == _ORDERED_DICT and args == ():
        return {}
    if name == _TENSOR and isinstance(args, tuple) and len(args) in (6, 7) and isinstance(args[0], _Storage):
        storage, offset, shape, stride = args[:4]
        shape, stride = tuple(map(_size, shape)), tuple(map(_size, stride))
        if len(shape) != len(stride):
            raise CorruptFileError(f"{where}: a tensor has shape {list(shape)} and strides {list(stride)}")
        return PickledTensor(storage.key, storage.dtype, storage.numel, _size(offset), shape, stride)
    if name == _PARAMETER and isinstance(args, tuple) and args and isinstance(args[0], PickledTensor):
        return args[0]
    raise UnsafeFileError(f"{where}: its pickle calls {_describe(function)}. Nothing was run.")


def _size(value) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        shown = value if type(value) is int and abs(value) < 1 << 64 else _describe(value)
        raise CorruptFileError(f"the pickle gives {shown} where a size is expected")
    return value


def _describe(value) -> str:
    return value.name.replace(" ", ".") if isinstance(value, _Global) else f"a {type(value).__name__}"
