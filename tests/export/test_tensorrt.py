"""What is made ready for TensorRT: checks without it, and the calls that build engines, against a stand-in for it."""

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from onnx import TensorProto, helper  # noqa: E402

from rwkv_lab.checks import Check, NotApplicable  # noqa: E402
from rwkv_lab.errors import FormatExportError, ParameterError  # noqa: E402
from rwkv_lab.export import ConfigurationManager, build_engine, tensorrt_engines  # noqa: E402
from rwkv_lab.export.families.rwkv import RwkvReference  # noqa: E402
from rwkv_lab.export.onnx.tensorrt_operators import check_for_tensorrt  # noqa: E402
from rwkv_lab.export.tensorrt_engines import export_tensorrt  # noqa: E402

SIZES = {"batch": [1, 2, 4], "length": [1, 8, 32]}
FLOAT = TensorProto.FLOAT
PROFILE = {"x": [[1, 4], [2, 4], [8, 4]]}

# As the documented interfaces are, 10 with weak types beside strong ones, 11 with strong ones alone. Every call is
# written down; what is not in these interfaces raises.
STAND_IN = """
import json, os, pathlib

__version__ = "VERSION"
TEN = __version__.startswith("10")


def said(name, *arguments):
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(json.dumps([name, *arguments]) + "\\n")


class Logger:
    WARNING = 2

    def __init__(self, level):
        said("Logger", level)


class MemoryPoolType:
    WORKSPACE = "workspace"


class BuilderFlag:
    TF32 = "tf32"


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


if TEN:
    BuilderFlag.FP16 = "fp16"


class Input:
    def __init__(self, name):
        self.name = name


class Network:
    num_inputs = 0

    def get_input(self, i):
        return self.inputs[i]


class Profile:
    def set_shape(self, name, least, optimal, largest):
        said("set_shape", name, least, optimal, largest)


class Config:
    def set_memory_pool_limit(self, pool, size):
        said("set_memory_pool_limit", pool, size)

    def clear_flag(self, flag):
        said("clear_flag", flag)

    def add_optimization_profile(self, profile):
        said("add_optimization_profile")
        return 0


class Builder:
    def __init__(self, logger):
        if "STAND_IN_NO_GPU" in os.environ:
            raise RuntimeError("CUDA failure with error 35")
        said("Builder")

    def create_network(self, flags=0):
        assert flags == (1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED if TEN else 0)
        said("create_network", flags)
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        said("build_serialized_network")
        return None if "STAND_IN_FAILS" in os.environ else b"an engine"


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def get_error(self, i):
        return "node 3 has no importer"

    def parse_from_file(self, path):
        import onnx

        said("parse_from_file", path)
        model = onnx.load(path)
        self.network.inputs = [Input(value.name) for value in model.graph.input]
        self.network.num_inputs = len(self.network.inputs)
        return "STAND_IN_NOT_PARSED" not in os.environ


class Runtime:
    def __init__(self, logger):
        said("Runtime")

    def deserialize_cuda_engine(self, data):
        assert data == b"an engine"
        return object()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(version)` puts it where Python finds it; returns the calls that were made since."""
    log = tmp_path / "calls"
    monkeypatch.setenv("STAND_IN_LOG", str(log))

    def make(version: str):
        folder = tmp_path / f"tensorrt-{version}"
        folder.mkdir()
        (folder / "tensorrt.py").write_text(STAND_IN.replace("VERSION", version))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.syspath_prepend(str(folder))
        return lambda: [tuple(json.loads(line)) for line in log.read_text().splitlines()]

    return make


@pytest.fixture(scope="module")
def ready(exported, tmp_path_factory):
    """A folder for TensorRT, made without it."""
    model, folder = exported("7.0")
    out = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tensorrt_engines, "find_spec", lambda name: None)
        return export_tensorrt(folder, out / "tensorrt", SIZES, RwkvReference(model, ""), False), folder


def test_without_tensorrt_nothing_is_said_to_be_built(ready):
    found, source = ready
    assert not found.built and str(found) == "TensorRT: not built (the package tensorrt is not installed)"
    assert {p.name for p in found.folder.iterdir()} == {"build_engine.py", "profiles.json", "expected.npz", "README.md"}
    plan = json.loads((found.folder / "profiles.json").read_text())
    assert (found.folder / plan["onnx"]).resolve() == source.resolve() and plan["graphs"].keys() == {
        "model.onnx",
        "step.onnx",
    }
    assert plan["graphs"]["model.onnx"]["tokens"] == [[1, 1], [2, 8], [4, 32]]
    assert plan["graphs"]["step.onnx"]["tokens"] == [[1, 1], [2, 1], [4, 1]]
    assert [shape[0] for shape in plan["graphs"]["model.onnx"]["wkv"]] == [1, 2, 4]
    shown = "\n".join(map(str, found.checks))
    assert all(check.passed for check in found.checks if isinstance(check, Check))
    for words in ("in sub-graphs too", "Scan", "opset for TensorRT: 20 (limit 9 to 25)", "at 1x1, 2x8: largest rel"):
        assert words in shown
    readme = (found.folder / "README.md").read_text()
    assert f"trtexec --onnx={plan['onnx']}/step.onnx --saveEngine=step.plan --minShapes=tokens:1x1," in readme
    with np.load(found.folder / "expected.npz") as stored:
        assert stored["model.onnx/in/tokens"].shape == (2, 16) and stored["model.onnx/out/logits"].ndim == 3


def run_script(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "build_engine.py", *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["10.15.1", "11.4.0"])
def test_the_calls_that_build_an_engine(ready, stand_in, tmp_path, version):
    shutil.copytree(ready[0].folder, tmp_path / "tensorrt")
    calls = stand_in(version)
    where = ["--onnx", str(ready[1])]
    done = run_script(tmp_path / "tensorrt", *where, "--graph", "step.onnx", "--workspace-gib", "2")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["graph"] == "step.onnx" and said["tensorrt"] == version and "not compared" in said["error_of_outputs"]
    assert (tmp_path / "tensorrt/step.plan").read_bytes() == b"an engine"
    made = [name for name, *_ in calls()]
    assert made == [
        *("Logger", "Builder", "create_network", "parse_from_file", "set_memory_pool_limit", "clear_flag"),
        *["set_shape"] * 4,
        *("add_optimization_profile", "build_serialized_network", "Runtime"),
    ]
    given = {name: arguments for name, *arguments in calls() if name != "set_shape"}
    assert given["create_network"] == [2 if version.startswith("10") else 0]
    assert given["parse_from_file"] == [str(ready[1] / "step.onnx")] and given["clear_flag"] == ["tf32"]
    assert given["set_memory_pool_limit"] == ["workspace", 2 * 2**30]
    shapes = {name: rest for kind, name, *rest in (c for c in calls() if c[0] == "set_shape")}
    assert shapes["tokens"] == [[1, 1], [2, 1], [4, 1]] and shapes.keys() == {"tokens", "wkv", "att_shift", "ffn_shift"}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("STAND_IN_NO_GPU", "tensorrt cannot be used here: RuntimeError: CUDA failure with error 35"),
        ("STAND_IN_NOT_PARSED", "step.onnx is not parsed: node 3 has no importer"),
        ("STAND_IN_FAILS", "step.onnx: TensorRT builds no engine"),
    ],
)
def test_what_goes_wrong_when_building(ready, stand_in, tmp_path, monkeypatch, fault, says):
    stand_in("11.4.0")
    monkeypatch.setenv(fault, "1")
    source = tmp_path / "onnx"
    source.mkdir()
    for name in ("step.onnx", "export.json", "model.onnx", "initial_state.npz", "README.md"):
        shutil.copy(ready[1] / name, source / name)
    (source / "model.onnx").unlink()
    found = export_tensorrt(source, tmp_path / "tensorrt", SIZES, None, False)
    assert not found.built and says in str(found) and str(found).startswith("TensorRT: not built (")
    assert not list(found.folder.glob("*.plan*"))
    assert any(isinstance(check, NotApplicable) and "not given" in check.reason for check in found.checks)


def test_with_tensorrt_engines_are_built_and_the_missing_comparison_is_named(ready, stand_in, tmp_path):
    stand_in("10.15.1")
    found = export_tensorrt(ready[1], tmp_path / "tensorrt", SIZES, None, False)
    assert found.built and str(found).startswith("TensorRT: built model.onnx, step.onnx (not compared: torch has ")
    assert all(path.read_bytes() == b"an engine" for path in found.engines.values())
    assert sum("not compared" in check.reason for check in found.checks if isinstance(check, NotApplicable)) == 2


class Context:
    """Runs an "engine": gives what is expected, with `off` added to one value."""

    def __init__(self, expected: dict[str, np.ndarray], off: float):
        self.expected, self.off, self.shapes, self.places = expected, off, {}, {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, place: int) -> None:
        self.places[name] = place

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7 and self.shapes["tokens"] == (2, 1)
        for name, array in self.expected.items():
            given = array.copy()
            given.flat[0] += self.off
            ctypes.memmove(self.places[name], given.ctypes.data, given.nbytes)
        return True


def test_an_engine_is_compared_with_onnxruntime(ready, tmp_path, monkeypatch):
    folder = tmp_path / "tensorrt"
    shutil.copytree(ready[0].folder, folder)
    (folder / "step.plan").write_bytes(b"an engine")
    monkeypatch.setattr(build_engine, "HERE", folder)
    monkeypatch.setattr(build_engine, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=7, synchronize=lambda: None))
    with np.load(folder / "expected.npz") as stored:
        expected = {name.split("/")[2]: stored[name] for name in stored.files if name.startswith("step.onnx/out")}
    scale = max(1.0, max(float(np.abs(array).max()) for array in expected.values()))
    for off in (0.0, 0.5 * scale, float("nan")):
        engine = SimpleNamespace(create_execution_context=lambda off=off: Context(expected, off))
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data, engine=engine: engine)
        trt = SimpleNamespace(Runtime=lambda logger, runtime=runtime: runtime)
        error = build_engine.compare(trt, None, folder / "step.plan", "step.onnx")
        assert error == 0 if off == 0 else error > build_engine.LIMIT, off


def test_a_graph_that_computes_something_else_is_refused(exported, tmp_path):
    model, folder = exported("7.0")
    other = exported("7.0", "fp16").folder
    shutil.copytree(other, tmp_path / "onnx")
    manifest = json.loads((tmp_path / "onnx/export.json").read_text())
    (tmp_path / "onnx/export.json").write_text(json.dumps(manifest | {"weights": "fp32"}))
    with pytest.raises(FormatExportError, match="do not compute what the model does"):
        export_tensorrt(tmp_path / "onnx", tmp_path / "out", SIZES, RwkvReference(model, ""), False)
    assert not (tmp_path / "out").exists() and folder.exists()


# ------------------------------------------------------------------ what TensorRT does not take


def graph(path: Path, *nodes, x=FLOAT, y=FLOAT, opset=20, tensors=(), shape=("batch", 4), domains=()) -> Path:
    values = [helper.make_tensor_value_info("x", x, shape), helper.make_tensor_value_info("y", y, None)]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_graph(list(nodes), "g", values[:1], values[1:], tensors)
    path.write_bytes(helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def node(kind: str, *inputs: str, output="y", **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, [*inputs], [output], **attributes)


ZERO = helper.make_tensor("zero", TensorProto.INT8, [], [3])
SCALE = helper.make_tensor("scale", FLOAT, [], [1.0])
YES = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
BRANCH = helper.make_graph(
    [node("NonZero", "x", output="b")], "then", [], [helper.make_tensor_value_info("b", TensorProto.INT64, None)]
)


@pytest.mark.parametrize(
    ("nodes", "others", "says"),
    [
        ([node("Bernoulli", "x")], {}, "Bernoulli y, is no operator that it has"),
        (
            [node("MatMulNBits", "x", domain="com.microsoft")],
            {"domains": ["com.microsoft"]},
            "is of com.microsoft, whose operators only onnxrun",
        ),
        ([node("If", "yes", then_branch=BRANCH, else_branch=BRANCH)], {"tensors": [YES]}, "NonZero b, is no operator"),
        ([node("Sin", "x")], {"x": TensorProto.DOUBLE, "y": TensorProto.DOUBLE}, "type DOUBLE, which it does not take"),
        ([node("ReduceSum", "x", "axes")], {}, "has axes as its axes or depth, which must be constant"),
        ([node("QuantizeLinear", "x", "scale", "zero")], {"tensors": [SCALE, ZERO]}, "a zero point other than 0"),
        ([node("Identity", "x")], {"opset": 26}, "opset 26; TensorRT takes 9 to 25"),
        ([node("Identity", "x")], {"opset": 8}, "opset 8; TensorRT takes 9 to 25"),
        ([node("Attention", "x", "x", "x", "", "x")], {"opset": 23}, "has a past, a soft cap"),
        ([node("Cast", "x", to=TensorProto.UINT16)], {"y": TensorProto.UINT16}, "y is of type UINT16"),
    ],
)
def test_what_tensorrt_does_not_take_is_named(tmp_path, nodes, others, says):
    with pytest.raises(FormatExportError, match=says):
        check_for_tensorrt(graph(tmp_path / "m.onnx", *nodes, **others), PROFILE)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({}, "x is an input, or has shapes stated, and not both"),
        (PROFILE | {"z": [[1], [1], [1]]}, "z is an input, or has"),
        ({"x": [[1, 4], [2, 4]]}, "must be three, of 2 axes"),
        ({"x": [[1], [2], [8]]}, "must be three, of 2 axes"),
        ({"x": [[3, 4], [2, 4], [8, 4]]}, "axis 0 of x has the sizes 3, 2, 8"),
        ({"x": [[1, 4], [9, 4], [8, 4]]}, "axis 0 of x has the sizes 1, 9, 8"),
        ({"x": [[0, 4], [0, 4], [0, 4]]}, "axis 0 of x has the sizes 0, 0, 0"),
        ({"x": [[1, 4], [2, 4], [8, 5]]}, "axis 1 of x is 4; shapes say 4 to 5"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path, profile, says):
    path = graph(tmp_path / "m.onnx", node("Identity", "x"))
    assert check_for_tensorrt(path, PROFILE)
    with pytest.raises(FormatExportError, match=says):
        check_for_tensorrt(path, profile)


def test_a_cache_has_shapes_of_its_own(tmp_path):
    """A graph of the axes that causal language models have."""
    values = {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "past + length"],
        "past_key_values.0.key": ["batch", 2, "past", 4],
    }
    inputs = [
        helper.make_tensor_value_info(n, FLOAT if "key" in n else TensorProto.INT64, d) for n, d in values.items()
    ]
    shapes = {"y": ["batch", "past + length"], "z": ["batch", 2, "past", 4]}
    outputs = [helper.make_tensor_value_info(name, FLOAT, dims) for name, dims in shapes.items()]
    nodes = [node("Cast", "attention_mask", to=FLOAT), node("Relu", "past_key_values.0.key", output="z")]
    whole = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    source = tmp_path / "onnx"
    source.mkdir()
    onnx.save(model, str(source / "model.onnx"))
    found = export_tensorrt(source, tmp_path / "out", SIZES, None, False)
    shapes = json.loads((found.folder / "profiles.json").read_text())["graphs"]["model.onnx"]
    assert shapes["past_key_values.0.key"] == [[1, 2, 0, 4], [2, 2, 8, 4], [4, 2, 32, 4]]
    assert shapes["attention_mask"] == [[1, 1], [2, 16], [4, 64]]
    with np.load(found.folder / "expected.npz") as stored:
        assert stored["model.onnx/in/attention_mask"].shape == (2, 32) and stored["model.onnx/out/y"].all()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "rows"
    onnx.save(model, str(source / "model.onnx"))
    with pytest.raises(FormatExportError, match="the axis rows of input_ids can have any size, and none is stated"):
        export_tensorrt(source, tmp_path / "other", SIZES, None, False)


def test_options():
    def resolve(**values):
        return ConfigurationManager(environment={}).resolve(checkpoint_path="A.pth", **values)

    for sizes, taken in (([1, 2, 8], [1, 2, 8]), ("1,2,8", [1, 2, 8]), (["1", "2", "8"], [1, 2, 8])):
        assert resolve(export_tensorrt=True, tensorrt_batch=sizes).tensorrt_batch == taken
    for sizes in ([2, 1, 8], [1, 2], [0, 1, 1], "1,2,x", [1.0, 2, 3], 5):
        with pytest.raises(ParameterError, match="tensorrt_length="):
            resolve(tensorrt_length=sizes)
    for values, says in (
        ({"export_onnx": False}, "needs export_onnx=True"),
        ({"quantization_level": "int8"}, "no operator for weights stored like that; take none or fp16"),
        ({"quantization_level": "int4"}, "no operator for weights stored like that"),
    ):
        with pytest.raises(ParameterError, match=says):
            resolve(export_tensorrt=True, **values)
    variables = {"EXPORT_ENABLE_TENSORRT": "1", "EXPORT_TENSORRT_LENGTH": "[1, 16, 64]"}
    found = ConfigurationManager(environment=variables).resolve(checkpoint_path="A.pth")
    assert found.export_tensorrt and found.tensorrt_length == [1, 16, 64]
