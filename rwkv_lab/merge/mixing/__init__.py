"""Methods that mix whole models: each file here is one, found by its place. How one is written: `mixing_method`."""

from importlib import import_module
from pkgutil import iter_modules

from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.mixing_method import MIXING

# Their order in panels and messages; others come after them.
_FIRST = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")


def discover() -> None:
    """Make the methods in this folder known.

    Raises:
        ParameterError: a file without a method, or a method without a proof.
    """
    found = sorted(
        (module.name for module in iter_modules(__path__)),
        key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name),
    )
    for name in found:
        import_module(f"{__name__}.{name}")
        if name not in MIXING:
            raise ParameterError(f"{name}.py in merge/mixing holds no mixing method {name!r}; every file there is one.")


discover()

__all__ = ["MIXING", "discover"]
