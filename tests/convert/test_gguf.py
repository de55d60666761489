"""GGUF files as the package gguf reads them: names, shapes, types, values, dimensions, vocabulary."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import random_model, random_state, same
from pairwise import pairwise

from rwkv_lab import RWKV_Dual, merge
from rwkv_lab.checkpoint import Layout, open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.gguf_types import BY_NAME
from rwkv_lab.convert import convert, quantised, to_gguf, to_pth
from rwkv_lab.convert.quantised import quantised_values
from rwkv_lab.convert.verify import verify_convert
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.tokenizer import load_tokenizer
from rwkv_lab.wkv.pointers import NOTHING, Span, span

gguf = pytest.importorskip("gguf")

# Dimensions that are whole blocks of 32, and a vocabulary of bytes.
LAYOUTS = {
    "6.0": Layout("6.0", 2, 64, 64, 224, 257, 4, 16, {"maa": 3, "decay": 6}),
    "7.0": Layout("7.0", 2, 64, 64, 256, 257, 4, 16, {"w": 4, "a": 3, "v": 2, "g": 5}),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# llama.cpp computes with these in float32, in files of every type.
FULL = {
    "6.0": ("lerp_fused", "time_mix_first", "time_mix_w1", "time_mix_w2", "decay_w1", "decay_w2"),
    "7.0": ("lerp_fused", "time_mix_w1", "time_mix_w2"),
}
LARGE = ("token_embd", "output.w", "receptance", "key", "mix_value", "gate", "time_mix_output")
GGUF_TYPE = {t.name: t for t in gguf.GGMLQuantizationType}


def source(folder, version, dtype=torch.float32, layout=None):
    model = random_model(layout or LAYOUTS[version], dtype)
    write_checkpoint(folder / "source.pth", model, overwrite=True)
    return folder / "source.pth", model


def read(path):
    """(tensors as float32 by name, their types, fields), as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    values, types = {}, {}
    for t in reader.tensors:
        values[t.name] = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()).copy())
        types[t.name] = t.tensor_type.name
    return values, types, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("version", LAYOUTS)
def test_every_value_lies_where_llama_cpp_looks_for_it(version, tmp_path):
    path, m = source(tmp_path, version)
    values, types, _ = read(to_gguf(path, tmp_path / "m.gguf", dtype="F32").out)
    assert set(types.values()) == {"F32"}
    expected = {
        "token_embd.weight": m["emb.weight"],
        "token_embd_norm.bias": m["blocks.0.ln0.bias"],
        "output_norm.weight": m["ln_out.weight"],
        "output.weight": m["head.weight"],
        "blk.1.attn_norm.weight": m["blocks.1.ln1.weight"],
        "blk.1.attn_norm_2.bias": m["blocks.1.ln2.bias"],
        "blk.1.time_mix_ln.weight": m["blocks.1.att.ln_x.weight"],
        "blk.1.time_mix_receptance.weight": m["blocks.1.att.receptance.weight"],
        "blk.1.time_mix_output.weight": m["blocks.1.att.output.weight"],
        "blk.1.channel_mix_value.weight": m["blocks.1.ffn.value.weight"],
    }
    if version == "7.0":
        expected |= {
            "blk.1.time_mix_lerp_fused.weight": torch.stack([m[f"blocks.1.att.x_{z}"] for z in "rwkvag"]),
            "blk.1.time_mix_r_k.weight": m["blocks.1.att.r_k"].flatten(),
            "blk.1.channel_mix_lerp_k.weight": m["blocks.1.ffn.x_k"].flatten(),
        }
        for z in "wavg":
            expected |= {f"blk.1.time_mix_{z}{i}.weight": m[f"blocks.1.att.{z}{i}"].T for i in (1, 2)}
            if z != "g":
                expected[f"blk.1.time_mix_{z}0.weight"] = m[f"blocks.1.att.{z}0"].flatten()
        assert {f"blk.0.time_mix_v{i}.weight" for i in range(3)} <= set(values)  # asked for, never used
        assert values["blk.0.time_mix_v1.weight"].shape == values["blk.0.time_mix_a1.weight"].shape
    else:
        expected |= {
            "blk.1.time_mix_lerp_fused.weight": torch.stack([m[f"blocks.1.att.time_maa_{z}"] for z in "wkvrg"]),
            "blk.1.time_mix_lerp_x.weight": m["blocks.1.att.time_maa_x"].flatten(),
            "blk.1.time_mix_w1.weight": m["blocks.1.att.time_maa_w1"].T,
            "blk.1.time_mix_w2.weight": m["blocks.1.att.time_maa_w2"].permute(0, 2, 1),
            "blk.1.time_mix_decay.weight": m["blocks.1.att.time_decay"].flatten(),
            "blk.1.time_mix_decay_w1.weight": m["blocks.1.att.time_decay_w1"].T,
            "blk.1.time_mix_decay_w2.weight": m["blocks.1.att.time_decay_w2"].T,
            "blk.1.time_mix_first.weight": m["blocks.1.att.time_faaaa"],
            "blk.1.channel_mix_lerp_r.weight": m["blocks.1.ffn.time_maa_r"].flatten(),
            "blk.1.channel_mix_receptance.weight": m["blocks.1.ffn.receptance.weight"],
        }
    for name, tensor in expected.items():
        assert same(values[name], tensor.contiguous()), name
    assert values["blk.1.time_mix_lerp_fused.weight"].shape[1:] == (1, 1, 64)


@pytest.mark.parametrize("version", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
def test_types(kind, version, tmp_path):
    path, _ = source(tmp_path, version)
    result = to_gguf(path, tmp_path / "m.gguf", dtype=kind)
    assert all(check.passed for check in result.checks), result.checks
    values, types, _ = read(result.out)
    for name, found in types.items():
        if values[name].dim() == 1 or any(part in name for part in FULL[version]):
            assert found == "F32", name
        elif kind.startswith("Q"):
            assert found == (kind if any(part in name for part in LARGE) else "F16"), name
        else:
            assert found == kind, name


@pytest.mark.parametrize("version", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_read_back_is_what_the_package_gguf_reads(kind, version, tmp_path):
    path, m = source(tmp_path, version)
    out = to_gguf(path, tmp_path / "m.gguf", dtype=kind).out
    values, _, _ = read(out)
    with open_checkpoint(out) as ck:
        assert ck.kind == "model" and ck.layout.ranks == LAYOUTS[version].ranks
        for name in ("emb.weight", "blocks.1.ffn.key.weight", "blocks.1.att.output.weight"):
            assert same(ck[name].float(), values[ck.names_in_file[name]])
    to_pth(out, tmp_path / "back.pth", dtype="fp32")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == set(m)
    if kind in ("F32", "F16", "BF16"):
        narrow = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        assert all(same(back[n], m[n]) or same(back[n], m[n].to(narrow).float()) for n in m)
        assert same(back["emb.weight"], m["emb.weight"].to(narrow).float())


def _rows(name):
    """float32 values in which a way of quantising can go wrong."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(4096, 32, generator=g)
    halves = torch.arange(256 * 31).view(256, 31) % 253 / 2 - 63
    rows = {
        "random": values,
        "ties between levels": torch.cat([torch.full((256, 1), 127.0), halves], 1),
        "just below ties": torch.nextafter(torch.arange(-127, 128).repeat(32, 1).T.float() + 0.5, torch.zeros(())),
        "largest twice, of both signs": values.sign() * values.abs().clamp(max=0.5),
        "few bits": values.bfloat16().float(),
        "zeros": torch.zeros(4, 32),
        "negative zeros": -torch.zeros(4, 32),
        "tiny": values * 1e-9,
        "large": values * 1e5,
    }
    return rows[name].contiguous()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize(
    "name",
    [
        "random",
        "ties between levels",
        "just below ties",
        "largest twice, of both signs",
        "few bits",
        "zeros",
        "negative zeros",
        "tiny",
        "large",
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_are_those_of_the_package_gguf(compiled, name, kind, monkeypatch):
    if not compiled:
        monkeypatch.setattr(quantised, "_compiled", lambda: None)
    rows = _rows(name)
    made = torch.cat(list(quantised_values(name, [rows.flatten()], BY_NAME[kind]))).view(len(rows), -1)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quantize(rows.numpy(), GGUF_TYPE[kind]))
    assert same(made, expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_and_differences_of_every_dtype(compiled, dtype, kind, monkeypatch):
    if not compiled:
        monkeypatch.setattr(quantised, "_compiled", lambda: None)
    values = (_rows("random") * 2**-12).to(dtype)  # steps that float16 has few bits for
    values[0] = 0
    blocks = torch.cat(list(quantised_values("values", [values.flatten()], BY_NAME[kind]))).view(len(values), -1)
    assert same(blocks, torch.from_numpy(gguf.quantize(values.float().numpy(), GGUF_TYPE[kind])))

    step = values.float().abs().amax(1, keepdim=True) / quantised.LEVELS[kind]
    meant = torch.from_numpy(gguf.dequantize(blocks.numpy(), GGUF_TYPE[kind]))
    allowed = quantised.STEPS[kind] * step + quantised.LEVELS[kind] * 2**-24
    expected = float(((values.float() - meant).abs() / allowed).max())
    narrow = values.float() if dtype == torch.float64 else values
    found = quantised._excess(narrow.flatten(), blocks.flatten(), BY_NAME[kind])
    assert 0 < expected <= 1 and found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "compiled", "kind"),
    pairwise(["a level", "a sign", "a large step", "infinity", "NaN"], [True, False], ["Q8_0", "Q4_0"]),
)
def test_blocks_that_mean_something_else_are_found(wrong, compiled, kind, tmp_path, monkeypatch):
    """In the last block of the last matrix of a file."""
    if not compiled:
        monkeypatch.setattr(quantised, "_compiled", lambda: None)
    path, _ = source(tmp_path, "7.0")
    result = to_gguf(path, tmp_path / "m.gguf", dtype=kind)
    data = bytearray(result.out.read_bytes())
    with open_checkpoint(result.out) as ck:
        raw = ck.info["blocks.1.ffn.value.weight"].derived.of
        end = raw.offset + raw.nbytes
    at = end - BY_NAME[kind].nbytes
    if wrong == "a level":
        data[end - 1] ^= 64
    elif wrong == "a sign":
        data[at + 1] ^= 0x80
    elif wrong == "a large step":  # 32768, and levels that mean 0
        data[at:end] = b"\x00\x78" + (b"\x00" * 32 if kind == "Q8_0" else b"\x88" * 16)
    else:
        data[at : at + 2] = b"\x00\x7c" if wrong == "infinity" else b"\x01\x7c"
    result.out.write_bytes(data)
    assert [check.name for check in verify_convert(result) if not check.passed] == [
        "largest difference of the values of 14 quantised tensors, of what their blocks allow"
    ]


def test_the_kernel_compares_sizes_with_memory_before_it_begins():
    functions = quantised._compiled()
    assert functions is not None
    values, blocks, most = torch.zeros(4, 32), torch.zeros(4, 34, dtype=torch.uint8), torch.zeros(1)
    good = [span(values, values.shape), 0, span(blocks, blocks.shape, torch.uint8), 4, 8]
    assert functions.gguf_blocks(*good) == 0 and functions.gguf_excess(*good, 1, 1, span(most, (1,))) == 0
    short = Span(blocks.data_ptr(), blocks.nbytes - 1)
    changes = [(0, Span(values.data_ptr(), values.nbytes - 1)), (1, 3), (1, -1), (2, short), (3, 5), (3, -1), (4, 5)]
    changes += [(3, 1 << 62), (0, NOTHING)]
    for at, value in changes:
        wrong = [*good[:at], value, *good[at + 1 :]]
        assert functions.gguf_blocks(*wrong) == 1 and functions.gguf_excess(*wrong, 1, 1, span(most, (1,))) == 1
    assert functions.gguf_excess(*good, 1, 1, NOTHING) == 1


def test_dimensions_and_provenance(tmp_path):
    path, _ = source(tmp_path, "7.0")
    _, _, seven = read(to_gguf(path, tmp_path / "7.gguf", dtype="BF16").out)
    path, _ = source(tmp_path, "6.0")
    _, _, six = read(to_gguf(path, tmp_path / "6.gguf", dtype="Q8_0", rescale=0).out)
    assert (
        seven
        | {
            "general.architecture": "rwkv7",
            "general.type": "model",
            "general.file_type": 32,
            "rwkv7.context_length": 1048576,
            "rwkv7.embedding_length": 64,
            "rwkv7.block_count": 2,
            "rwkv7.feed_forward_length": 256,
            "rwkv7.attention.head_count": 0,
            "rwkv7.wkv.head_size": 16,
            "rwkv7.attention.decay_lora_rank": 4,
            "rwkv7.attention.iclr_lora_rank": 3,
            "rwkv7.attention.value_residual_mix_lora_rank": 2,
            "rwkv7.attention.gate_lora_rank": 5,
        }
        == seven
    )
    assert (
        six
        | {
            "general.architecture": "rwkv6",
            "general.file_type": 7,
            "rwkv6.time_mix_extra_dim": 3,
            "rwkv6.time_decay_extra_dim": 6,
            "rwkv6.rescale_every_n_layers": 0,
            "rwkv6.feed_forward_length": 224,
        }
        == six
    )
    assert seven["rwkv7.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    made = json.loads(seven["rwkv_lab.json"])
    assert made["job"] == "convert" and made["inputs"][0]["name"] == "source.pth"


def test_rescaled_weights_are_halved_in_the_file_and_read_as_they_were(tmp_path):
    path, m = source(tmp_path, "6.0")
    result = to_gguf(path, tmp_path / "m.gguf", dtype="F32", rescale=1)
    assert all(check.passed for check in result.checks)
    values, _, fields = read(result.out)
    assert fields["rwkv6.rescale_every_n_layers"] == 1
    for name, ours in (("time_mix_output", "att.output"), ("channel_mix_value", "ffn.value")):
        assert same(values[f"blk.0.{name}.weight"], m[f"blocks.0.{ours}.weight"])
        assert same(values[f"blk.1.{name}.weight"] * 2, m[f"blocks.1.{ours}.weight"])
    with open_checkpoint(result.out) as ck:
        assert all(same(ck[n].reshape(m[n].shape), m[n]) for n in m)


def test_the_world_vocabulary(tmp_path):
    layout = Layout("7.0", 1, 32, 32, 32, 65536, 1, 32, {"w": 1, "a": 1, "g": 1})
    path, _ = source(tmp_path, "7.0", torch.bfloat16, layout)
    _, _, fields = read(to_gguf(path, tmp_path / "m.gguf", verify=False).out)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 65536 and fields["tokenizer.ggml.model"] == "rwkv"
    assert (tokens[0], kinds[0]) == ("<s>", gguf.TokenType.CONTROL)
    assert (tokens[65535], kinds[65535]) == ("[PAD65535]", gguf.TokenType.UNUSED) and kinds[65529] == 1
    assert [tokens[i] for i in (1, 11, 36786)] == [r"\x00", r"\n", " Hello"]
    names = ("bos", "eos", "eot")
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in names] == [0, 0, 261]
    world = load_tokenizer("world")
    for i in (1, 257, 19232, 40000, 65529):  # written like Python's bytes
        assert eval(f"b'{tokens[i]}'" if "'" not in tokens[i] else f'b"{tokens[i]}"') == world.decode_bytes([i])


def test_bytes_as_vocabulary_and_none(tmp_path):
    path, _ = source(tmp_path, "7.0")
    _, _, fields = read(to_gguf(path, tmp_path / "m.gguf").out)
    assert len(fields["tokenizer.ggml.tokens"]) == 257 and fields["tokenizer.ggml.tokens"][98] == "a"
    layout = Layout("7.0", 1, 32, 32, 32, 300, 1, 32, {"w": 1, "a": 1, "g": 1})
    path, _ = source(tmp_path, "7.0", layout=layout)
    result = to_gguf(path, tmp_path / "n.gguf")
    _, _, fields = read(result.out)
    assert fields["tokenizer.ggml.model"] == "none" and fields["rwkv7.vocab_size"] == 300
    assert any("no vocabulary" in note for note in result.notes)
    with pytest.raises(ParameterError, match="do not belong together"):
        to_gguf(path, tmp_path / "named.gguf", tokenizer="world")


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_memory_does_not_grow_with_the_tensors(kind, warm, tmp_path):
    """Peak of a process that writes a model of 200 MB, compares it, and converts it back, by the system's own count."""
    if sys.platform != "linux":
        pytest.skip("the system does not tell a process its peak of memory (/proc/self/status)")
    layout = Layout("7.0", 1, 64, 64, 64, 400_000, 1, 64, {"w": 1, "a": 1, "g": 1})
    source(tmp_path, "7.0", layout=layout)
    write_checkpoint(tmp_path / "small.pth", random_model(LAYOUTS["7.0"]))
    code = (
        "import os, sys; from rwkv_lab.convert import to_gguf, to_pth; os.chdir(sys.argv[1])\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "to_gguf('small.pth', 'small.gguf', dtype=sys.argv[2]); to_pth('small.gguf', 'warm.pth'); before = peak()\n"
        "to_gguf('source.pth', 'm.gguf', dtype=sys.argv[2]); to_pth('m.gguf', 'back.pth'); print(peak() - before)"
    )
    command = [warm.python, "-c", code, str(tmp_path), kind]
    # AddressSanitizer, where `make sanitize` preloads it, keeps 256 MB of freed memory to see who still uses it.
    environment = warm.environment
    if "ASAN_OPTIONS" in environment:
        environment = environment | {"ASAN_OPTIONS": f"{environment['ASAN_OPTIONS']}:quarantine_size_mb=0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown = int(done.stdout)
    assert (tmp_path / "source.pth").stat().st_size > 200_000_000
    assert grown < 80_000  # kB; the largest tensor has 102,400


def test_head_sizes_that_llama_cpp_computes_wrongly_are_named(tmp_path):
    for heads, expected in ((4, True), (1, False)):
        layout = Layout("7.0", 1, 64, 64, 64, 257, heads, 64 // heads, {"w": 1, "a": 1, "g": 1})
        result = to_gguf(source(tmp_path, "7.0", layout=layout)[0], tmp_path / f"{heads}.gguf")
        assert any("AVX-512" in note and "16 channels" in note for note in result.notes) == expected


def test_rows_that_are_no_blocks_keep_sixteen_bits(tmp_path):
    layout = Layout("7.0", 1, 32, 32, 80, 257, 2, 16, {"w": 4, "a": 3, "g": 5})
    path, _ = source(tmp_path, "7.0", layout=layout)
    result = to_gguf(path, tmp_path / "m.gguf", dtype="q8_0")
    _, types, _ = read(result.out)
    assert types["blk.0.channel_mix_value.weight"] == "F16" and types["blk.0.channel_mix_key.weight"] == "Q8_0"
    values = sum(math.prod(row.shape) for row in result.plan.rows if row.quantised)
    assert values and any(f"matrices, {values:,} values;" in note for note in result.notes)
    assert any("1 matrix keeps float16" in note and "channel_mix_value" in note for note in result.notes)


def test_quantised_sources_say_so(tmp_path):
    path, _ = source(tmp_path, "7.0")
    to_gguf(path, tmp_path / "m.gguf", dtype="Q8_0")
    with open_checkpoint(tmp_path / "m.gguf") as ck:
        assert ck.quantised == {"Q8_0": 14}
    result = convert(tmp_path / "m.gguf", "fla", tmp_path / "folder", dtype="bf16")
    assert any("14 tensors of the source are Q8_0, dequantised to float32" in note for note in result.notes)
    assert all(check.passed for check in result.checks)


def test_a_gguf_file_is_merged_and_run_as_any_other(tmp_path):
    path, _ = source(tmp_path, "7.0")
    to_gguf(path, tmp_path / "f.gguf", dtype="F32")
    to_gguf(path, tmp_path / "q.gguf", dtype="Q8_0")
    write_checkpoint(tmp_path / "state.pth", random_state(LAYOUTS["7.0"]))
    for base in ("source.pth", "f.gguf"):
        merge(tmp_path / base, tmp_path / "state.pth", tmp_path / (base + ".safetensors"))
    outputs = [tmp_path / f"{base}.safetensors" for base in ("source.pth", "f.gguf")]
    with open_checkpoint(outputs[0]) as a, open_checkpoint(outputs[1]) as b:
        assert set(a) == set(b) and all(same(a[n], b[n].reshape(a[n].shape)) for n in a)
    result = merge(tmp_path / "q.gguf", tmp_path / "state.pth", tmp_path / "q.safetensors")
    assert any("14 of its tensors are Q8_0, dequantised to float32" in note for note in result.plan.notes)
    ids = torch.arange(20)[None]
    exact, rounded = (RWKV_Dual.from_pretrained(tmp_path / name)(ids)[0] for name in ("source.pth", "q.gguf"))
    assert torch.equal(exact, RWKV_Dual.from_pretrained(tmp_path / "f.gguf")(ids)[0])
    assert exact.shape == rounded.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_values_that_no_block_can_hold(bad, tmp_path):
    path, m = source(tmp_path, "7.0")
    m["blocks.0.att.key.weight"][3, 3] = bad
    write_checkpoint(path, m, overwrite=True)
    with pytest.raises(NumericsError, match="time_mix_key.* Q4_0"):
        to_gguf(path, tmp_path / "m.gguf", dtype="Q4_0", allow_nonfinite=True)
    assert not (tmp_path / "m.gguf").exists()


def test_wrong_bits_are_found(tmp_path, monkeypatch):
    path, _ = source(tmp_path, "7.0")
    right = quantised.quantised_values
    monkeypatch.setattr(quantised, "quantised_values", lambda *args: (b.roll(34) for b in right(*args)))
    result = to_gguf(path, tmp_path / "m.gguf", dtype="Q8_0")
    assert [check.name for check in result.checks if not check.passed] == [
        "largest difference of the values of 14 quantised tensors, of what their blocks allow"
    ]


def test_refusals(tmp_path, monkeypatch):
    path, _ = source(tmp_path, "7.0")
    with pytest.raises(ParameterError, match="no quantised tensors"):
        convert(path, "fla", tmp_path / "folder", dtype="Q8_0")
    with pytest.raises(ParameterError, match="must end in .gguf"):
        to_gguf(path, tmp_path / "m.bin")
    with pytest.raises(ParameterError, match="rescale"):
        to_gguf(path, tmp_path / "m.gguf", rescale=6)
    with pytest.raises(ParameterError, match="dtype='Q9_9'"):
        to_gguf(path, tmp_path / "m.gguf", dtype="Q9_9")
    source(tmp_path, "6.0")
    with pytest.raises(ParameterError, match="(?s)rescale=6.*dtype of floats"):
        to_gguf(path, tmp_path / "m.gguf", rescale=6, dtype="Q8_0")
    source(tmp_path, "7.0", layout=Layout("7.0", 2, 64, 32, 256, 257, 2, 16, {"w": 4, "a": 3, "v": 2, "g": 5}))
    with pytest.raises(LayoutError, match=r"another width \(32\) than the channels \(64\)"):
        to_gguf(path, tmp_path / "m.gguf")
    source(tmp_path, "5.2", layout=Layout("5.2", 2, 16, 16, 56, 11, 4, 4))
    with pytest.raises(LayoutError, match="takes RWKV-6.0, 7.0; this is RWKV-5.2"):
        to_gguf(path, tmp_path / "m.gguf")


def test_without_the_package_gguf(tmp_path, monkeypatch):
    path, _ = source(tmp_path, "7.0")
    to_gguf(path, tmp_path / "q.gguf", dtype="Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert all(check.passed for check in to_gguf(path, tmp_path / "f.gguf", dtype="F16").checks)
    for job in (lambda: to_gguf(path, tmp_path / "m.gguf", dtype="Q8_0"), lambda: open_and_read(tmp_path / "q.gguf")):
        with pytest.raises(ParameterError, match=r"pip install 'rwkv_lab\[convert\]'"):
            job()


def open_and_read(path):
    with open_checkpoint(path) as ck:
        return ck["emb.weight"]
