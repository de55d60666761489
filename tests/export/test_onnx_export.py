"""Exporting: quantised weights, tuned states, surroundings that must not matter, and what is refused."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from random_models import load_model, make_tokens

from rwkv_lab.errors import ONNXExportError, OutputError, ParameterError
from rwkv_lab.export import OnnxModel, export_onnx
from rwkv_lab.model import RWKV_Dual

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("weights", "most", "operator"),
    [("fp16", 2e-3, "Cast"), ("int8", 0.1, "MatMulInteger"), ("int4", 0.5, "MatMulNBits")],
)
def test_fewer_bits(exported, weights, most, operator):
    model, folder = exported("7.0", weights)
    graph, tokens = OnnxModel(folder), make_tokens(2, 33, 257)
    logits, state = model(tokens)
    found, after = graph.run(tokens.numpy())
    off = np.abs(found - logits.numpy()).max() / logits.abs().max()
    assert 1e-6 < off < most  # it is quantised, and still the model
    assert after["wkv"].dtype == np.float32 and state.wkv.shape == after["wkv"].shape
    step, _ = graph.run(tokens[:, :1].numpy(), graph.create_state(2))
    first, _ = model(tokens[:, :1])
    assert np.abs(step - first[:, 0].numpy()).max() / first.abs().max() < most
    kinds = [node.op_type for node in onnx.load(str(folder / "step.onnx")).graph.node]
    expected = {"fp16": None, "int8": 3 * 6 + 1, "int4": 3 * 6}[weights]  # the head is int8 in int4
    assert kinds.count(operator) == expected or expected is None and operator in kinds
    assert kinds.count("MatMulInteger") == {"fp16": 0, "int8": 19, "int4": 1}[weights]


def test_weights_are_written_once(exported):
    folder = exported("7.0", "int8").folder
    places = {}
    for name in ("model.onnx", "step.onnx"):
        for tensor in onnx.load(str(folder / name), load_external_data=False).graph.initializer:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            if facts:
                assert facts["location"] == "model.onnx.data"
                places.setdefault(tensor.name, set()).add((facts["offset"], facts["length"]))
    assert places and all(len(found) == 1 for found in places.values())
    sizes = {int(offset): int(length) for found in places.values() for offset, length in found}
    assert (folder / "model.onnx.data").stat().st_size <= sum(-(-length // 4096) * 4096 for length in sizes.values())


def test_the_manifest(exported):
    folder = exported("7.0").folder
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["layout"]["version"] == "7.0" and manifest["opset"] == 20 and manifest["tokenizer"] == "bytes"
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"export.json"}
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert str(Path.home()) not in json.dumps(manifest)


SURROUNDED = """
import sys, torch
from rwkv_lab.export import OnnxModel, export_onnx
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
source, out = sys.argv[1:]
with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
    export_onnx(source, out, logits="last", opset=18)
assert torch.get_default_dtype() == torch.float64
"""


def test_a_tuned_state_without_a_compiler_and_with_other_defaults_of_torch(tmp_path):
    model = load_model(tmp_path, "6.0", time_state=True, n_layer=1, vocab_size=256)
    none = {"PATH": "/nonexistent", "CXX": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = [sys.executable, "-W", "error", "-c", SURROUNDED, tmp_path / "m.safetensors", tmp_path / "out"]
    environment = {**os.environ, **none, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr  # and silent
    graph, tokens = OnnxModel(tmp_path / "out"), make_tokens(2, 13, 256)
    found, state = graph.run(tokens.numpy())
    logits, after = model(tokens)
    assert model.has_time_state and np.any(graph.create_state()["wkv"])
    assert np.abs(found - logits[:, -1].numpy()).max() < 1e-5 * logits.abs().max()
    assert np.abs(state["wkv"] - after.wkv.numpy()).max() < 1e-5 * after.wkv.abs().max()
    manifest = json.loads((tmp_path / "out/export.json").read_text())
    assert manifest["opset"] == 18 and manifest["tuned_state"] is True


def test_the_highest_opset(tmp_path):
    model = load_model(tmp_path, "7.0", n_layer=1, vocab_size=256)
    assert export_onnx(model, tmp_path / "out", opset=25).opset == 25
    tokens = make_tokens(2, 7, 256)
    found, _ = OnnxModel(tmp_path / "out").run(tokens.numpy())
    assert np.abs(found - model(tokens)[0].numpy()).max() < 1e-5 * model(tokens)[0].abs().max()


def test_a_graph_that_is_not_optimised(exported, tmp_path):
    model, folder = exported("7.0", "int8")
    plain = export_onnx(model, tmp_path / "plain", "int8", optimise_graph=False)
    assert json.loads((tmp_path / "plain/export.json").read_text())["optimise_graph"] is False
    optimised = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.node
    assert plain.nodes["model.onnx"] > len(optimised)
    tokens = make_tokens(2, 7, 257).numpy()
    found, expected = (OnnxModel(path).run(tokens)[0] for path in (tmp_path / "plain", folder))
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_what_is_refused_before_any_work(tmp_path):
    model = load_model(tmp_path, "4.0", vocab_size=256)
    for opset in (17, 26, 0, "20", True):
        with pytest.raises(ParameterError, match="opset"):
            export_onnx(model, tmp_path / "out", opset=opset)
    with pytest.raises(ParameterError, match="weights='int2'.*one of"):
        export_onnx(model, tmp_path / "out", weights="int2")
    with pytest.raises(ParameterError, match="from float32 on the CPU"):
        export_onnx(RWKV_Dual.from_pretrained(tmp_path / "m.safetensors", dtype="bf16"), tmp_path / "out")
    with torch.inference_mode(), pytest.raises(ParameterError, match="inference_mode"):
        export_onnx(RWKV_Dual.from_pretrained(tmp_path / "m.safetensors"), tmp_path / "out")
    model.head = torch.nn.Sequential(model.head)
    with pytest.raises(ParameterError, match="head, a Sequential"):
        export_onnx(model, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        export_onnx(tmp_path / "m.safetensors", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_int4_needs_whole_blocks_and_leaves_nothing(tmp_path):
    load_model(tmp_path, "4.0", n_layer=1, n_head=1, head_size=48, vocab_size=256)
    with pytest.raises(ONNXExportError, match=r"blocks.0.att.key.weight has 48 inputs.*\n.*int8"):
        export_onnx(tmp_path / "m.safetensors", tmp_path / "out", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_full_disk_in_the_middle_of_external_data(exported, tmp_path):
    """A limit on the size of files refuses a write as a full disk does."""
    model, limits = exported("7.0").model, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write .*out: File too large; nothing was left behind"):
            export_onnx(model, tmp_path / "out", external_data=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    export_onnx(model, tmp_path / "out", external_data=True)
    assert (tmp_path / "out/model.onnx.data").stat().st_size > 60_000


MODELS = ROOT.parent / "shared" / "models"


@pytest.mark.skipif(not MODELS.is_dir(), reason=f"{MODELS} is not there")
@pytest.mark.parametrize("name", ["tiny-4v0-660K", "tiny-7v0-834K"])
def test_models_that_others_trained(name, tmp_path):
    export_onnx(MODELS / f"{name}.pth", tmp_path / "out")
    expected = np.load(MODELS / f"{name}.expected_logits.npy")
    graph = OnnxModel(tmp_path / "out")
    logits, _ = graph.run([[*b'"in']])
    np.testing.assert_allclose(logits[0, -1], expected, atol=1e-4)
    state = None
    for token in b'"in':
        logits, state = graph.run([[token]], state)
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)
