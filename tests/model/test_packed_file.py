"""Models in 8 and 4 bits in files: opened again without the original, equal to the last bit."""

import json
from types import SimpleNamespace

import pytest
import torch
from random_models import load_model, make_tokens, relative_rms
from safetensors.torch import load_file, save_file

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checkpoint.packed import ACTIVATIONS, COLUMNS, NOTE
from rwkv_lab.cli import main
from rwkv_lab.convert import convert
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError
from rwkv_lab.merge import extract_lora, merge
from rwkv_lab.model import RWKVMode, quantise_weights
from rwkv_lab.model.weight_only import SCHEMES, PackedEmbedding, PackedLinear
from rwkv_lab.peft import LoraConfig, apply_peft, load_model_and_apply_peft
from rwkv_lab.progress import human_bytes
from rwkv_lab.train import plan_training
from rwkv_lab.workbench.inspect.cells import _facts

# Rows that end inside a group of 64 codes and inside a line of 128.
SIZES = {"4.0": {"n_embd": 100, "dim_ffn": 300}, "7.0": {"n_embd": 100, "n_head": 5, "head_size": 20}}


def saved(folder, version="7.0", scheme="int4", dtype=torch.float32, **sizes):
    model = quantise_weights(load_model(folder, version, dtype=dtype, **(sizes or SIZES[version])), scheme)
    return model, model.save_pretrained(folder / "packed").parent


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("version", "dtype"), [("4.0", torch.float32), ("7.0", torch.float32), ("7.0", torch.bfloat16)]
)
def test_opened_again_it_computes_the_same_bits(tmp_path, version, scheme, dtype):
    model, folder = saved(tmp_path, version, scheme, dtype)
    (tmp_path / "m.safetensors").unlink()  # the original
    again = RWKV_Dual.from_pretrained(folder, dtype=dtype)
    assert type(again.head) is PackedLinear and type(again.emb) is PackedEmbedding
    assert not any(p.requires_grad for p in again.parameters())
    for one in (model, again):
        one.eval()
    for mode in RWKVMode:
        model.set_mode(mode)
        again.set_mode(mode)
        (found, state), (expected, right) = again(make_tokens(2, 9)), model(make_tokens(2, 9))
        assert torch.equal(found, expected)
        assert all(torch.equal(x, right.tensors()[name]) for name, x in state.tensors().items())
    assert again.save_pretrained(tmp_path / "twice").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_its_codes_are_mapped_and_the_file_stays_as_it_is(tmp_path, monkeypatch):
    first, folder = saved(tmp_path, n_embd=256, n_head=4, head_size=64, dim_ffn=512)
    before, read = (folder / "model.safetensors").read_bytes(), []
    for reading in ("read", "blocks"):
        way = getattr(TensorInfo, reading)
        monkeypatch.setattr(TensorInfo, reading, lambda self, *n, way=way: read.append(self.name) or way(self, *n))
    model = RWKV_Dual.from_pretrained(folder)
    assert "ln_out.weight" in read and not [name for name in read if "int4" in name or name == "head.weight"]
    tokens = make_tokens(1, 3)
    model.head.scales.zero_()
    assert not model(tokens)[0].any() and first(tokens)[0].any()
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "model.safetensors").unlink()  # its pages stay while they are used
    assert torch.equal(model(tokens)[1].wkv, first(tokens)[1].wkv)


def test_it_is_a_model_to_everything_that_reads_checkpoints(tmp_path):
    model, folder = saved(tmp_path, scheme="int8")
    with open_checkpoint(folder) as ck:
        assert ck.kind == "model" and ck.quantised == {"int8": 12 + 2}
        assert ck.info["emb.weight"].shape == (70, 100)
        for name in ("emb", "blocks.1.ffn.value"):
            assert torch.equal(ck[f"{name}.weight"], model.get_submodule(name).dequantised())
    dense = RWKV_Dual.from_pretrained(folder, weights="dense")
    assert torch.equal(dense.head.weight, model.head.dequantised())
    tokens = make_tokens(1, 9)
    again = RWKV_Dual.from_pretrained(dense.save_pretrained(tmp_path / "dense"))
    assert relative_rms(again(tokens)[0], model(tokens)[0]) < 1e-5
    with pytest.raises(ParameterError, match="has emb, a PackedEmbedding. Weights are rounded once"):
        quantise_weights(RWKV_Dual.from_pretrained(folder))


def test_inspection_says_how_it_is_packed(tmp_path, capsys):
    _, folder = saved(tmp_path, scheme="int4")
    assert main(["inspect", str(folder), str(tmp_path / "m.safetensors")]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  packed")]
    with open_checkpoint(folder) as ck:
        there = [info for info in ck.stored.values() if info.derived]
        size = sum(part.nbytes for info in there for part in (info.derived.of, *info.derived.others))
        wide = sum(info.nbytes for info in there)
        assert dict(_facts(ck))["packed"] == shown[0].split(maxsplit=1)[1]
    assert shown == [f"  packed   14 in int4 ({human_bytes(size)}); {human_bytes(wide)} as float32"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_jobs_that_need_weights_as_they_were_say_how_it_is_packed_and_what_to_do(tmp_path, scheme):
    _, folder = saved(tmp_path, scheme=scheme)
    plain = tmp_path / "m.safetensors"
    how = f"of its matrices 14 in {scheme}"
    says = rf"is packed: {how}. {{}} needs .*the model it was packed from.\n.*\n.*\"dense\""
    for base, tuned in ((folder, plain), (plain, folder)):
        with pytest.raises(LayoutError, match=says.format("A merge")):
            merge(base, tuned, tmp_path / "out.pth", method="linear", weights=[1, 0])
        with pytest.raises(LayoutError, match=says.format("Extracting an adapter")):
            extract_lora(base, tuned, tmp_path / "out.pth", rank=1)
    for target in ("safetensors", "pth", "fla"):
        with pytest.raises(LayoutError, match=says.format("A conversion")):
            convert(folder, target, tmp_path / "out")
    with pytest.raises(LayoutError, match=says.format("Training")):
        plan_training("lora", folder)
    with pytest.raises(LayoutError, match=says.format("An adapter")):
        load_model_and_apply_peft(SimpleNamespace(peft_load_path=str(folder)), LoraConfig())
    with pytest.raises(ParameterError, match="is in 8 or 4 bits"):
        apply_peft(RWKV_Dual.from_pretrained(folder), LoraConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "packed"]


def test_what_products_read_is_kept_with_it(tmp_path):
    plain = load_model(tmp_path, "7.0")
    for activations in ("float32", "int8"):
        model = quantise_weights(plain, "int8", activations=activations)
        again = RWKV_Dual.from_pretrained(model.save_pretrained(tmp_path / activations).parent)
        tokens = make_tokens(1, 40)
        assert again.head.activations == activations and torch.equal(again(tokens)[0], model(tokens)[0])
    file = changed(tmp_path / "int8/model.safetensors", tmp_path / "x.safetensors", {ACTIVATIONS: "int2"})
    with pytest.raises(CorruptFileError, match="activations='int2'; int8, float32"):
        RWKV_Dual.from_pretrained(file)


def changed(path, out, notes=None, **change):
    with open_checkpoint(path) as ck:
        metadata = {name: value for name, value in ck.metadata.items() if name != "format"}
    tensors = {n: t for n, t in (load_file(path) | change).items() if t is not None}
    save_file(tensors, out, {**metadata, **(notes or {})})
    return out


def test_damaged_files(tmp_path):
    _, folder = saved(tmp_path)
    file, out, name = folder / "model.safetensors", tmp_path / "x.safetensors", "blocks.0.att.key.weight"
    changes = [
        (f"has {name}.int4_codes and no {name}.int4_scales", {f"{name}.int4_scales": None}, {}),
        ("int4_scales is float32 .* it would be bfloat16", {f"{name}.int4_scales": torch.ones(100, 4)}, {}),
        ("int4_codes is int8 .* it would be int16", {f"{name}.int4_codes": torch.ones(100, 32, dtype=torch.int8)}, {}),
        ("packed and as it is", {name: torch.ones(100, 100)}, {}),
        ("would have 300 columns", {}, {COLUMNS: json.dumps({name: 300})}),
        ("would have -1 columns", {}, {COLUMNS: json.dumps({name: -1})}),
        ("no numbers of columns by name", {}, {COLUMNS: json.dumps({name: "100"})}),
        ("no numbers of columns by name", {}, {COLUMNS: "[" * 5000}),
    ]
    for says, change, notes in changes:
        with pytest.raises(CorruptFileError, match=says):
            open_checkpoint(changed(file, out, notes, **change))
    with pytest.raises(LayoutError, match="packed in form '2'"):
        open_checkpoint(changed(file, out, {NOTE: "2"}))
    with pytest.raises(LayoutError):  # as wide as its codes: another model than its vectors say
        RWKV_Dual.from_pretrained(changed(file, out, {COLUMNS: "{}"}))
    with pytest.raises(CorruptFileError):
        data = file.read_bytes()
        out.write_bytes(data[: len(data) - 64])
        RWKV_Dual.from_pretrained(out)
