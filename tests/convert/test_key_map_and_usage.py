"""The key map for people, the lines of code of every target, and what an output is called."""

import ast
import warnings

import pytest
import torch
from models import random_state
from random_models import make_layout, random_tensors, write_model
from tuned_files import write_adapter

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS
from rwkv_lab.convert import ConvertSpec, convert, plan_convert
from rwkv_lab.convert.key_map import key_map
from rwkv_lab.convert.output_name import output_name
from rwkv_lab.convert.usage import usage

PAIRS = [(f.target, version) for f in FOREIGN_FORMATS.values() for version in f.versions]


def planned(source, to, folder, **options):
    spec = ConvertSpec.read({"source": source, "to": to, **options})
    plan = plan_convert(spec, folder / output_name(spec, "out"))
    plan.checkpoint.close()
    return plan


@pytest.mark.parametrize(("target", "version"), PAIRS)
def test_a_folded_map_has_every_tensor_once(target, version, tmp_path):
    source = write_model(tmp_path / "m.pth", make_layout(version, n_layer=5, n_head=1, head_size=64))
    plan = planned(source, target, tmp_path)
    folded, whole = key_map(plan), key_map(plan, folded=False)
    names = [r.theirs.replace("{i}", str(i)) for r in folded for i in (r.layers or ("",))]
    assert sorted(names) == sorted(row.name for row in plan.rows) and len(whole) == len(plan.rows)
    ours = {n.replace("{i}", str(i)) for r in folded for i in (r.layers or ("",)) for n in r.ours.split(", ") if n}
    assert ours == {name for row in plan.rows for name in row.sources}
    assert sum(row.nbytes for row in folded) == sum(row.nbytes for row in plan.rows)
    assert len(folded) < len(plan.rows) / 2 and len({r.theirs for r in folded}) == len(folded)
    with open_checkpoint(source) as ck:
        assert all(r.our_shape == ck.info[r.ours].shape for r in whole if r.ours in ck.info)


@pytest.mark.parametrize(("target", "version"), PAIRS)
def test_every_format_says_who_reads_it_with_which_lines(target, version, tmp_path):
    source = write_model(tmp_path / "m.pth", make_layout(version, n_head=1, head_size=64))
    plan = planned(source, target, tmp_path)
    first, *others = usage(plan)
    assert first.program == plan.format.read_by != "" and others[-1].program == "rwkv_lab"
    for way in (first, *others):
        ast.parse(way.code)
        assert plan.out.name in way.code and "{" not in way.code and 2 <= len(way.code.splitlines()) <= 4


def run(code, folder, monkeypatch, **names):
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about itself
        exec(code, names)
    return names


@pytest.mark.parametrize("version", ["4.0", "5.2", "7.0"])
def test_the_lines_for_transformers_load_the_folder(version, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    source = write_model(tmp_path / "m.pth", make_layout(version, vocab_size=256))
    result = convert(source, "transformers", tmp_path / "out")
    made = run(usage(result.plan)[0].code, tmp_path, monkeypatch)
    assert made["model"].config.vocab_size == 256 and made["tokenizer"]("cat").input_ids == [99, 97, 116]


def test_the_lines_for_rwkv7_hf_load_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("rwkv7_hf", reason="the PyPI package rwkv7-hf is not installed")
    source = write_model(tmp_path / "m.pth", make_layout("7.0", head_size=64, vocab_size=256))
    result = convert(source, "fla", tmp_path / "out")
    made = run(usage(result.plan)[0].code, tmp_path, monkeypatch)
    assert made["model"].config.vocab_size == 256


@pytest.mark.parametrize("to", ["fla", "pth"])
def test_the_lines_for_rwkv_lab_load_and_write(to, tmp_path, monkeypatch, capsys):
    source = write_model(tmp_path / "base.pth", make_layout("7.0", vocab_size=256))
    plan = planned(source, to, tmp_path)
    convert(source, to, plan.out)
    (way,) = [way for way in usage(plan) if way.program == "rwkv_lab"]
    run(way.code, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip("\n")


def test_the_lines_for_adapters_and_states(tmp_path, monkeypatch):
    base = write_model(tmp_path / "base.pth", make_layout("7.0", vocab_size=256))
    write_adapter(tmp_path / "lora.pth", base, lora_r=2)
    plan = convert(tmp_path / "lora.pth", "fla", tmp_path / "adapter", generation="7.0").plan
    peft, merging = usage(plan)
    assert "PeftModel" in peft.code and "flash-linear-attention, RWKV-7" in peft.code
    run(merging.code, tmp_path, monkeypatch)
    with open_checkpoint(tmp_path / "merged.pth") as ck:
        assert ck.kind == "model"
    states = {n: t for n, t in random_tensors(make_layout("7.0"), time_state=True).items() if n.endswith("time_state")}
    write_checkpoint(tmp_path / "state.pth", states)
    plan = convert(tmp_path / "state.pth", "fla", tmp_path / "state.safetensors").plan
    theirs, ours = usage(plan)
    loaded = run(theirs.code, tmp_path, monkeypatch)["states"]
    assert torch.equal(loaded["layers.0.recurrent_state"], states["blocks.0.att.time_state"].mT)
    made = run(ours.code, tmp_path, monkeypatch)["model"]
    torch.testing.assert_close(made.create_state(1).wkv[0, 0], states["blocks.0.att.time_state"])


def test_what_an_output_is_called(tmp_path):
    model = write_model(tmp_path / "m.pth", make_layout("7.0"))
    write_adapter(tmp_path / "lora.pth", model, lora_r=2)
    write_checkpoint(tmp_path / "state.pth", random_state())
    expected = {
        ("m.pth", "fla"): "converted",
        ("m.pth", "gguf"): "converted.gguf",
        ("m.pth", "pth"): "converted.pth",
        ("m.pth", "web-rwkv"): "converted.safetensors",
        ("lora.pth", "fla"): "converted",
        ("lora.pth", "safetensors"): "converted.safetensors",
        ("state.pth", "fla"): "converted.safetensors",
    }
    for (name, to), wanted in expected.items():
        assert output_name(ConvertSpec.read({"source": tmp_path / name, "to": to})) == wanted
