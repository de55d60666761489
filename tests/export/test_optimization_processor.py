"""Fewer bits for weights and nothing that no layer reads: the numbers, the files, what is listed, what is refused."""

import numpy as np
import pytest
import torch
from random_models import load_model, make_layout, random_tensors, write_model

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.packed import NOTE
from rwkv_lab.checkpoint.rounding import from_int4, from_int8
from rwkv_lab.errors import CorruptFileError, FormatExportError, LayoutError, NumericsError, OutputError, ParameterError
from rwkv_lab.export import OptimizationProcessor, optimization_processor
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.peft import dequantize_nf4, quantize_nf4

SIZES = {"n_head": 1, "head_size": 32, "dim_ffn": 96, "vocab_size": 257}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model, its second layer's matrices among them, in a file."""
    return write_model(tmp_path_factory.mktemp("source") / "m.safetensors", make_layout("7.0", **SIZES))


@pytest.mark.parametrize("level", ["int8", "int4"])
def test_weights_in_torch_are_those_of_the_graph_bit_for_bit(exported, level):
    model, folder = exported("7.0", level)
    import onnx  # where it is there
    from onnx import numpy_helper

    graph = onnx.load(str(folder / "model.onnx"))
    written = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    quantised = OptimizationProcessor(level).apply_quantization(model)
    weights, compared = dict(quantised.model.named_parameters()), 0
    for t in quantised.tensors:
        assert t.original_bytes == weights[t.name].nbytes
        if not t.is_quantised:
            assert torch.equal(weights[t.name], model.get_parameter(t.name)) and t.bytes == t.original_bytes
            continue
        ends = {"int8": ("int8", "scale"), "int4": ("int4", "scales", "zero_points")}[t.stored]
        parts = [written[f"{t.name}.{end}"] for end in ends]
        back = (from_int8 if t.stored == "int8" else from_int4)(*parts).T
        assert np.array_equal(weights[t.name].numpy(), back) and not np.array_equal(back, model.get_parameter(t.name))
        assert t.bytes == sum(part.nbytes for part in parts)
        compared += 1
    assert compared == 3 * 6 + 1 and [t.stored for t in quantised.tensors if t.name == "head.weight"] == ["int8"]
    assert "19 tensors" in quantised.described() or "18 tensors are stored in int4" in quantised.described()


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("level", ["int8", "int4", "nf4"])
def test_packed_files_hold_what_the_processor_leaves(source, tmp_path, level, kind):
    processor, out = OptimizationProcessor(level), tmp_path / f"out.{kind}"
    tensors, _ = processor.compress_model_weights(source, out, kind)
    expected = processor.apply_quantization(RWKV_Dual.from_pretrained(source)).model
    loaded = RWKV_Dual.from_pretrained(out, weights="dense")
    for name, weight in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name
    with open_checkpoint(out) as ck:
        assert ck.kind == "model" and ck.quantised[level] == (13 if level == "int8" else 12)
    assert out.stat().st_size < 0.6 * source.stat().st_size
    assert sum(t.bytes for t in tensors) < out.stat().st_size < sum(t.bytes for t in tensors) + 30_000  # its header


@pytest.mark.parametrize("level", ["int8", "int4", "nf4"])
def test_a_matrix_is_rounded_once_for_all_its_parts(source, tmp_path, monkeypatch, level):
    rounded, round_once = [], optimization_processor._rounded
    monkeypatch.setattr(optimization_processor, "_rounded", lambda *given: rounded.append(1) or round_once(*given))
    tensors, _ = OptimizationProcessor(level).compress_model_weights(source, tmp_path / "out.pth", "pth")
    assert len(rounded) == sum(t.is_quantised for t in tensors) > 6


def test_nf4_is_that_of_bitsandbytes(source, tmp_path):
    OptimizationProcessor("nf4").compress_model_weights(source, tmp_path / "out.safetensors")
    name = "blocks.1.ffn.value.weight"
    with open_checkpoint(tmp_path / "out.safetensors") as ck, open_checkpoint(source) as model:
        codes, absmax = quantize_nf4(model[name])
        assert torch.equal(ck[name], dequantize_nf4(codes, absmax, model[name].shape))


def test_gguf_files_and_what_they_do_not_have(source, tmp_path):
    for level, kind in (("int8", "Q8_0"), ("int4", "Q4_0")):
        out = tmp_path / f"{level}.gguf"
        OptimizationProcessor(level).compress_model_weights(source, out, "gguf")
        with open_checkpoint(out) as ck:
            assert ck.quantised[kind] > 10
    with pytest.raises(FormatExportError, match="GGUF has no nf4: export int4"):
        OptimizationProcessor("nf4").compress_model_weights(source, tmp_path / "nf4.gguf", "gguf")


def test_damaged_packed_files(source, tmp_path):
    OptimizationProcessor("int4").compress_model_weights(source, tmp_path / "out.pth", "pth")
    from safetensors.torch import save_file

    stored = torch.load(tmp_path / "out.pth", weights_only=True)
    name = "blocks.0.att.key.weight"
    changes = {
        "no blocks.0.att.key.weight.scales": {f"{name}.scales": None},
        "scales is float32 .* it would be float32": {f"{name}.scales": torch.ones(32, 3)},
        "zero_points is int8": {f"{name}.zero_points": torch.ones(32, 1, dtype=torch.int8)},
        "packed and as it is": {name: torch.ones(32, 32)},
    }
    for says, change in changes.items():
        tensors = {n: t.contiguous() for n, t in (stored | change).items() if t is not None}
        save_file(tensors, tmp_path / "x.safetensors", {NOTE: "1"})
        with pytest.raises(CorruptFileError, match=says):
            open_checkpoint(tmp_path / "x.safetensors")
    save_file(dict(stored), tmp_path / "x.safetensors", {NOTE: "2"})
    with pytest.raises(LayoutError, match="packed in form '2'"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_int4_of_rows_that_are_no_whole_blocks(tmp_path):
    model = load_model(tmp_path, "4.0", n_layer=1, n_head=1, head_size=48, vocab_size=256)
    processor = OptimizationProcessor("int4")
    says = r"blocks.0.att.\w+.weight has 48 inputs, which is no multiple of 32, the block of int4.\n.*int8"
    for refused in (
        lambda: processor.plan_quantisation(tmp_path / "m.safetensors"),
        lambda: processor.apply_quantization(model),
        lambda: processor.compress_model_weights(tmp_path / "m.safetensors", tmp_path / "out.pth", "pth"),
    ):
        with pytest.raises(FormatExportError, match=says):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_what_is_refused(source, tmp_path):
    model = RWKV_Dual.from_pretrained(source)
    for values, says in (
        (dict(level="int3"), "level='int3'.*one of"),
        (dict(level="nf4", choice={"head.weight": "int8"}), "choice is of ONNX graphs"),
    ):
        with pytest.raises(ParameterError, match=says):
            OptimizationProcessor(**values)
    with pytest.raises(ParameterError, match="choice names heads.weight"):
        OptimizationProcessor("int8", {"heads.weight": "int4"}).apply_quantization(model)
    with pytest.raises(FormatExportError, match="ln_out.weight is no matrix"):
        OptimizationProcessor("int8", {"ln_out.weight": "int4"}).apply_quantization(model)
    model.requires_grad_(False).get_parameter("head.weight")[0, 0] = 1e6
    with pytest.raises(NumericsError, match=r"head.weight holds 1e\+06"):
        OptimizationProcessor("fp16").apply_quantization(model)
    (tmp_path / "there.pth").write_bytes(b"mine")
    with pytest.raises(OutputError, match="there.pth"):
        OptimizationProcessor("int8").compress_model_weights(source, tmp_path / "there.pth", "pth")
    assert (tmp_path / "there.pth").read_bytes() == b"mine"


def test_one_matrix_stored_in_another_way(source):
    model = RWKV_Dual.from_pretrained(source)
    choice = {"blocks.1.ffn.key.weight": "fp16", "head.weight": "fp32"}
    found = OptimizationProcessor("int4", choice).apply_quantization(model)
    stored = {t.name: t.stored for t in found.tensors}
    assert stored["blocks.1.ffn.key.weight"] == "fp16" and stored["head.weight"] == "fp32"
    assert stored["blocks.0.ffn.key.weight"] == "int4" and stored["emb.weight"] == stored["blocks.0.att.w1"] == "fp32"
    half = model.get_parameter("blocks.1.ffn.key.weight").half().float()
    assert torch.equal(found.model.get_parameter("blocks.1.ffn.key.weight"), half)


def test_what_is_left_out_is_named(tmp_path):
    layout = make_layout("7.0", **SIZES)
    unread = {f"blocks.0.att.{n}": torch.ones(s) for n, s in (("v0", (1, 1, 32)), ("v1", (32, 3)), ("v2", (3, 32)))}
    torch.save({**random_tensors(layout), **unread, "exp_avg": torch.ones(7), "step": 5}, tmp_path / "M.pth")
    processor = OptimizationProcessor()
    alone = processor.remove_training_artifacts(tmp_path / "M.pth", tmp_path / "alone.pth")
    assert alone.left_out == ("exp_avg", "step") and alone.saved_bytes == 28
    read = processor.optimize_model_structure(alone.path, tmp_path / "read.safetensors")
    assert {*read.left_out} == unread.keys() and str(read).startswith("3 things, 896 bytes: blocks.0.att.v")
    with open_checkpoint(read.path) as ck:
        assert ck.kind == "model" and not unread.keys() & {*ck}
    tokens = torch.arange(20)[None]
    logits = [RWKV_Dual.from_pretrained(path)(tokens)[0] for path in (alone.path, read.path)]
    assert torch.equal(*logits)
    nothing = processor.optimize_model_structure(read.path, tmp_path / "more.safetensors")
    assert nothing.path == read.path and not nothing.left_out and not (tmp_path / "more.safetensors").exists()


def test_sizes_before_and_after(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", {"x": torch.ones(1000)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/b").write_bytes(bytes(1000))
    size = (tmp_path / "a.safetensors").stat().st_size
    found = OptimizationProcessor().calculate_size_reduction(tmp_path / "a.safetensors", tmp_path / "folder")
    assert (found.original_mb, found.optimised_mb) == (size / 1e6, 1e-3)
    assert found.percentage == pytest.approx(100 * (1 - 1000 / size))
    assert OptimizationProcessor().calculate_size_reduction(10, 15).percentage == -50
    with pytest.raises(ParameterError, match="no file or folder"):
        OptimizationProcessor().calculate_size_reduction(1, tmp_path / "c")
