"""Measurements without display: arguments in, dataclasses out."""
