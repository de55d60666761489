"""What methods take: name, type, default, range and help of a parameter, and the one check of what is given for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from rwkv_lab.errors import ParameterError
from rwkv_lab.text import counted

LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32, and of every number: the arithmetic is float32
NEEDED: Final = object()  # the default of a parameter that must be given


@dataclass(frozen=True)
class Takes:
    """What a parameter may be."""

    help: str
    low: float = -math.inf
    high: float = math.inf
    each: str = ""  # "tuned": one number per tuned model; "model": one for the base, then one per tuned model
    choices: tuple[str, ...] = ()  # of a text; none: any


@dataclass(frozen=True)
class Parameter:
    name: str
    type: type  # float, int, bool or str
    takes: Takes
    default: Any  # `NEEDED` where it must be given


def check_value(parameter: Parameter, value: Any, where: str = "") -> Any:
    """One value of a parameter, of its type and in its range.

    Args:
        where: the tensor it is for, for the message.
    Raises:
        ParameterError: states what is wrong with it.
    """
    takes, given = parameter.takes, f"{parameter.name}={value!r}{where}"
    if parameter.type is bool:
        if not isinstance(value, bool):
            raise ParameterError(f"{given}: True or False is needed ({takes.help})")
        return value
    if parameter.type is str:
        if isinstance(value, str) and not takes.choices:
            return value
        if not isinstance(value, str) or value not in takes.choices:
            raise ParameterError(f"{given}: it must be one of {', '.join(takes.choices)} ({takes.help})")
        return value
    numbers = int if parameter.type is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise ParameterError(f"{given}: a {'whole ' if parameter.type is int else ''}number is needed ({takes.help})")
    # Compared, not converted: a whole number may be too large for any float.
    fits = takes.low <= value <= takes.high and (parameter.type is int or -LARGEST <= value <= LARGEST)
    if not fits:
        least = "finite" if takes.low == -math.inf else f"{takes.low:g} or more"
        within = (
            f"{takes.low:g} to {takes.high:g}"
            if takes.high < math.inf
            else f"{least}, and at most {LARGEST:.4g} (float32)"
        )
        raise ParameterError(f"{given}: it must be {within} ({takes.help})")
    return value if parameter.type is int else float(value)


def check_values(parameter: Parameter, value: Any, tuned: int, where: str) -> Any:
    """As `check_value`; a list of as many values as there are models, where the parameter has one for each.

    Args:
        tuned: number of tuned models.
    Raises:
        ParameterError: states what is wrong with it.
    """
    name, takes = parameter.name, parameter.takes
    if value is None and where:
        raise ParameterError(
            f"{name}: no pattern matches{where.removeprefix(' for')}; pass '*' for the rest ({takes.help})"
        )
    if not takes.each:
        return check_value(parameter, value, where)
    wanted = tuned + (takes.each == "model")
    if isinstance(value, (list, tuple)):
        if len(value) != wanted:
            who = "the base and each tuned model" if takes.each == "model" else "each tuned model"
            needed = f"{wanted} {'is' if wanted == 1 else 'are'} needed, one for {who}"
            raise ParameterError(f"{name} has {counted(len(value), 'number')}{where}; {needed}")
        return [check_value(parameter, v, where) for v in value]
    one = check_value(parameter, value, where)
    if takes.each == "tuned":
        return [one] * tuned
    if tuned > 1:
        raise ParameterError(
            f"{name}={value!r}{where}: with {tuned + 1} models a list of {counted(wanted, 'number')} is needed"
        )
    return [1 - one, one]
