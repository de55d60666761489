"""How a mixing method is written, and which there are. Each is one file in `rwkv_lab.merge.mixing`:

    def proof(t: WholeTensor, *, <parameters>) -> Exact

    @mixing_method("title", proof)
    def method(base: Tensor, tuned: Tensors, *, <parameters>, …) -> Tensor

The method computes blocks: `base` and each of `tuned` are flat pieces `[n]` of one tensor of each model, in the
precision of the merge; the result is `[n]` too. Behind the `*` stand its parameters, as `Annotated[type, Takes(help,
…)]`: name, type, default, range and help are stated only there; and what the merge finds for the method before or on
the way: `Annotated[type, Look(function)]` for something that needs the whole tensor (a norm, a threshold), and
`draws: Draws` for random numbers. A method is tried on empty tensors when a merge is planned: it may refuse what it is
given with a `ParameterError` there.

The proof computes the same once more, from whole tensors in float64 and without the method's code
(`rwkv_lab.merge.proof`); it is given the same parameters, as the recipe states them for the tensor. A method without
one is refused. The first sentence of the file says what the method does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method_parameters import NEEDED, Parameter, Takes
from rwkv_lab.merge.proof import Exact
from rwkv_lab.suggestions import did_you_mean

Blocks = Callable[[], Iterator[tuple["torch.Tensor", list["torch.Tensor"]]]]  # each call is another pass: (base, tuned)
Draws = Callable[[int, int], "torch.Tensor"]  # (seed, which of tuned) -> [n] float64, uniform in [0, 1)


@dataclass(frozen=True)
class Look:
    """A value that is found by going through the whole tensor: `function(blocks, …)`, with any of the parameters."""

    function: Callable[..., Any]


@dataclass(frozen=True)
class Models:
    """How many tuned models a method mixes."""

    least: int = 1
    most: int | None = None


Tensors = Annotated[Sequence["torch.Tensor"], Models()]
Two = Annotated[Sequence["torch.Tensor"], Models(1, 1)]
Several = Annotated[Sequence["torch.Tensor"], Models(2)]


@dataclass(frozen=True)
class Signature:
    """What a method takes, read from its annotations."""

    models: Models
    parameters: dict[str, Parameter]
    looks: dict[str, Callable[..., Any]]
    draws: bool

    def check_names(self, method: str, given: Mapping[str, object]) -> None:
        """Refuse a name that the method does not take, and the lack of one that it needs.

        Raises:
            ParameterError: with the nearest name, or the help of the missing one.
        """
        for name in given:
            if name not in self.parameters:
                hint = did_you_mean(name, self.parameters) or "."
                takes = ", ".join(self.parameters) or "none"
                raise ParameterError(f"method {method!r} takes no parameter {name!r}{hint}\nIt takes: {takes}")
        for name, p in self.parameters.items():
            if p.default is NEEDED and name not in given:
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


@dataclass(frozen=True)
class MixingMethod:
    name: str
    title: str  # a few words
    help: str  # what it does, a sentence
    function: Callable[..., torch.Tensor]
    proof: Callable[..., Exact]
    signature: Signature


MIXING: dict[str, MixingMethod] = {}  # by name, filled by the files of `rwkv_lab.merge.mixing`
Method = TypeVar("Method", bound=Callable[..., Any])


def mixing_method(title: str, proof: Callable[..., Exact] | None = None) -> Callable[[Method], Method]:
    """Make a function a merge method of its own name.

    Args:
        title: what it is called, in a few words.
        proof: its proof; see above.
    Raises:
        ParameterError: there is no proof, or there is a method of that name.
    """

    def register(function: Method) -> Method:
        name = function.__name__
        if proof is None:
            raise ParameterError(
                f"The mixing method {name!r} has no proof: nothing could tell whether its outputs are right.\n"
                f"Write proof(t, *, …) beside it in {function.__module__} and pass it to @mixing_method."
            )
        if name in MIXING:
            raise ParameterError(f"There is a mixing method {name!r} already; call this one something else.")
        words = " ".join((sys.modules[function.__module__].__doc__ or "").split("\n\n")[0].split())
        what = words.split(": ", 1)[-1].rstrip(".")
        MIXING[name] = MixingMethod(name, title, what, function, proof, signature_of(function))
        return function

    return register


class _NoTorch:
    """Stands for torch where annotations are read: of tensors nothing is read."""

    Tensor = Any


def signature_of(method: Callable[..., torch.Tensor]) -> Signature:
    """Read a method's parameters from its annotations."""
    hints = get_type_hints(method, localns={"torch": _NoTorch}, include_extras=True)
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
                default = NEEDED if p.default is inspect.Parameter.empty else p.default
                parameters[name] = Parameter(name, kind if kind in (int, bool) else float, mark, default)
        draws = draws or name == "draws"
    return Signature(models, parameters, looks, draws)
