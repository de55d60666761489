"""What is done to every traced graph: torch as it is by default, names of axes, no notes of this machine."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch

_NOISY = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it is by default, and silent, whatever a program has set: tracing follows the defaults."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    dtype = torch.get_default_dtype()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        torch.set_default_dtype(torch.float32)
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            warnings.simplefilter("ignore")  # of torch and onnxscript, about themselves
            with torch.autocast("cpu", enabled=False):
                yield
    finally:
        torch.set_default_dtype(dtype)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def name_axes(model: ir.Model, axes: Mapping[str, Sequence[str]]) -> None:
    """Call axes of inputs what `axes` says, such as `batch` and `length`; torch.export calls them s23 and s27."""
    names = {}
    for value in model.graph.inputs:
        for dim, name in zip(value.shape or (), axes[str(value.name)], strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                names[dim.value] = name
    if not names:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
    for value in _values(model.graph):
        if value.shape is not None:
            dims = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape([pattern.sub(lambda m: names[m[0]], d) if isinstance(d, str) else d for d in dims])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def without_notes(model: ir.Model) -> None:
    """Take out what torch.onnx notes of every node: its place in our sources, by the paths of this machine."""
    for value in _values(model.graph):
        value.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for holder in (model, model.graph):
        holder.metadata_props.clear()
        holder.doc_string = None
