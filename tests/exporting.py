"""What processes import that export: here once, for all of a process that forks, which takes three seconds."""

from contextlib import suppress
from importlib import import_module

for name in (
    "onnxruntime",
    "transformers.modeling_utils",
    "torch.onnx._internal.exporter._core",
    "operators_read_once",
):
    with suppress(ImportError):
        import_module(name)
with suppress(ImportError, AttributeError):
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    onnxscript_apis.get_torchlib_ops()
