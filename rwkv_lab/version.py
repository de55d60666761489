"""The version of this package: stated here only. hatch reads it from here for the wheel."""

__version__ = "0.1.0"
