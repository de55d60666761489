"""ONNX files against what was asked for: those that we write, and what is wrong in files made by hand."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from onnx import TensorProto, helper  # noqa: E402

from rwkv_lab.checks import Check  # noqa: E402
from rwkv_lab.errors import (  # noqa: E402
    CorruptFileError,
    ExportError,
    ONNXExportError,
    OutputError,
    ParameterError,
    TracerWarningError,
    UnsafeFileError,
)
from rwkv_lab.export import FormatExporter, OnnxModel  # noqa: E402
from rwkv_lab.export.external_data import external_data  # noqa: E402

validate, optimise = FormatExporter.validate_onnx_export, FormatExporter.optimize_onnx_graph
FLOAT = TensorProto.FLOAT


def stored(location: str, offset: int | str | None = None, length: int | str | None = None, name="w", dims=(4,)):
    """A float32 tensor in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def made(path: Path, *tensors, nodes=None, opset=20, axes=("batch", 4), domains=(), functions=()) -> Path:
    """A file with y = x + w, or other nodes."""
    nodes = nodes or [helper.make_node("Add", ["x", "w"], ["y"])]
    values = [helper.make_tensor_value_info(name, FLOAT, axes) for name in ("x", "y")]
    tensors = tensors or (helper.make_tensor("w", FLOAT, [4], [1.0] * 4),)
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    path.write_bytes(model.SerializeToString())
    return path


def floats(path: Path, count: int = 4) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(np.ones(count, np.float32).tobytes())


# ------------------------------------------------------------------ what is written


def test_what_is_written_holds(exported):
    folder = exported("7.0", "int8").folder  # its weights are in a file of their own
    checks = validate(folder)
    assert all(isinstance(check, Check) and check.passed for check in checks)
    shown = "\n".join(map(str, checks))
    for words in ("model.onnx: opset written: 20", "step.onnx: axes of any size: batch ", "in model.onnx.data (limit"):
        assert words in shown
    assert "model.onnx: axes of any size: batch, length" in shown
    names = {tensor.name for tensor in external_data(folder / "model.onnx")}
    loaded = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.initializer
    assert names == {t.name for t in loaded if t.data_location == TensorProto.EXTERNAL} and names


def test_operators_of_onnxruntime_alone_are_there_where_weights_ask_for_them(exported):
    folder = exported("7.0", "int4").folder
    assert any("com.microsoft (limit com.microsoft)" in str(check) for check in validate(folder))
    with pytest.raises(ONNXExportError, match="model.onnx has the operator MatMulNBits of com.microsoft"):
        validate(folder / "model.onnx")
    assert validate(folder / "model.onnx", domains=["com.microsoft"])


def test_a_folder_that_is_not_what_its_manifest_asks_for(exported, tmp_path):
    shutil.copytree(exported("7.0").folder, tmp_path / "m")
    path = tmp_path / "m/export.json"
    manifest = json.loads(path.read_text())
    for change, error, says in (
        ({"opset": 21}, ONNXExportError, "model.onnx is of opset 20, not 21"),
        ({"axes": {"model.onnx": {"tokens": ["batch", "length", "more"]}}}, ONNXExportError, "tokens has 2 axes"),
        (
            {"axes": {"step.onnx": {"tokens": ["batch", "length"]}}},
            TracerWarningError,
            "length of tokens is fixed at 1",
        ),
        ({"axes": {"../model.onnx": {}}}, ONNXExportError, "has no ../model.onnx"),
        ({"axes": {"model.onnx": {"tokens": [0.5]}}}, ONNXExportError, "does not say what was asked for"),
        ({"axes": []}, ONNXExportError, "does not say what was asked for"),
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(error, match=says):
            validate(tmp_path / "m")
    with pytest.raises(ParameterError, match="give path alone"):
        validate(tmp_path / "m", opset=20)
    path.unlink()
    with pytest.raises(ParameterError, match="no export.json"):
        validate(tmp_path / "m")


# ------------------------------------------------------------------ files made by hand


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"opset": 21}, ONNXExportError, "is of opset 20, not 21"),
        ({"dynamic_axes": {"x": ["batch", "length"]}}, TracerWarningError, "the length of x is fixed at 4"),
        ({"dynamic_axes": {"x": ["rows"]}}, ONNXExportError, "the rows of x is called batch"),
        ({"dynamic_axes": {"x": ["batch", 5]}}, ONNXExportError, "an axis of x is 4; it must be 5"),
        ({"dynamic_axes": {"z": []}}, ONNXExportError, "has no z; it has x, y"),
    ],
)
def test_another_opset_and_fixed_axes(tmp_path, asked, error, says):
    path = made(tmp_path / "m.onnx")
    assert validate(path, opset=20, dynamic_axes={"x": ["batch", 4]})
    with pytest.raises(error, match=says):
        validate(path, **asked)


def test_operators_of_other_domains_wherever_they_are(tmp_path):
    then = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft")],
        "then",
        [],
        [helper.make_tensor_value_info("z", FLOAT, ["batch", 4])],
    )
    plain = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["v"])], "e", [], [helper.make_tensor_value_info("v", FLOAT, ["batch", 4])]
    )
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=plain)]
    weight = helper.make_tensor("w", FLOAT, [4], [1.0] * 4)
    path = made(tmp_path / "m.onnx", weight, yes, nodes=nodes, domains=["com.microsoft"])
    with pytest.raises(ONNXExportError, match="the operator Gelu of com.microsoft"):
        validate(path)
    assert validate(path, domains=["com.microsoft"])


def outside(folder: Path) -> dict[str, type[Exception]]:
    """Locations that lead out of a folder, or nowhere."""
    floats(folder.parent / "out.bin")
    floats(folder / "w.bin")
    (folder / "sub").mkdir()
    floats(folder / "sub/w.bin")
    (folder / "link.bin").symlink_to("../out.bin")
    (folder / "near.bin").symlink_to("w.bin")
    (folder / "far").symlink_to("..")
    unsafe = ["../out.bin", "sub/../../out.bin", "sub/../w.bin", str(folder / "w.bin"), "..\\out.bin", "C:\\out.bin"]
    corrupt = ["no.bin", "sub", "", "w.bin\0"]
    links = ["link.bin", "near.bin", "far/out.bin"]
    return dict.fromkeys(unsafe + links, UnsafeFileError) | dict.fromkeys(corrupt, CorruptFileError)


def test_weights_outside_the_folder_and_behind_links(exported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(exported("4.0").folder, folder)
    manifest = json.loads((folder / "export.json").read_text())
    for location, error in outside(folder).items():
        path = made(folder / "step.onnx", stored(location))
        with pytest.raises(ONNXExportError, match="step.onnx ") as caught:
            validate(path)
        assert isinstance(caught.value, ExportError) and str(caught.value).count("\n") < 3
        manifest["files"]["step.onnx"]["bytes"] = path.stat().st_size
        (folder / "export.json").write_text(json.dumps(manifest))
        with pytest.raises(error, match="step.onnx "):
            OnnxModel(folder)
    for location in ("w.bin", "sub/w.bin", "./w.bin"):
        assert validate(made(folder / "step.onnx", stored(location)))


def test_every_place_that_a_tensor_can_be_in(tmp_path):
    bad = stored("../out.bin")
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("w", FLOAT, [4])], [bad])
    sparse = onnx.SparseTensorProto(values=stored("../out.bin"), indices=helper.make_tensor("i", 7, [4], [0, 1, 2, 3]))
    attributes = {
        "in a constant": helper.make_node("Constant", [], ["y"], value=bad),
        "in a sub-graph": helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner),
        "in a list of graphs": helper.make_node("Any", ["x"], ["y"], domain="d", bodies=[inner]),
        "in a list of tensors": helper.make_node("Any", ["x"], ["y"], domain="d", values=[bad]),
        "in a sparse constant": helper.make_node("Constant", [], ["y"], sparse_value=sparse),
    }
    for where, node in attributes.items():
        with pytest.raises(ONNXExportError, match="outside its own folder"):
            validate(made(tmp_path / "m.onnx", helper.make_tensor("w", FLOAT, [4], [0.0] * 4), nodes=[node])), where
    function = helper.make_function(
        "d", "F", ["a"], ["b"], [helper.make_node("Constant", [], ["b"], value=bad)], [helper.make_opsetid("", 20)]
    )
    node = helper.make_node("F", ["x"], ["y"], domain="d")
    with pytest.raises(ONNXExportError, match="outside its own folder"):
        validate(made(tmp_path / "m.onnx", nodes=[node], domains=["d"], functions=[function]))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (stored("w.bin", 16), "w, 16 bytes of w.bin, begins at byte 16; that file has 16"),
        (stored("w.bin", -4), "begins at byte -4"),
        (stored("w.bin", 0, 12), "is said to have 12 bytes there"),
        (stored("w.bin", 0, 16, dims=(5,)), "w, 20 bytes of w.bin, is said to have 16"),
        (stored("w.bin", dims=(2**40, 2**20)), "that file has 16"),
        (stored("w.bin", "four"), "is no ONNX file"),
        (stored("w.bin", dims=(-4,)), "has type 1 and shape"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, tensor, says):
    floats(tmp_path / "w.bin")
    with pytest.raises(ONNXExportError, match=says):
        validate(made(tmp_path / "m.onnx", tensor))


def test_files_that_are_none(tmp_path):
    path = made(tmp_path / "m.onnx")
    whole = path.read_bytes()
    for data in (b"", b"text of another kind", b"\xff" * 64, whole[:-7], whole[:20], bytes(64), b"PK\3\4" + whole):
        path.write_bytes(data)
        with pytest.raises(ONNXExportError, match="m.onnx"):
            validate(path)
    with pytest.raises(ParameterError, match="no file"):
        validate(tmp_path / "no.onnx")


# ------------------------------------------------------------------ optimised graphs


def test_a_graph_is_optimised_and_compared(tmp_path):
    floats(tmp_path / "w.bin", 4000)
    nodes = [
        helper.make_node("Add", ["half", "half"], ["one"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Mul", ["same", "one"], ["scaled"]),
        helper.make_node("Add", ["scaled", "w"], ["y"]),
        helper.make_node("Neg", ["x"], ["unused"]),
    ]
    half = helper.make_tensor("half", FLOAT, [1], [0.5])
    path = made(tmp_path / "m.onnx", half, stored("w.bin", dims=(4000,)), nodes=nodes, axes=("batch", 4000))
    found = optimise(path, tmp_path / "out")
    assert found.nodes_before == 5 and found.nodes <= 2 and found.path == tmp_path / "out/m.onnx"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"m.onnx", "m.onnx.data"}
    assert all(check.passed for check in found.checks) and "change of an output" in found.checks[-1].name
    with pytest.raises(OutputError, match="exists"):
        optimise(path, tmp_path / "out")
    path.write_bytes(b"no graph")
    with pytest.raises(ONNXExportError, match="m.onnx"):
        optimise(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files refuses a write as a full disk does."""
    floats(tmp_path / "w.bin", 100_000)
    path = made(tmp_path / "m.onnx", stored("w.bin", dims=(100_000,)), axes=("batch", 100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write .*out: File too large; nothing was left behind"):
            optimise(path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "w.bin"]
    assert optimise(path, tmp_path / "out").checks


def test_an_optimiser_that_changes_the_graph_is_found_out(tmp_path, monkeypatch):
    from rwkv_lab.export.onnx import optimise as module

    def wrong(model) -> None:
        model.graph[0].op_type = "Sub"

    monkeypatch.setattr(module, "optimise_graph", wrong)
    with pytest.raises(ONNXExportError, match="does not compute the same once it is optimised: "):
        optimise(made(tmp_path / "m.onnx"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
