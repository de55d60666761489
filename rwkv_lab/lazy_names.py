"""Packages whose names are imported when they are first used: what is refused before work begins needs no model.

A package states its names twice: under TYPE_CHECKING for readers and the type checker, and as a table for Python.
"""

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
