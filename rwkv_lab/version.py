"""The version of this package: the one place where it stands. hatch reads it from here for the wheel."""

__version__ = "0.1.0"
