"""Arguments checked against the annotations of a function, so that a wrong one is named before any work begins.

`@checked` reads the annotations that are there anyway. Ranges are written into them, `Annotated[float, Ge(0)]`. A value
is checked, never converted: 1 is a number, True is none, a NumPy integer is a whole number, "3" is a text.

torch is not imported here: exported models and their tokenizers run without it. Where it was imported, its tensors and
devices are known.
"""

import functools
import inspect
import math
import operator
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from rwkv_lab.errors import ParameterError
from rwkv_lab.paths import path_fault

F = TypeVar("F", bound=Callable)

Size = Annotated[int, Ge(1), Le(2**31)]  # of a dimension of a tensor

_LARGEST = 2**63 - 1  # what torch and files can count to
_SHOWN = 60  # characters of a value in a message
_NAMES = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text", bytes: "bytes"}
_RANGES = {
    Ge: ("ge", operator.ge, ">="),
    Gt: ("gt", operator.gt, ">"),
    Le: ("le", operator.le, "<="),
    Lt: ("lt", operator.lt, "<"),
}


def _torch(name: str) -> Any:
    """torch's attribute of that name; where torch was not imported, a class that nothing is an instance of."""
    return getattr(sys.modules.get("torch"), name, _NotThere)


class _NotThere:
    pass


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _torch("Tensor"))


def _compiling() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].compiler.is_compiling()


@functools.cache
def _signature(function: Callable) -> inspect.Signature:
    return inspect.signature(function)


def checked(function: F) -> F:
    """Check every argument of a call against its annotation. Without one, or with Any, everything passes.

    Raises (the wrapped function):
        ParameterError: an argument that is not what its annotation says. Names the argument and its value.
    """
    called = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _compiling():  # torch.compile cannot look into this
            return function(*args, **kwargs)
        signature = _signature(function)  # not kept beside: torch.compile cannot look into one
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own message: an argument is missing, or has an unknown name
        hints = _hints(function)
        for name, value in bound.arguments.items():
            if name in hints and signature.parameters[name].kind not in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                check(called, name, value, hints[name])
        return function(*args, **kwargs)

    return cast(F, run)


def check_fields(record: Any) -> None:
    """Check the fields of a dataclass against their annotations; for its `__post_init__`.

    Raises:
        ParameterError: as `checked`.
    """
    hints = _hints(type(record))
    for field in fields(record):
        check(type(record).__name__, field.name, getattr(record, field.name), hints[field.name])


def check(called: str, name: str, value: Any, hint: Any) -> None:
    """Check one value; `called` is the function or class whose parameter it is.

    Raises:
        ParameterError: it is not what the annotation says.
    """
    if fault := _fault(value, hint):
        raise ParameterError(f"{called}: {name}={shown_value(value)}: {fault}.")


def shown_value(value: Any) -> str:
    """A value for a message: its repr, cut; of a tensor its dtype and shape."""
    if _is_tensor(value):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    try:
        text = repr(value)
    except Exception:  # another one's __repr__, or an int of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def whole_numbers(values: Iterable[int], name: str) -> list[int]:
    """Whole numbers of any iterable, tensor or array of one dimension as a list.

    Raises:
        ParameterError: it is something else; `name` is what the caller calls it.
    """
    wrong = f"{name}={shown_value(values)}: it must be a list of whole numbers."
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ParameterError(wrong)
    try:
        numbers = list(getattr(values, "tolist", lambda: values)())  # a tensor's or an array's
        if any(isinstance(x, bool) for x in numbers):
            raise ParameterError(wrong)
        return [operator.index(x) for x in numbers]
    except (TypeError, RuntimeError) as e:
        raise ParameterError(wrong) from e


@functools.cache
def _hints(of: Any) -> dict[str, Any]:
    return get_type_hints(of, include_extras=True)


def _fault(value: Any, hint: Any) -> str:
    """What is wrong with a value, in words; "" where nothing is."""
    options = _options(hint)
    if value is None and type(None) in options:
        return ""
    faults = []
    for option in options:
        fault = _fault_of_one(value, option)
        if not fault:
            break
        faults.append(fault)
    else:
        inside = [fault for fault in faults if not fault.startswith("it must be ")]  # of a fitting type: says more
        return inside[0] if inside else _must_be(hint)
    if isinstance(value, str | os.PathLike) and any(option in (Path, os.PathLike) for option in options):
        return path_fault(os.fsdecode(value))
    return _fault_of_device(value) if _torch("device") in options else ""


def _fault_of_one(value: Any, hint: Any) -> str:
    if type(value) is hint and hint in (str, bool):  # what most arguments are
        return ""
    if hint is int:
        return _fault_of_int(value)
    if hint in (None, type(None)):
        return "" if value is None else _must_be(hint)
    origin, args = _parts(hint)
    if origin is Annotated:
        fault = _fault_of_one(value, args[0])
        if fault:
            return fault if fault == _TOO_LARGE else _must_be(hint)
        return "" if _in_range(value, args[1:]) else _must_be(hint)
    if origin in (Union, types.UnionType):
        return _fault(value, hint)
    kind = origin or hint
    if kind in (list, tuple, set, frozenset, Sequence, Collection, Iterable, Iterator):
        return _fault_of_items(value, kind, args, _must_be(hint))
    if kind in (dict, Mapping) and isinstance(value, kind):
        return next(filter(None, (_fault_of_entry(k, value[k], args) for k in (value if args else ()))), "")
    return "" if _fits(value, hint, kind, args) else _must_be(hint)


def _fits(value: Any, hint: Any, kind: Any, args: tuple) -> bool:
    """Whether a value is of a type whose contents are not looked at."""
    if hint in (Any, object, inspect.Parameter.empty) or isinstance(hint, TypeVar):
        return True
    if kind is Literal:
        return any(value == x and type(value) is type(x) for x in args)
    if hint is float:
        return _is_number(value)
    if hint is Path:
        return isinstance(value, os.PathLike)
    if hint is bytes:
        return isinstance(value, bytes | bytearray)
    if kind is Callable:
        return callable(value)
    if getattr(kind, "_is_protocol", False):
        return _has_all(value, kind)
    return isinstance(value, kind) if isinstance(kind, type) else True


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple]:
    return get_origin(hint), get_args(hint)


@functools.cache
def _options(hint: Any) -> tuple:
    """The members of a union; of anything else itself."""
    origin, args = _parts(hint)
    return args if origin in (Union, types.UnionType) else (hint,)


@functools.cache
def _must_be(hint: Any) -> str:
    return f"it must be {described(hint)}"


def _fault_of_device(value: Any) -> str:
    try:
        _torch("device")(value)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return 'there is no such device; there are "cpu", "cuda", "cuda:1" and the like'
    return ""


_TOO_LARGE = "it is outside -2^63 to 2^63 - 1, the range of whole numbers"  # says more than what it must be


def _fault_of_int(value: Any) -> str:
    try:
        wrong = isinstance(value, bool) or type(value) is not int and _is_tensor(value) and value.ndim
        number = None if wrong else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None:
        return f"it must be {_NAMES[int]}"
    return "" if -_LARGEST - 1 <= number <= _LARGEST else _TOO_LARGE


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | str | bytes) or _is_tensor(value) or not hasattr(value, "__float__"):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _fault_of_items(value: Any, kind: Any, args: tuple, wrong: str) -> str:
    if isinstance(value, str | bytes) or isinstance(value, Mapping) and kind not in (Collection, Iterable):
        return wrong
    fits = isinstance(value, Sequence) if kind in (list, tuple, Sequence) else isinstance(value, kind)
    if not fits:
        return wrong
    if kind is tuple and args and args[-1] is not ...:
        return "" if len(value) == len(args) else wrong
    if not args or not (isinstance(value, Sequence | set | frozenset | Mapping) or _is_tensor(value)):
        return ""  # what can be read only once is left to the function
    if _is_tensor(value):
        return "" if args[0] in (int, Any) else wrong
    if args[0] is Any:
        return ""
    item, fault = next(((item, fault) for item in value if (fault := _fault(item, args[0]))), (None, ""))
    if not fault:
        return ""
    return f"it holds {shown_value(item)}; {fault.replace('it must be', 'each must be', 1)}"


def _fault_of_entry(key: Any, value: Any, args: tuple) -> str:
    if _fault(key, args[0]):
        return f"it holds {shown_value(key)}; each name must be {described(args[0])}"
    if _fault(value, args[1]):
        return f"{key} is {shown_value(value)}; it must be {described(args[1])}"
    return ""


def _in_range(value: Any, limits: Iterable[Any]) -> bool:
    for limit in limits:
        if type(limit) in _RANGES:
            attribute, holds, _ = _RANGES[type(limit)]
            if not holds(value, getattr(limit, attribute)):
                return False
    return True


def _has_all(value: Any, protocol: type) -> bool:
    """Whether a value has all that a Protocol names; a property is not asked for its value."""
    names = [name for name in (*protocol.__annotations__, *vars(protocol)) if not name.startswith("_")]
    return not isinstance(value, type) and all(hasattr(type(value), name) or hasattr(value, name) for name in names)


def described(hint: Any) -> str:
    """An annotation in words: "a whole number >= 1", "a text or None"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [f"{_RANGES[type(x)][2]} {getattr(x, _RANGES[type(x)][0])}" for x in args[1:] if type(x) in _RANGES]
        return " ".join([described(args[0]), " and ".join(limits)]).strip()
    if origin in (Union, types.UnionType):
        if str in args and Path in args:
            args = (Path, *(x for x in args if x not in (str, Path)))
        words = dict.fromkeys(map(described, args))
        return " or ".join(sorted(words, key=lambda one: one.startswith("a list")))  # whose items come last of all
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if hint in (None, type(None)):
        return "None"
    if hint in _NAMES:
        return _NAMES[hint]
    if hint in (Path, os.PathLike):
        return "a path"
    if hint is _torch("Tensor"):
        return "a tensor"
    kind = origin or hint
    if kind is Callable:
        return "a function"
    if kind in (dict, Mapping):
        return "a dict"
    if kind in (list, tuple, set, frozenset, Sequence, Collection, Iterable, Iterator):
        return "a list" + (f", each {described(args[0])}" if args and args[0] is not Any else "")
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member) for member in kind)
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'AEIOUaeiou' or name.startswith('RWKV') else 'a'} {name}"
