"""ONNX files run as they are, on random inputs: to compare two of them, or another runtime."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from rwkv_lab.export.onnx.check import shapes_of

_SIZES = (2, 3, 5, 7)  # of axes of any size, by their order: each is told from the others


def random_inputs(model: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Inputs of a graph by name; integers are 0 or 1.

    Args:
        sizes: of axes of any size, by name; others take 2, 3, 5, …
    """
    shapes, names = shapes_of(model), dict(sizes or {})
    draw, inputs = np.random.default_rng(0), {}
    for value in model.graph.input:
        if value.name not in shapes:
            continue
        for dim in shapes[value.name]:
            if isinstance(dim, str):
                names.setdefault(dim, _SIZES[len(names) % len(_SIZES)])
        shape = [names[dim] if isinstance(dim, str) else dim for dim in shapes[value.name]]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        drawn = draw.normal(0, 0.1, shape) if np.issubdtype(dtype, np.floating) else draw.integers(0, 2, shape)
        inputs[value.name] = drawn.astype(dtype)
    return inputs


def run_file(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a file by name, from onnxruntime without its own optimisation."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, dict(inputs))), strict=True))
