"""Adapters and tuned states, between BlinkDL's names and those of other ecosystems."""

import json

import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state, same
from random_models import make_layout, make_tokens, random_tensors, relative_rms, write_model
from rwkv_package import in_its_order, run_rwkv_package
from safetensors.torch import load_file, save_file
from tuned_files import write_adapter

from rwkv_lab import RWKV_Dual
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert, to_huggingface, to_pth
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import merge
from rwkv_lab.peft import open_adapter

ALPHA = 8


def lora_file(folder, **kwargs):
    path = folder / "lora.pth"
    write_checkpoint(path, random_lora(**kwargs), overwrite=True)
    return path


def passed(result):
    assert result.checks and all(check.passed for check in result.checks), result.checks
    return result


def test_an_adapter_there_and_back(tmp_path):
    path = lora_file(tmp_path)
    folder = passed(convert(path, "fla", tmp_path / "fla", alpha=ALPHA, generation="7.0")).out
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["target_modules"]) >= {"model.layers.0.attn.k_proj", "model.layers.1.ffn.value"}
    assert config["lora_alpha"] == ALPHA and "model.layers.0.attn_norm" in config["modules_to_save"]
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.attn.k_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.0.attn_norm.weight" in names
    back = passed(to_pth(folder, tmp_path / "back.pth")).out
    loaded = torch.load(back, weights_only=True)
    assert set(loaded) == set(random_lora()) and all(same(loaded[n], t) for n, t in random_lora().items())


@pytest.mark.parametrize("target", ["fla", "safetensors"])
def test_a_converted_adapter_merges_the_same(target, tmp_path):
    write_checkpoint(tmp_path / "base.pth", random_model())
    path = lora_file(tmp_path)
    folder = passed(convert(path, target, tmp_path / "folder", alpha=ALPHA, generation="7.0")).out
    convert(tmp_path / "base.pth", "fla", tmp_path / "base")
    expected = torch.load(merge(tmp_path / "base.pth", path, tmp_path / "a.pth", alpha=ALPHA).out, weights_only=True)
    for i, (base, tuned) in enumerate([("base.pth", folder), ("base", folder), ("base", path)]):
        alpha = {"alpha": ALPHA} if tuned == path else {}
        found = torch.load(merge(tmp_path / base, tuned, tmp_path / f"{i}.pth", **alpha).out, weights_only=True)
        assert set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, about themselves
def test_peft_loads_a_converted_adapter(tmp_path):
    """On rwkv7-hf's model: its merged weights are ours, so are the logits."""
    rwkv7_hf = pytest.importorskip("rwkv7_hf.modeling_rwkv7", reason="rwkv7-hf is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layout = make_layout("7.0", head_size=64)
    base = write_model(tmp_path / "m.pth", layout)
    path = lora_file(tmp_path, layout=layout, dtype=torch.float32, full=False)
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(to_huggingface(base, tmp_path / "base").out)
    folder = convert(path, "fla", tmp_path / "adapter", alpha=ALPHA, generation="7.0").out
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    merged = merge(base, path, tmp_path / "merged.pth", alpha=ALPHA).out
    tokens = make_tokens(1, 9)
    with torch.no_grad():
        assert relative_rms(theirs(tokens).logits, RWKV_Dual.from_pretrained(merged)(tokens)[0]) < 2e-5
    theirs.save_pretrained(tmp_path / "saved")  # and what it saves is the same adapter again
    with open_adapter(tmp_path / "saved") as saved, open_adapter(path, alpha=ALPHA) as ours:
        assert set(saved.targets) == set(ours.targets)
        for x, target in ours.targets.items():
            assert torch.equal(saved.targets[x].A.read(), target.A.read())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "fla"}, ParameterError, "pass alpha="),
        ({"to": "fla", "alpha": ALPHA}, LayoutError, "could be of RWKV-.*generation="),
        (
            {"to": "world", "alpha": ALPHA, "generation": "7.0"},
            LayoutError,
            "takes adapters of RWKV-5.2, 6.0; .* RWKV-7.0",
        ),
        ({"to": "fla", "alpha": ALPHA, "generation": "9.0"}, ParameterError, "generation='9.0'"),
    ],
)
def test_what_an_adapter_needs(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        convert(lora_file(tmp_path), options.pop("to"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def adapter_of_version(folder, version, **config):
    write_checkpoint(folder / "base.pth", random_model(LAYOUTS[version], dtype=torch.float32))
    return write_adapter(folder / "adapter.pth", folder / "base.pth", **config)


@pytest.mark.parametrize("generation", ["5.2", "6.0"])
def test_an_adapter_of_another_generation_is_told_which(generation, tmp_path):
    write_checkpoint(tmp_path / "v7.pth", random_lora() | {"blocks.0.att.k_k": torch.ones(1, 1, 16)})
    with pytest.raises(ParameterError, match=f"generation='{generation}': the layers of .* are those of RWKV-7.0"):
        convert(tmp_path / "v7.pth", "fla", tmp_path / "out", alpha=ALPHA, generation=generation)
    with pytest.raises(LayoutError, match="to='world' takes adapters of RWKV-5.2, 6.0; this is of RWKV-7.0"):
        convert(tmp_path / "v7.pth", "world", tmp_path / "out", alpha=ALPHA)


@pytest.mark.parametrize(("method", "told"), [("lora", False), ("pissa", True), ("miss", False)])
def test_changes_that_are_held_by_other_matrices_are_told(method, told, tmp_path):
    path = adapter_of_version(tmp_path, "7.0", method=method, lora_r=4, lora_alpha=4)
    notes = passed(convert(path, "fla", tmp_path / "out", generation="7.0")).notes
    assert any("pissa adapter become LoRA of another rank" in note for note in notes) == told


def test_a_state_there_and_back(tmp_path):
    write_checkpoint(tmp_path / "state.pth", random_state())
    result = passed(convert(tmp_path / "state.pth", "fla", tmp_path / "state.safetensors"))
    stored = load_file(result.out)
    assert torch.equal(stored["layers.1.recurrent_state"], random_state()["blocks.1.att.time_state"].mT)
    with open_checkpoint(result.out) as ck:
        assert ck.kind == "state"
    back = torch.load(to_pth(result.out, tmp_path / "back.pth").out, weights_only=True)
    assert all(same(back[n], t) for n, t in random_state().items())


def model_with_a_state(folder, version):
    layout = make_layout(version, head_size=32)
    write_checkpoint(folder / "m.pth", in_its_order(random_tensors(layout, time_state=True)))
    return folder / "m.pth"


@pytest.mark.parametrize("version", ["5.2", "6.0", "7.0"])
def test_the_rwkv_package_continues_from_a_state(version, warm, tmp_path):
    """Inside the model with RWKV-5 and 6; with RWKV-7, which ignores it there, as the file that `state` writes."""
    pytest.importorskip("rwkv", reason="the PyPI package rwkv is not installed")
    tokens, v7 = make_tokens(1, 9), version == "7.0"
    model = passed(to_pth(model_with_a_state(tmp_path, version), tmp_path / "copy.pth"))
    assert any("ignore the tuned state" in note for note in model.notes) == v7
    state = passed(convert(tmp_path / "m.pth", "state", tmp_path / "state.pth"))
    assert (
        len(state.plan.rows) == 2 and len(state.dropped) >= 50 and all("only the state" in d.why for d in state.dropped)
    )
    given = {"state": state.out} if v7 else {}
    (found,) = run_rwkv_package(warm, [(tmp_path / "copy", tokens[0].tolist())], v7, **given)
    expected = RWKV_Dual.from_pretrained(tmp_path / "m.pth")(tokens)[0][0]
    assert relative_rms(found["logits"], expected) < 2e-5
    if v7:
        (without,) = run_rwkv_package(warm, [(tmp_path / "copy", tokens[0].tolist())], v7)
        assert relative_rms(without["logits"], expected) > 1e-2


@pytest.mark.parametrize("version", ["5.2", "6.0", "7.0"])
def test_a_state_alone_and_inside_for_web_rwkv(version, tmp_path):
    """web-rwkv reads [H, K, V] in float16, which ai00 also takes from inside a model."""
    source = model_with_a_state(tmp_path, version)
    state = convert(source, "state", tmp_path / "s.pth").out
    alone = load_file(passed(convert(state, "web-rwkv", tmp_path / "s.st")).out)
    inside = load_file(passed(convert(source, "web-rwkv", tmp_path / "m.st")).out)
    model = torch.load(source, weights_only=True)
    for i in range(2):
        name = f"blocks.{i}.att.time_state"
        assert same(alone[name], model[name].mT.half().contiguous()) and same(inside[name], alone[name])
    again = torch.load(passed(to_pth(tmp_path / "s.st", tmp_path / "again.pth")).out, weights_only=True)
    assert all(same(again[n], t.half()) for n, t in torch.load(state, weights_only=True).items())


@pytest.mark.parametrize("note", [None, {"format": "pt"}])
def test_a_state_whose_orientation_cannot_be_told_is_noted(note, tmp_path):
    save_file(random_state(), tmp_path / "s.st", note)
    result = convert(tmp_path / "s.st", "fla", tmp_path / "out.safetensors")
    assert any("[H, K, V]" in n for n in result.notes)
    ours = convert(to_pth(tmp_path / "s.st", tmp_path / "s.pth").out, "safetensors", tmp_path / "again.safetensors")
    assert not any("[H, K, V]" in n for n in convert(ours.out, "fla", tmp_path / "out2.safetensors").notes)


def test_a_file_without_a_state(tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model())
    with pytest.raises(LayoutError, match="holds no tuned state"):
        convert(tmp_path / "m.pth", "state", tmp_path / "s.pth")
    write_checkpoint(tmp_path / "state.pth", random_state())
    with pytest.raises(ParameterError, match="web-rwkv take fp16 only"):
        convert(tmp_path / "state.pth", "web-rwkv", tmp_path / "s.st", dtype="fp32")


def test_who_takes_no_state(tmp_path):
    write_checkpoint(tmp_path / "state.pth", random_state())
    with pytest.raises(LayoutError, match="its readers take no tuned state. fla, web-rwkv"):
        convert(tmp_path / "state.pth", "transformers", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_rwkv7_hf_continues_from_a_converted_state(tmp_path):
    rwkv7_hf = pytest.importorskip("rwkv7_hf.modeling_rwkv7", reason="rwkv7-hf is not installed")
    from rwkv7_hf.cache_rwkv7 import RWKV7Cache

    layout = make_layout("7.0", head_size=64)
    tensors = random_tensors(layout, time_state=True)
    write_checkpoint(tmp_path / "m.pth", tensors)
    result = to_huggingface(tmp_path / "m.pth", tmp_path / "base")
    assert {d.name for d in result.dropped} == {f"blocks.{i}.att.time_state" for i in range(2)}
    state = passed(convert(tmp_path / "m.pth", "fla", tmp_path / "state.safetensors"))
    assert all("only the state" in d.why for d in state.dropped) and len(state.plan.rows) == 2
    stored, zeros = load_file(state.out), [torch.zeros(1, layout.n_embd)] * 2
    cache = RWKV7Cache([stored[f"layers.{i}.recurrent_state"][None] for i in range(2)], zeros, zeros)
    tokens = make_tokens(1, 9)
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(result.out).eval()
    with torch.no_grad():
        found = theirs(tokens, past_key_values=cache, use_cache=True).logits
        expected = RWKV_Dual.from_pretrained(tmp_path / "m.pth")(tokens)[0]
        assert relative_rms(found, expected) < 2e-5
        assert relative_rms(theirs(tokens).logits, expected) > 1e-2  # without it they differ
