"""Packages that are imported when something of them is first used: what is refused before work begins needs no model.

Names are stated twice: under TYPE_CHECKING for readers and the type checker, and as a table or a name for Python.
"""

import functools
import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def found_on_use(package: str, home: Mapping[str, str]) -> None:
    """Let names of a package be imported from the modules that have them, when they are first asked for.

    Args:
        package: its dotted name; it is being imported.
        home: name -> dotted name of the module that has it.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    class Package(ModuleType):
        """Python binds a module that is imported to its package, where it would hide a function of its name."""

        def __setattr__(self, name: str, value: object) -> None:
            if not (name in home and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    module = sys.modules[package]
    module.__dict__.update(__getattr__=get, __dir__=lambda: sorted(home))
    module.__class__ = Package


def imported_on_use(name: str) -> Any:
    """What stands for the package `name`, and imports it when it is first asked for one of its attributes."""
    module = functools.cache(lambda: import_module(name))

    class Package:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(module(), attribute)

    return Package()
