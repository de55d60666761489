"""Graphs by torch's old exporter, which traces by TorchScript, in the form that the default one gives them."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn


def export_by_torchscript(
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
    axes: Mapping[str, Sequence[str | int | None]],
) -> ir.Model:
    """The graph of a module, whose weights it shares.

    Args:
        axes: by input and output, its first axes: a name for one of any size, all others have that of the example.
    """
    free = {name: {i: a for i, a in enumerate(dims) if isinstance(a, str)} for name, dims in axes.items()}
    with tempfile.TemporaryDirectory(prefix="rwkv_lab-trace-") as folder:
        path = Path(folder) / "graph.onnx"
        torch.onnx.export(
            module,
            inputs,
            str(path),
            dynamo=False,
            export_params=False,  # they become inputs, and are neither copied nor held to 2 GB
            opset_version=opset,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_axes={name: dims for name, dims in free.items() if dims},
            do_constant_folding=False,  # it would copy every matrix
        )
        graph = ir.load(path)
    _give_values(graph, module, input_names)
    _without_identities(graph)
    return graph


def _give_values(model: ir.Model, module: nn.Module, input_names: Sequence[str]) -> None:
    """Have weights as initialisers in place of inputs."""
    values = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    for value in list(model.graph.inputs):
        if value.name not in input_names:
            model.graph.inputs.remove(value)
            value.const_value = TorchTensor(values[str(value.name)].detach(), name=value.name)
            model.graph.register_initializer(value)


def _without_identities(model: ir.Model) -> None:
    """Take out nodes that give what they take: a weight that is used twice has one each time."""
    outputs = {*model.graph.outputs}
    for node in list(model.graph):
        if node.op_type == "Identity" and node.outputs[0] not in outputs and node.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
