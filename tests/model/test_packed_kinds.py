"""Models in NF4, and files that an export has packed: opened as they lie there, and computed with."""

import weakref

import pytest
import torch
from random_models import load_model, make_tokens, relative_rms, write_model
from safetensors.torch import load_file

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.checkpoint import Layout, source
from rwkv_lab.checkpoint.packed import PARTS
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.export import OptimizationProcessor
from rwkv_lab.model import RWKVMode, packed_file, quantise_weights, weight_only
from rwkv_lab.model.cpu import prefill, step
from rwkv_lab.model.packed_file import packed_modules
from rwkv_lab.peft import dequantize_nf4, quantize_nf4
from rwkv_lab.wkv import use_backend

# Whole groups, which compiled code takes.
LAYOUTS = {
    "4.0": Layout("4.0", 2, 64, 64, 192, 70, 0, 0),
    "7.0": Layout("7.0", 2, 128, 128, 192, 70, 2, 64, {"w": 8, "a": 8, "v": 8, "g": 8}),
}
KINDS = ("int8", "int4", "nf4")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(version, kind) -> path of a model that `export` has packed."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def path(version, kind):
        if (version, kind) not in made:
            source = folder / f"{version}.pth"
            if not source.exists():
                write_model(source, LAYOUTS[version])
            made[version, kind] = folder / f"{version}-{kind}.safetensors"
            OptimizationProcessor(kind).compress_model_weights(source, made[version, kind])
        return made[version, kind]

    return path


# Rounding to 8 bits may bring an activation to the next number, as in `tests/model/cpu/test_packed_prefill.py`.
APART = {"float32": 2e-5, "int8": 5e-3}


@pytest.mark.parametrize("activations", APART)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", LAYOUTS)
@torch.inference_mode()
def test_exported_files_are_computed_with_as_they_lie_there(files, version, kind, activations, monkeypatch):
    path, calls = files(version, kind), []
    for module in (step, prefill):
        monkeypatch.setattr(module, "run", lambda *given, run=module.run: calls.append(1) or run(*given))
    model, dense = RWKV_Dual.from_pretrained(path), RWKV_Dual.from_pretrained(path, weights="dense")
    kinds = {module.kind for module in packed_modules(model).values()}
    assert kinds == {"int8", kind} and not packed_modules(dense)  # the head is int8
    for name, module in packed_modules(model).items():
        assert torch.equal(module.dequantised(), dense.get_submodule(name).weight)
        assert module.activations == "int8"
        module.activations = activations
    for B, T in ((1, 2), (2, 40), (21, 1)):
        tokens = make_tokens(B, T)
        for mode in RWKVMode:
            model.set_mode(mode)
            found, state = model(tokens)
            with use_backend("reference"):
                expected, right = model(tokens)
            limit = APART[activations if T == 40 and mode == RWKVMode.TRANSFORMER else "float32"]
            assert apart(found, expected) < limit and apart(state.wkv, right.wkv) < limit
            assert apart(found, dense(tokens)[0]) < (2e-5 if limit == 2e-5 else 0.05)
    assert len(calls) >= 2 * 3 * 2  # compiled code has computed them, packed ones and dense ones


def apart(found, expected):
    return ((found - expected).norm(dim=-1) / (expected.norm(dim=-1) + 1e-9)).median()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_they_have_the_same_parts(files, kind, tmp_path):
    path = files("7.0", kind)
    again = RWKV_Dual.from_pretrained(path).save_pretrained(tmp_path / "again")
    before, after = load_file(path), load_file(again)
    ends = tuple(f".{part}" for parts in PARTS.values() for part in parts)
    packed = {name for name in before if name.endswith(ends)}
    assert len(packed) > 20 and packed == {name for name in after if name.endswith(ends)}
    assert all(torch.equal(before[name], after[name]) for name in packed)
    tokens = make_tokens(1, 5)
    assert torch.equal(RWKV_Dual.from_pretrained(again)(tokens)[0], RWKV_Dual.from_pretrained(path)(tokens)[0])


@torch.inference_mode()
def test_nf4_has_the_numbers_of_bitsandbytes_and_is_opened_again_bit_for_bit(tmp_path):
    write_model(tmp_path / "m.pth", LAYOUTS["7.0"])
    plain = RWKV_Dual.from_pretrained(tmp_path / "m.pth")
    model = quantise_weights(plain, "nf4", activations="float32")
    for name, module in packed_modules(model).items():
        weight = plain.get_submodule(name).weight
        assert torch.equal(module.dequantised(), dequantize_nf4(*quantize_nf4(weight), weight.shape))
    rows = torch.tensor([[5, 3], [69, 0]])
    assert torch.equal(model.emb.dequantised(rows), model.emb.dequantised()[rows])
    saved = model.save_pretrained(tmp_path / "packed")
    with open_checkpoint(saved) as ck:
        assert ck.kind == "model" and ck.quantised == {"nf4": 14}
    again = RWKV_Dual.from_pretrained(saved)
    tokens = make_tokens(2, 20)
    for mode in RWKVMode:
        model.set_mode(mode)
        again.set_mode(mode)
        found, expected = again(tokens)[0], model(tokens)[0]
        with use_backend("reference"):
            assert torch.equal(found, expected) and relative_rms(found, model(tokens)[0]) < 2e-5
    assert again.save_pretrained(tmp_path / "twice").read_bytes() == saved.read_bytes()


def test_rows_that_end_inside_a_block_run_through_torch(tmp_path):
    model = quantise_weights(load_model(tmp_path, "7.0", n_embd=100, n_head=5, head_size=20), "nf4")
    again = RWKV_Dual.from_pretrained(model.save_pretrained(tmp_path / "packed"))
    tokens, rows = make_tokens(1, 5), torch.tensor([3, 69])
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert torch.equal(model.emb.dequantised(rows), model.emb.dequantised()[rows])


def test_what_nf4_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(ParameterError, match=r"blocks.0.ffn.value: nf4 stores two .* rows of 77"):
        quantise_weights(load_model(tmp_path, "7.0", dim_ffn=77), "nf4")
    model = load_model(tmp_path, "7.0")
    model.blocks[1].att.key.weight.data[3, 4] = torch.nan
    with pytest.raises(NumericsError, match="blocks.1.att.key: .* NaN"):
        quantise_weights(model, "nf4")


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_while_it_is_read_it_is_the_same_model(tmp_path, scheme, dtype):
    path = write_model(tmp_path / "m.pth", LAYOUTS["7.0"])
    model = RWKV_Dual.from_pretrained(path, dtype, weights=scheme)
    expected = quantise_weights(RWKV_Dual.from_pretrained(path, dtype), scheme)
    found, right = model.state_dict(), expected.state_dict()
    assert found.keys() == right.keys() and not any(p.requires_grad for p in model.parameters())
    for name, tensor in found.items():
        assert tensor.dtype == right[name].dtype and (torch.equal(tensor, right[name]) or tensor.isnan().all())
    with pytest.raises(ParameterError, match=rf'weights="int4": .* is packed already \({scheme}\).*\n.*"stored"'):
        RWKV_Dual.from_pretrained(model.save_pretrained(tmp_path / "packed"), weights="int4")


def test_packing_never_holds_a_whole_model(tmp_path, monkeypatch):
    path, sizes = write_model(tmp_path / "m.pth", LAYOUTS["7.0"]), []
    pack = packed_file.packed_parts
    monkeypatch.setattr(source, "BLOCK", 2048)
    monkeypatch.setattr(packed_file, "packed_parts", lambda w, kind: sizes.append(w.nbytes) or pack(w, kind))
    assert len(packed_modules(RWKV_Dual.from_pretrained(path, weights="int8"))) == 14
    assert len(sizes) > 100 and max(sizes) == 2048

    model, kept = RWKV_Dual.from_pretrained(path), []
    pack_whole = weight_only.packed_parts

    def beside(weight, kind):
        kept[:] = [ref for ref in kept if ref() is not None]
        kept.append(weakref.ref(weight))
        assert len(kept) <= 2  # this one, and the one before it at most
        return pack_whole(weight, kind)

    monkeypatch.setattr(weight_only, "packed_parts", beside)
    assert len(packed_modules(quantise_weights(model, "int8", in_place=True))) == 14
