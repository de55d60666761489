"""The formats that a whole model is written in, and whether an ONNX file is what was asked for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_lab.arguments import checked
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ONNXExportError, ParameterError
from rwkv_lab.export.attempt import Attempt
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.family import Family, Reference, WholeModel
from rwkv_lab.export.onnx import need_packages
from rwkv_lab.export.onnx_attempts import write_onnx
from rwkv_lab.export.onnx_folder import MANIFEST
from rwkv_lab.export.tensorrt_engines import TensorRTExport, export_tensorrt
from rwkv_lab.paths import missing_file

if TYPE_CHECKING:  # a model can be written for PyTorch without onnx
    from rwkv_lab.export.onnx.check import Axes


@dataclass(frozen=True)
class OptimisedGraph:
    """A graph that was written anew.

    nodes_before, nodes: how many it had, and has, those of sub-graphs too.
    checks: what was seen to, the outputs beside those of the graph as it was among it.
    """

    path: Path
    nodes_before: int
    nodes: int
    checks: list[Check | NotApplicable]


class FormatExporter:
    """Writes one model, with its adapters merged in, in the formats that a configuration states.

    Args:
        family: what the model is of: one of `rwkv_lab.export.families.FAMILIES`.
        configuration: quantisation, opset, tokenizer and so on.
        model: what `Family.merge` made.
    """

    @checked
    def __init__(self, family: Family, configuration: ExportConfiguration, model: WholeModel):
        self.family, self.configuration, self.model = family, configuration, model
        self.attempts: list[Attempt] = []  # to write ONNX, those that failed too

    @checked
    def export_pytorch_model(self, out: str | Path) -> list[str]:
        """Write the model for PyTorch, and say what should be known of the file.

        Raises:
            FormatExportError: it cannot be written, or is not what was to be written.
            OutputError: it is there already, or its folder cannot be written to.
        """
        return self.family.write_pytorch(self.configuration, self.model, Path(out))

    @checked
    def export_onnx_model(self, folder: str | Path) -> list[Check]:
        """Write the folder that `OnnxModel` runs; its graphs are checked as by `validate_onnx_export`.

        It is written in a process of its own. Where that fails, it is tried again with what the cause of the error asks
        for; `attempts` has all tries, and what the last one lost.

        Raises:
            ONNXExportError: the model cannot be written as ONNX, or a graph is not what was asked for.
            DeviceError: memory ran out.
            OutputError: the folder is there already, or cannot be written.
        """
        return write_onnx(self.configuration, self.family, self.model, Path(folder), self.attempts)

    @checked
    def export_tensorrt_model(
        self,
        onnx_folder: str | Path,
        folder: str | Path,
        reference: Reference | None = None,
        overwrite: bool = False,
    ) -> TensorRTExport:
        """Check the graphs of an exported folder for TensorRT, write what builds engines, build them where it is there.

        Without the package tensorrt and a GPU nothing is built, and the result says so: what is checked then are
        operators and types, those of sub-graphs too, the opset, the shapes of inputs, weights in other files, and what
        onnxruntime computes from these very files.

        Args:
            onnx_folder: what `export_onnx_model` wrote; it stays where it is, and is needed when engines are built.
            folder: what is written: `build_engine.py`, `profiles.json`, `expected.npz`, README.md, and engines.
            reference: the model, to compare with; None: it is not compared.
            overwrite: replace a folder that is there.

        Raises:
            FormatExportError: a graph has what TensorRT does not take, or computes something else than the model.
            OutputError: the folder is there already, or cannot be written.
        """
        need_packages()
        asked = self.configuration
        sizes = {"batch": asked.tensorrt_batch, "length": asked.tensorrt_length}
        return export_tensorrt(Path(onnx_folder), Path(folder), sizes, reference, overwrite)

    @staticmethod
    @checked
    def validate_onnx_export(
        path: str | Path,
        opset: int | None = None,
        dynamic_axes: dict[str, list | tuple] | None = None,
        domains: list[str] | None = None,
    ) -> list[Check]:
        """Check an ONNX file, or every one in an exported folder, against what was asked for.

        onnx's checker accepts it; its opset and its axes are those that were asked for; no operator is one that
        onnxruntime alone has, unless the weights ask for it; weights in other files are there, whole, in its folder and
        behind no link; onnxruntime opens it from its path.

        Args:
            path: a file, or a folder whose `export.json` says what was asked for.
            opset: of a file; None for any.
            dynamic_axes: of a file: by input or output its first axes, a name for one that must be of any size, a
                number for one that must have that size, None for one that may have any or be fixed.
            domains: of a file: domains of operators that may be there beside ONNX's own; None for none.

        Returns:
            What was checked; all of it holds.

        Raises:
            TracerWarningError: an axis is fixed that must be of any size.
            ONNXExportError: anything else does not hold.
            ParameterError: there is nothing at this path, or a folder comes with what is asked of a file.
        """
        need_packages()
        path = Path(path)
        if path.is_dir():
            if (opset, dynamic_axes, domains) != (None, None, None):
                raise ParameterError(f"{path} is a folder, whose {MANIFEST} says what was asked for; give path alone.")
            return _validate_folder(path)
        if not path.is_file():
            raise missing_file(path)
        from rwkv_lab.export.onnx.check import check_graph

        return check_graph(path, opset, dynamic_axes, domains or ())

    @staticmethod
    @checked
    def optimize_onnx_graph(path: str | Path, folder: str | Path, overwrite: bool = False) -> OptimisedGraph:
        """Write an ONNX file anew with constants folded and without nodes of no use, and compare its outputs.

        What `export_onnx_model` writes is optimised already, where `onnx_optimize_graph` is True.

        Args:
            path: any ONNX file that onnxruntime opens.
            folder: where the new file goes, under the name of the old one; its parent must be there.
            overwrite: replace a folder that is there.

        Raises:
            ONNXExportError: it is no such file, or its outputs change.
            ParameterError: there is no file of that path.
            OutputError: the folder is there already, or cannot be written.
        """
        need_packages()
        from rwkv_lab.export.onnx.optimise import optimise_file

        if not Path(path).is_file():
            raise missing_file(Path(path))
        return OptimisedGraph(*optimise_file(Path(path), Path(folder), overwrite))


def _validate_folder(folder: Path) -> list[Check]:
    from rwkv_lab.export.onnx.check import check_graph

    path = folder / MANIFEST
    if not path.is_file():
        raise ParameterError(f"{folder} has no {MANIFEST}: it is no folder that was exported. Give the .onnx file.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        opset: int = manifest["opset"]
        graphs = {name: _axes(axes) for name, axes in manifest["axes"].items()}
        domains: list[str] = manifest["domains"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ONNXExportError(f"{path} does not say what was asked for: {e!r}.") from e
    checks = []
    for name, axes in graphs.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise ONNXExportError(f"{folder} has no {name}, which {MANIFEST} names.")
        checks += check_graph(folder / name, opset, axes, domains)
    return checks


def _axes(found: Any) -> "Axes":
    axes = {str(name): list(dims) for name, dims in found.items()}
    if not all(dim is None or isinstance(dim, str | int) for dims in axes.values() for dim in dims):
        raise ValueError("axes are names, numbers or null")
    return axes
