"""The generations. Each module here registers its own; importing this package makes them known."""

from importlib import import_module
from pkgutil import iter_modules

_LAST = ("rwkv7", "rwkv6", "rwkv5", "rwkv4")  # what is recognised by names that later generations have too comes last

for _name in sorted(
    (module.name for module in iter_modules(__path__)),
    key=lambda name: (_LAST.index(name) if name in _LAST else -1, name),
):
    import_module(f"{__name__}.{_name}")
