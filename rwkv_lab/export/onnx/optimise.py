"""Graphs with what is known computed beforehand and what is not used left out, compared with what they were."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer

from rwkv_lab.checkpoint.atomic import atomic_folder
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ONNXExportError
from rwkv_lab.export.onnx.check import check_graph, first_line
from rwkv_lab.export.onnx.files import write_graphs
from rwkv_lab.export.onnx.run import random_inputs, run_file

_LIMIT = 1e-5  # largest error relative to the scale of an output: sums may be taken in another order


def optimise_graph(model: ir.Model) -> None:
    """Fold constants and leave out nodes that compute what is known or nothing that is used, in place."""
    onnxscript.optimizer.optimize(model)


def optimise_file(path: Path, folder: Path, overwrite: bool) -> tuple[Path, int, int, list[Check | NotApplicable]]:
    """Write an ONNX file anew into a folder of its own, under its name, with its weights.

    Returns:
        The new file, the numbers of nodes before and after, and what was checked.

    Raises:
        ONNXExportError: it is none that onnxruntime opens, or its outputs change.
        OutputError: the folder is there already, or cannot be written.
    """
    check_graph(path, domains=None)
    try:
        model = ir.load(path)
        before = _count(model)
        optimise_graph(model)
    except Exception as e:  # onnxscript's own, of many kinds
        raise ONNXExportError(f"{path.name} cannot be optimised: {first_line(e)}") from e
    kept_outside = any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
    with atomic_folder(folder, overwrite) as inside:
        written = _count(model)
        write_graphs({path.name: model}, inside, kept_outside, f"{path.name}.data")
        checks = [*check_graph(inside / path.name, domains=None), _compared(path, inside / path.name)]
    return folder / path.name, before, written, checks


def _count(model: ir.Model) -> int:
    return sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph))


def _compared(before: Path, after: Path) -> Check | NotApplicable:
    """Outputs of two files on the same random inputs."""
    name = f"{before.name}: largest relative change of an output on random inputs"
    inputs = random_inputs(onnx.load(str(before), load_external_data=False))
    try:
        expected = run_file(before, inputs)
    except Exception as e:  # of onnxruntime: axes that must fit together in a way that their names do not tell
        return NotApplicable(name, f"the graph does not run on them as it is: {first_line(e)}")
    try:
        outputs, worst = run_file(after, inputs), 0.0
    except Exception as e:
        raise ONNXExportError(f"{before.name} no longer runs once it is optimised: {first_line(e)}") from e
    for output, wanted in expected.items():
        found = outputs[output]
        same_shape = found.shape == wanted.shape and found.dtype == wanted.dtype
        difference = np.abs(found.astype(np.float64) - wanted) if same_shape else np.array(np.inf)
        worst = max(worst, float(difference.max(initial=0)) / max(1.0, float(np.abs(wanted).max(initial=0))))
    if not worst <= _LIMIT:
        raise ONNXExportError(f"{before.name} does not compute the same once it is optimised: {worst:.3g} apart.")
    return Check(name, worst, _LIMIT, True)
