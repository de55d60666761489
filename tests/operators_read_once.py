"""Importing this has torch.onnx read onnxscript's operators once, instead of anew for every graph: 0.3 s each time."""

from contextlib import suppress
from functools import cache

with suppress(ImportError, AttributeError):  # private, and not needed
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)
