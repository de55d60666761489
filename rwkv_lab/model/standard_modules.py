"""Which classes a model is made of as it comes from a checkpoint.

Adapters and packed weights replace modules by ones of other classes: such a model is no checkpoint any more, and what
it computes is not for compiled code to assume.
"""

from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=type[nn.Module])

_TORCH = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.ModuleList)
_standard: dict[type[nn.Module], object] = {cls: cls.forward for cls in _TORCH}  # class -> its forward


def standard(cls: T) -> T:
    """Class decorator: models of this package are made of this class. Subclasses are not meant."""
    _standard[cls] = cls.forward
    return cls


def is_standard(module: nn.Module) -> bool:
    """Whether a module is exactly of a class that models are made of, without options that no RWKV has."""
    if type(module) not in _standard:
        return False
    if type(module) is nn.Linear:
        return module.bias is None
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return True


def replaced_module(model: nn.Module) -> str | None:
    """A module in the model that replaces one of RWKV's own, such as "head, a LoraLinear"; None if there is none."""
    for name, module in model.named_modules():
        if name and not is_standard(module):
            return f"{name}, a {type(module).__name__}"
    return None


def patched_class() -> str | None:
    """The name of a class above whose `forward` is not the one that it was defined with; None if there is none."""
    if [cls.forward for cls in _standard] == [*_standard.values()]:  # the usual case, asked for every token
        return None
    return next(cls.__name__ for cls, forward in _standard.items() if cls.forward is not forward)
