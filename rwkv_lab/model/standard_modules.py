"""Which classes a model is made of as it comes from a checkpoint.

Adapters and packed weights replace modules by ones of other classes: such a model is no checkpoint any more, and what
it computes is not for compiled code to assume.
"""

from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=type[nn.Module])

_TORCH = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.ModuleList)
_standard: set[type[nn.Module]] = set(_TORCH)
_methods: list[tuple[type[nn.Module], object, object]] = []  # a class that compiled code stands for, how it is called


def standard(cls: T) -> T:
    """Class decorator: models of this package are made of this class. Subclasses are not meant."""
    _standard.add(cls)
    return watched(cls)


def watched(cls: T) -> T:
    """Class decorator: compiled code computes what this class does, until one of its methods is exchanged."""
    _methods.append((cls, cls.forward, cls.__call__))
    return cls


for _cls in _TORCH:
    watched(_cls)


def is_standard(module: nn.Module) -> bool:
    """Whether a module is exactly of a class that models are made of, without options that no RWKV has."""
    if type(module) not in _standard:
        return False
    if type(module) is nn.Linear:
        return module.bias is None
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return True


def replaced_module(model: nn.Module, besides: tuple[type[nn.Module], ...] = ()) -> str | None:
    """A module in the model that replaces one of RWKV's own, such as "head, a LoraLinear"; None if there is none
    besides those of some classes."""
    for name, module in model.named_modules():
        if name and not is_standard(module) and type(module) not in besides:
            return f"{name}, a {type(module).__name__}"
    return None


def patched_class() -> str | None:
    """The name of a class above whose `forward` or `__call__` is not the one that it was defined with; None if there is
    none."""
    if [
        (cls, cls.forward, cls.__call__) for cls, _, _ in _methods
    ] == _methods:  # the usual case, asked for every token
        return None
    return next(cls.__name__ for cls, *methods in _methods if [cls.forward, cls.__call__] != methods)
