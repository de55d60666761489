"""Conversions there and back: bit for bit, in shards, refused where they cannot be."""

import json

import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state, same, snapshot
from reading import record_reads

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS
from rwkv_lab.convert import convert, plan_convert, target_names, to_huggingface, to_pth, to_safetensors, write_convert
from rwkv_lab.convert.containers import CONTAINERS
from rwkv_lab.convert.spec import ConvertSpec
from rwkv_lab.convert.targets import PLAIN
from rwkv_lab.errors import LayoutError, NumericsError, OutputError, ParameterError

PAIRS = [(f.target, version) for f in FOREIGN_FORMATS.values() for version in f.versions]
ALL = PAIRS + [(target, version) for target in PLAIN for version in LAYOUTS]
CONTAINER = {f.target: f.container for f in FOREIGN_FORMATS.values()}


def out_for(target, folder, name="out"):
    container = CONTAINERS[CONTAINER.get(target, target)]
    return folder / (name if container.is_folder else name + container.suffixes[0])


def source(folder, version, **kwargs):
    model = random_model(LAYOUTS[version], **kwargs)
    write_checkpoint(folder / "source.pth", model, overwrite=True)
    return folder / "source.pth", model


@pytest.mark.parametrize(("target", "version"), ALL)
def test_there_and_back_bit_for_bit(target, version, tmp_path):
    path, model = source(tmp_path, version, dtype=torch.float16)
    result = convert(path, target, out_for(target, tmp_path))
    assert len(result.checks) >= 5 and all(check.passed for check in result.checks), result.checks
    widened = any(row.dtype == torch.float32 for row in result.plan.rows)  # as GGUF has its vectors
    back = to_pth(result.out, tmp_path / "back.pth", dtype="fp16" if widened else None)
    assert all(check.passed for check in back.checks), back.checks
    loaded = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(loaded) == set(model) and all(same(loaded[n], model[n]) for n in model)


@pytest.mark.parametrize(("target", "version"), [pair for pair in PAIRS if CONTAINER[pair[0]] == "folder"])
def test_folders_in_shards(target, version, tmp_path):
    path, model = source(tmp_path, version)
    result = convert(path, target, tmp_path / "out", max_shard_size="3KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and set(index["weight_map"]) == {row.name for row in result.plan.rows}
    assert index["metadata"]["total_size"] == sum(row.nbytes for row in result.plan.rows)
    assert all(check.passed for check in result.checks)
    whole = convert(path, target, tmp_path / "whole")
    assert not (whole.out / "model.safetensors.index.json").exists() and (whole.out / "model.safetensors").exists()
    with open_checkpoint(tmp_path / "out") as a, open_checkpoint(tmp_path / "whole") as b:
        assert set(a.info) == set(b.info) and all(same(a[n], b[n]) for n in a)


@pytest.mark.parametrize("content", [random_state(), random_lora(), {"blocks.0.ln1.weight": torch.ones(16)}])
def test_states_adapters_and_parts_between_containers(content, tmp_path):
    write_checkpoint(tmp_path / "s.pth", content)
    to_safetensors(tmp_path / "s.pth", tmp_path / "s.safetensors")
    to_pth(tmp_path / "s.safetensors", tmp_path / "back.pth")
    loaded = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(loaded) == list(content) and all(same(loaded[n], content[n]) for n in content)


def test_values_that_a_dtype_cannot_hold_are_counted(tmp_path):
    path, model = source(tmp_path, "7.0", dtype=torch.float32)
    model["emb.weight"].view(-1)[:3] = torch.tensor([1e5, -1e6, 1e-9])
    write_checkpoint(path, model, overwrite=True)
    with pytest.raises(NumericsError, match="emb.weight|embeddings.weight"):
        convert(path, "fla", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    result = convert(path, "fla", tmp_path / "out", dtype="fp16", allow_nonfinite=True)
    (emb,) = [r for r in result.rounding if r.name == "model.embeddings.weight"]
    expected = model["emb.weight"].half().float()
    assert (emb.overflow, emb.flushed, emb.values) == (2, 1, model["emb.weight"].numel())
    assert emb.rounded == int((expected != model["emb.weight"]).sum()) - 3 > 0
    assert any("2 of" in note and "overflowed" in note for note in result.notes)
    assert any("1 of" in note and "zero" in note for note in result.notes)
    assert all(check.passed for check in result.checks)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_a_plan_reads_headers_only_and_is_what_is_written(tmp_path, monkeypatch):
    path, _ = source(tmp_path, "7.0", unused=True)
    reads = record_reads(monkeypatch)
    plan = plan_convert(ConvertSpec(source=str(path), to="fla"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with open_checkpoint(path) as ck:
        data = {(t.offset, t.offset + t.nbytes) for t in ck.info.values()}
    assert not any((start, end) in data for _, start, end in reads)
    assert {d.name for d in plan.dropped} == {f"blocks.0.att.{n}" for n in ("v0", "v1", "v2")}
    plan.checkpoint.close()
    result = write_convert(plan)
    assert plan.checkpoint.closed and all(check.passed for check in result.checks)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ParameterError, match="has changed"):
        write_convert(plan)


def test_a_dry_run_writes_nothing(tmp_path):
    path, _ = source(tmp_path, "7.0")
    before = snapshot(tmp_path)
    assert not convert(path, "fla", tmp_path / "out", dry_run=True).outputs
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("version", "options", "error", "message"),
    [
        ("5.1", {"to": "fla"}, LayoutError, "takes RWKV-.*this is RWKV-5.1"),
        ("7.0", {"to": "flaa"}, ParameterError, "did you mean fla"),
        ("7.0", {"to": "fla", "size": "0.4B"}, ParameterError, "24 layers of 1024 channels.*2 layers of 16"),
        ("7.0", {"to": "fla", "size": "0.5B"}, ParameterError, "size='0.5B'"),
        ("7.0", {"to": "fla", "max_shard_size": "2 apples"}, ParameterError, "a size such as"),
        ("7.0", {"to": "fla", "max_shard_size": 0}, ParameterError, "max_shard_size=0"),
        ("7.0", {"to": "fla", "rescale": 6}, ParameterError, "no place for rescaled weights"),
        ("4.0", {"to": "pth", "out": "x.pth", "rescale": 6}, ParameterError, "no place for rescaled weights"),
        ("7.0", {"to": "fla", "out": "x.pth"}, ParameterError, "a folder is written"),
        ("7.0", {"to": "pth", "out": "folder"}, ParameterError, "must end in .pth"),
        ("7.0", {"to": "pth", "out": "source.pth", "overwrite": True}, OutputError, "inputs are never written to"),
        ("7.0", {"to": "fla", "out": ".", "overwrite": True}, OutputError, "holds the source"),
    ],
)
def test_refusals(version, options, error, message, tmp_path):
    path, _ = source(tmp_path, version)
    before, given = snapshot(tmp_path), {"out": "out"} | options
    with pytest.raises(error, match=message):
        convert(path, given.pop("to"), tmp_path / given.pop("out"), **given)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**random_model(), "_strategy": torch.ones(1)}, "converted by ChatRWKV"),
        ({**random_model(), "blocks.0.ffn.s_emb.weight": torch.ones(1)}, "DeepEmbed"),
        ({**random_model(), "blocks.0.att.odd": torch.ones(3)}, "blocks.0.att.odd"),
        ({n: t for n, t in random_model().items() if "head" not in n}, "whole models"),
    ],
)
def test_sources_that_are_refused(tensors, message, tmp_path):
    write_checkpoint(tmp_path / "m.pth", tensors)
    with pytest.raises(LayoutError, match=message):
        convert(tmp_path / "m.pth", "fla", tmp_path / "out")


def test_rescaled_weights_only_when_asked_for(tmp_path):
    path, model = source(tmp_path, "4.0")
    convert(path, "transformers", tmp_path / "plain")
    convert(path, "transformers", tmp_path / "halved", rescale=1)
    name = "rwkv.blocks.1.attention.output.weight"
    plain, halved = (torch.cat([t.flatten() for t in _raw(tmp_path / n, name)]) for n in ("plain", "halved"))
    assert torch.equal(halved * 2, plain)
    with open_checkpoint(tmp_path / "halved") as ck:
        assert all(same(ck[n], model[n]) for n in model)


def _raw(folder, name):
    from safetensors.torch import load_file

    return [load_file(folder / "model.safetensors")[name]]


def test_the_output_says_what_made_it(tmp_path):
    path, _ = source(tmp_path, "7.0")
    convert(path, "fla", tmp_path / "out", dtype="fp32")
    convert(tmp_path / "out", "pth", tmp_path / "again.pth")
    with open_checkpoint(tmp_path / "again.pth") as ck:
        made = json.loads(ck.metadata["rwkv_lab.json"])
    assert made["job"] == "convert" and made["recipe"]["to"] == "pth"
    assert made["source"]["recipe"] == {**made["source"]["recipe"], "to": "fla", "dtype": "fp32"}
    assert made["source"]["inputs"][0]["name"] == "source.pth"


def test_outputs_do_not_depend_on_the_run(tmp_path):
    path, _ = source(tmp_path, "7.0")
    for name in ("a", "b"):
        convert(path, "fla", tmp_path / name)
    one, other = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert one == other


def test_hugging_face_folder_by_generation(tmp_path):
    for version, kind in (("4.0", "rwkv"), ("5.2", "rwkv5"), ("6.0", "rwkv6"), ("7.0", "rwkv7")):
        path, _ = source(tmp_path, version)
        folder = to_huggingface(path, tmp_path / version).out
        assert json.loads((folder / "config.json").read_text())["model_type"] == kind


def test_targets():
    assert {"transformers", "fla", "safetensors", "pth"} <= set(target_names())


def test_one_shard_alone(tmp_path):
    path, _ = source(tmp_path, "7.0")
    convert(path, "fla", tmp_path / "out", max_shard_size="3KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    for shard in shards:
        for target in ("fla", "pth"):
            with pytest.raises(LayoutError, match="it is shard . of .: give the folder"):
                convert(shard, target, out_for(target, tmp_path, "again"))


def test_a_head_that_is_tied_to_the_embedding(tmp_path):
    from safetensors.torch import load_file, save_file

    path, model = source(tmp_path, "7.0")
    folder = convert(path, "fla", tmp_path / "out").out
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with open_checkpoint(folder) as ck:
        assert ck.kind == "partial"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    result = to_pth(folder, tmp_path / "back.pth")
    assert all(check.passed for check in result.checks)
    back = torch.load(result.out, weights_only=True)
    assert same(back["head.weight"], model["emb.weight"]) and len(back) == len(model)


def test_a_configuration_of_other_dimensions_is_noted(tmp_path):
    path, _ = source(tmp_path, "7.0")
    folder = convert(path, "fla", tmp_path / "out").out
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    notes = to_pth(folder, tmp_path / "back.pth").notes
    assert any("num_hidden_layers 5, the tensors have 2" in note for note in notes)


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    path, _ = source(tmp_path, "7.0")
    folder = convert(path, "fla", tmp_path / "out").out
    convert(path, "fla", folder, overwrite=True)
    (folder / "thesis.tex").touch()
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="more than a model .thesis.tex"):
        convert(path, "fla", folder, overwrite=True)
    assert snapshot(tmp_path) == before


def test_nan_is_refused_or_recorded(tmp_path):
    path, model = source(tmp_path, "7.0")
    model["emb.weight"][0, 0] = float("nan")
    write_checkpoint(path, model, overwrite=True)
    for target in ("fla", "pth"):
        with pytest.raises(NumericsError, match="1 NaN"):
            convert(path, target, out_for(target, tmp_path))
        result = convert(path, target, out_for(target, tmp_path), allow_nonfinite=True)
        assert any("1 tensor holds NaN or Inf" in note for note in result.notes)
        assert all(check.passed for check in result.checks)
