"""What a mixing method takes, read from its signature: name, type, default, range and help stand only there.

A method is a plain function on blocks of tensors:

    def method(base: Tensor, tuned: Tensors, *, <parameters>, …) -> Tensor

`base` and each of `tuned` are flat pieces `[n]` of one tensor of each model, in the precision of the merge; the answer
is `[n]` too. Behind the `*` stands what a caller may choose, as `Annotated[type, Takes(help, …)]`, and what the merge
finds for the method before or on the way: `Annotated[type, Look(function)]` for something that needs the whole tensor
(a norm, a threshold), and `draws: Draws` for random numbers. A method is tried on empty tensors when a merge is
planned: it may refuse what it is given with a `ParameterError` there.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, get_args, get_type_hints

import torch
from torch import Tensor

from rwkv_lab.errors import ParameterError

LARGEST = torch.finfo(torch.float32).max  # of every number: the arithmetic is float32
Blocks = Callable[[], Iterator[tuple[Tensor, list[Tensor]]]]  # each call goes through the tensor again, (base, tuned)
Draws = Callable[[int, int], Tensor]  # (seed, which of tuned) -> [n] float64, uniform in [0, 1)


@dataclass(frozen=True)
class Takes:
    """A parameter that a caller may choose."""

    help: str
    low: float = -math.inf
    high: float = math.inf
    each: str = ""  # "tuned": one number per tuned model; "model": one for the base, then one per tuned model


@dataclass(frozen=True)
class Look:
    """A value that is found by going through the whole tensor: `function(blocks, …)`, with any of the parameters."""

    function: Callable


@dataclass(frozen=True)
class Models:
    """How many tuned models a method mixes."""

    least: int = 1
    most: int | None = None


Tensors = Annotated[Sequence[Tensor], Models()]
Two = Annotated[Sequence[Tensor], Models(1, 1)]
Several = Annotated[Sequence[Tensor], Models(2)]


@dataclass(frozen=True)
class Parameter:
    name: str
    type: type  # float, int or bool
    takes: Takes
    default: object  # `inspect.Parameter.empty` where it must be given


@dataclass(frozen=True)
class Signature:
    models: Models
    parameters: dict[str, Parameter]
    looks: dict[str, Callable]
    draws: bool

    def check_names(self, method: str, given: Mapping[str, object]) -> None:
        """Refuse a name that the method does not take, and the lack of one that it needs.

        Raises:
            ParameterError: with the nearest name, or the help of the missing one.
        """
        for name in given:
            if name not in self.parameters:
                near = get_close_matches(name, self.parameters, n=1)
                hint = f"; did you mean {near[0]}?" if near else "."
                takes = ", ".join(self.parameters) or "none"
                raise ParameterError(f"method {method!r} takes no parameter {name!r}{hint}\nIt takes: {takes}")
        for name, p in self.parameters.items():
            if p.default is inspect.Parameter.empty and name not in given:
                raise ParameterError(f"method {method!r} needs {name}: {p.takes.help}")

    def check_count(self, method: str, count: int) -> None:
        """Refuse too few or too many tuned models.

        Raises:
            ParameterError: says how many it takes.
        """
        least, most = self.models.least, self.models.most
        if count < least or most is not None and count > most:
            needs = f"{least}" if least == most else f"at least {least}"
            raise ParameterError(f"method {method!r} takes {needs} tuned models beside the base; {count} are given")


def signature_of(method: Callable) -> Signature:
    """Read a method's parameters from its annotations."""
    hints = get_type_hints(method, include_extras=True)
    models, parameters, looks, draws = Models(), {}, {}, False
    for name, p in inspect.signature(method).parameters.items():
        marks = get_args(hints[name])[1:]
        for mark in marks:
            if isinstance(mark, Models):
                models = mark
            elif isinstance(mark, Look):
                looks[name] = mark.function
            elif isinstance(mark, Takes):
                kind = get_args(hints[name])[0]
                parameters[name] = Parameter(name, kind if kind in (int, bool) else float, mark, p.default)
        draws = draws or name == "draws"
    return Signature(models, parameters, looks, draws)


def checked(parameter: Parameter, value: object, tuned: int, where: str) -> object:
    """`value` as the method gets it: of its type, in its range, as many numbers as there are models.

    Args:
        tuned: number of tuned models.
        where: the tensor it is for, for the message.
    Raises:
        ParameterError: says what is wrong with it.
    """
    name, takes = parameter.name, parameter.takes
    if value is inspect.Parameter.empty:
        raise ParameterError(
            f"{name}: no pattern fits{where.removeprefix(' for')}; say '*' for the rest ({takes.help})"
        )
    if not takes.each:
        return _number(parameter, value, where)
    wanted = tuned + (takes.each == "model")
    if isinstance(value, (list, tuple)):
        if len(value) != wanted:
            who = "the base and each tuned model" if takes.each == "model" else "each tuned model"
            raise ParameterError(
                f"{name} has {len(value)} numbers{where}; {wanted} are needed, one for {who}: {takes.help}"
            )
        return [_number(parameter, v, where) for v in value]
    one = _number(parameter, value, where)
    if takes.each == "tuned":
        return [one] * tuned
    if tuned > 1:
        raise ParameterError(f"{name}={value!r}{where}: with {tuned + 1} models a list of {wanted} numbers is needed")
    return [1 - one, one]


def _number(parameter: Parameter, value: object, where: str) -> object:
    name, takes = parameter.name, parameter.takes
    said = f"{name}={value!r}{where}"
    if parameter.type is bool:
        if not isinstance(value, bool):
            raise ParameterError(f"{said}: True or False is needed ({takes.help})")
        return value
    numbers = int if parameter.type is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise ParameterError(f"{said}: a {'whole ' if parameter.type is int else ''}number is needed ({takes.help})")
    # Compared, not converted: a whole number may be too large for any float.
    fits = takes.low <= value <= takes.high and (parameter.type is int or -LARGEST <= value <= LARGEST)
    if not fits:
        bounds = f"finite, and at most {LARGEST:.4g} (float32)" if takes.low == -math.inf else f"{takes.low:g} or more"
        bounds = bounds if takes.high == math.inf else f"{takes.low:g} to {takes.high:g}"
        raise ParameterError(f"{said}: it must be {bounds} ({takes.help})")
    return value if parameter.type is int else float(value)
