"""The file formats. Each module here registers its own; importing this package makes them known."""

from importlib import import_module
from pkgutil import iter_modules

_FIRST = ("safetensors", "pth")  # the last one registered is the first one tried

for _name in sorted(
    (module.name for module in iter_modules(__path__)),
    key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name),
):
    import_module(f"{__name__}.{_name}")
