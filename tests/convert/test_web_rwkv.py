"""Files for web-rwkv and ai00: tensor by tensor against the rules of their converter, written here once more."""

from dataclasses import replace

import pytest
import torch
from models import LAYOUTS, random_model, same, snapshot
from random_models import make_layout, random_tensors, write_model
from safetensors.torch import load_file, save_file

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert, to_pth
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.merge import merge

VERSIONS = ("5.2", "6.0", "7.0")
_RENAMED = {"time_faaaa": "time_first", "time_maa": "time_mix"}
_TRANSPOSED = "time_mix_w1 time_mix_w2 time_decay_w1 time_decay_w2 w1 w2 a1 a2 g1 g2 v1 v2 time_state".split()


def by_their_rules(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What their converter makes of a model: everything in float16, some renamed, some transposed."""
    made = {}
    for name, tensor in model.items():
        for ours, theirs in _RENAMED.items():
            name = name.replace(ours, theirs)
        values = tensor.half()
        made[name.lower()] = values.transpose(-2, -1) if any(part in name for part in _TRANSPOSED) else values
    return {name: tensor.contiguous() for name, tensor in made.items()}


def passed(result):
    assert result.checks and all(check.passed for check in result.checks), result.checks
    return result


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tensor_is_what_their_converter_makes(dtype, version, state, tmp_path):
    model = {n: t.to(dtype) for n, t in random_tensors(make_layout(version), time_state=state).items()}
    write_checkpoint(tmp_path / "m.pth", model)
    result = passed(convert(tmp_path / "m.pth", "web-rwkv", tmp_path / "m.st"))
    found, expected = load_file(tmp_path / "m.st"), by_their_rules(model)
    assert set(found) == set(expected)
    for name in expected:
        assert same(found[name], expected[name]), name
    assert bool(result.rounding) == (dtype != torch.float16)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_their_converter_wrote_opens_as_a_model(version, tmp_path):
    model = random_tensors(make_layout(version), time_state=True)
    save_file(by_their_rules(model), tmp_path / "m.st", {"format": "pt"})
    with open_checkpoint(tmp_path / "m.st") as ck:
        assert ck.foreign_format.name == f"web-rwkv{version[0]}" and ck.kind == "model", ck.reason
        assert ck.layout.version == version and set(ck) == set(model)
        for name, tensor in model.items():
            assert same(ck[name], tensor.half()), name
    back = passed(to_pth(tmp_path / "m.st", tmp_path / "back.pth")).out
    loaded = torch.load(back, weights_only=True)
    assert all(same(loaded[name], tensor.half()) for name, tensor in model.items())


@pytest.mark.parametrize("version", VERSIONS)
def test_it_merges_as_it_is(version, tmp_path):
    path = tmp_path / "m.pth"
    write_checkpoint(path, {n: t.half() for n, t in random_tensors(make_layout(version)).items()})
    converted = convert(path, "web-rwkv", tmp_path / "m.st").out
    lora = {f"blocks.0.att.key.lora_{h}": torch.randn(s) for h, s in (("A", (2, 32)), ("B", (32, 2)))}
    write_checkpoint(tmp_path / "lora.pth", lora)
    a, b = (merge(base, tmp_path / "lora.pth", f"{base}.out.pth", alpha=4).out for base in (path, converted))
    a, b = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("version", ["4.0", "5.0", "5.1", "5.2"])
def test_models_of_blinkdl_are_not_taken_for_one(version, tmp_path):
    model = random_model(LAYOUTS[version])
    write_checkpoint(tmp_path / "m.safetensors", model)
    with open_checkpoint(tmp_path / "m.safetensors") as ck:
        assert ck.foreign_format is None and ck.layout.version == version
    part = {n: t for n, t in model.items() if ".time_" in n}
    write_checkpoint(tmp_path / "part.safetensors", part)
    with open_checkpoint(tmp_path / "part.safetensors") as ck:
        assert ck.foreign_format is None and set(ck) == set(part)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_head_and_squeezed_vectors(version, tmp_path):
    """Shapes tell the format of 5.2 and 7, so they are read where dimensions of size 1 are left out, too."""
    model = random_tensors(make_layout(version, n_head=1, head_size=32))
    write_checkpoint(tmp_path / "m.pth", model)
    squeezed = {n: t.squeeze() for n, t in by_their_rules(model).items()}
    save_file(squeezed, tmp_path / "squeezed.st")
    for path in (passed(convert(tmp_path / "m.pth", "web-rwkv", tmp_path / "m.st")).out, tmp_path / "squeezed.st"):
        with open_checkpoint(path) as ck:
            assert ck.kind == "model" and ck.foreign_format.target == "web-rwkv", ck.reason
            assert all(torch.equal(ck[n].flatten(), t.half().flatten()) for n, t in model.items())


def test_square_low_rank_pairs_are_told_by_the_note(tmp_path):
    model = random_tensors(replace(make_layout("7.0"), ranks=dict.fromkeys("wavg", 32)))
    write_checkpoint(tmp_path / "m.pth", model)
    out = passed(convert(tmp_path / "m.pth", "web-rwkv", tmp_path / "m.st")).out
    with open_checkpoint(out) as ck:
        assert ck.foreign_format.name == "web-rwkv7" and same(ck["blocks.1.att.w1"], model["blocks.1.att.w1"].half())


def test_values_beyond_float16_are_refused_or_counted(tmp_path):
    """Their converter turns them into infinity without a word."""
    model = random_tensors(make_layout("7.0"))
    model["head.weight"].view(-1)[:4] = torch.tensor([7e4, -1e38, 1e-9, 65504.0])
    write_checkpoint(tmp_path / "m.pth", model)
    before = snapshot(tmp_path)
    with pytest.raises(NumericsError, match="head.weight"):
        convert(tmp_path / "m.pth", "web-rwkv", tmp_path / "m.st")
    assert snapshot(tmp_path) == before
    result = passed(convert(tmp_path / "m.pth", "web-rwkv", tmp_path / "m.st", allow_nonfinite=True))
    (head,) = [r for r in result.rounding if r.name == "head.weight"]
    assert (head.overflow, head.flushed) == (2, 1)
    assert any("2 of" in note and "overflowed" in note for note in result.notes)


@pytest.mark.parametrize(
    ("layout", "options", "error", "message"),
    [
        (make_layout("4.0"), {}, LayoutError, "takes RWKV-5.2, 6.0, 7.0; this is RWKV-4.0"),
        (make_layout("5.1"), {}, LayoutError, "this is RWKV-5.1"),
        (make_layout("7.0", n_layer=1), {}, LayoutError, "off layer 1, and this model has one layer"),
        (make_layout("7.0", n_head=3, n_embd=32), {}, LayoutError, "n_embd is 32, dim_att 48"),
        (make_layout("7.0"), {"dtype": "bf16"}, ParameterError, "web-rwkv take fp16 only"),
        (make_layout("7.0"), {"dtype": "Q8_0"}, ParameterError, "no quantised tensors"),
        (make_layout("6.0"), {"rescale": 6}, ParameterError, "no place for rescaled weights"),
        (make_layout("7.0"), {"out": "folder"}, ParameterError, "must end in .safetensors or .st"),
    ],
)
def test_refusals_for_web_rwkv(layout, options, error, message, tmp_path):
    path, given = write_model(tmp_path / "m.pth", layout), {"out": "m.st"} | options
    with pytest.raises(error, match=message):
        convert(path, "web-rwkv", tmp_path / given.pop("out"), **given)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]
