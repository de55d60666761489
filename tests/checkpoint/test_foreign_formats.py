"""Foreign formats: their tables lead there and back, and what is read is what reading under its own name costs."""

import json

import pytest
import torch
from models import LAYOUTS, random_model, same
from reading import record_reads

from rwkv_lab import RWKV_Dual
from rwkv_lab.checkpoint import expected_tensors, open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.foreign_format import (
    FOREIGN_FORMATS,
    HALVED,
    RESCALED,
    ForeignFormat,
    Place,
    Row,
    placed_rows,
    register_foreign_format,
)
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError

PAIRS = [(name, version) for name, known in FOREIGN_FORMATS.items() for version in known.versions]


def in_their_names(name: str, version: str, at: Place = Place()) -> tuple[dict, dict]:  # noqa: B008  # frozen
    """(a model, the same in a foreign format)"""
    known, model = FOREIGN_FORMATS[name], random_model(LAYOUTS[version])
    layout = LAYOUTS[version]
    theirs = {}
    for placed in placed_rows(known, model, layout.n_layer):
        here = Place(placed.layer, layout.head_size, at.rescale_every)
        theirs[placed.theirs] = placed.row.transform.forward([model[n] for n in placed.ours], here).contiguous()
    return model, theirs


@pytest.mark.parametrize(("name", "version"), PAIRS)
def test_a_table_has_every_tensor_of_its_generation(name, version):
    known, (required, _) = FOREIGN_FORMATS[name], expected_tensors(LAYOUTS[version])
    covered = {n for placed in placed_rows(known, required, 2) for n in placed.ours}
    assert covered == {n for n in required if not known.why_dropped(n)}


@pytest.mark.parametrize(("name", "version"), PAIRS)
def test_files_of_a_foreign_format_open_as_models(name, version, tmp_path):
    model, theirs = in_their_names(name, version)
    write_checkpoint(tmp_path / "m.safetensors", theirs, {"rwkv7.wkv.head_size": "4"})  # which GGUF's table asks for
    with open_checkpoint(tmp_path / "m.safetensors") as ck:
        known = FOREIGN_FORMATS[name]
        renamed = any(row.theirs != row.ours for row in known.rows)  # else its configuration tells it, or its shapes
        assert ck.foreign_format is (known if renamed or known.target == "web-rwkv" else None)
        assert ck.kind == "model" and ck.layout.version == version, ck.reason
        assert set(ck.info) == set(model)
        for n in model:
            assert same(ck[n], model[n].reshape(ck.info[n].shape)), n
            assert same(torch.cat(list(ck.info[n].blocks(4))), model[n].flatten()), n


@pytest.mark.parametrize("name", ["transformers-rwkv4", "world-rwkv5", "world-rwkv6"])
def test_weights_that_were_halved_are_read_as_they_were(name, tmp_path):
    version = FOREIGN_FORMATS[name].versions[0]
    model, theirs = in_their_names(name, version, Place(rescale_every=1))
    assert any(
        not torch.equal(theirs[row.theirs.replace("{i}", "1")], model[row.ours.replace("{i}", "1")])
        for row in FOREIGN_FORMATS[name].rows
        if row.transform is HALVED
    )
    write_checkpoint(tmp_path / "m.safetensors", theirs, {RESCALED: "1"})
    with open_checkpoint(tmp_path / "m.safetensors") as ck:
        assert all(same(ck[n], model[n]) for n in model)
    write_checkpoint(tmp_path / "m.safetensors", theirs, {RESCALED: "some"}, overwrite=True)
    with pytest.raises(CorruptFileError, match="a number of layers"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_one_tensor_is_read_at_the_cost_of_that_tensor(tmp_path, monkeypatch):
    _, theirs = in_their_names("fla-rwkv7", "7.0")
    write_checkpoint(tmp_path / "m.safetensors", theirs)
    with open_checkpoint(tmp_path / "m.safetensors") as ck:
        reads = record_reads(monkeypatch)
        ck["blocks.1.att.w1"]
        assert sum(end - start for _, start, end in reads) == ck.info["blocks.1.att.w1"].nbytes


def test_vectors_that_older_files_hold_together(tmp_path):
    model, theirs = in_their_names("fla-rwkv7", "7.0")
    for i in range(2):
        parts = [theirs.pop(f"model.layers.{i}.attn.x_{z}").flatten() for z in "rwkvag"]
        theirs[f"model.layers.{i}.attn.x_x"] = torch.stack(parts)
    write_checkpoint(tmp_path / "m.safetensors", theirs)
    with open_checkpoint(tmp_path / "m.safetensors") as ck:
        assert ck.kind == "model" and all(same(ck[n], model[n]) for n in model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t | {"blocks.0.att.k_k": torch.ones(1, 1, 16)}, LayoutError, "both mean blocks.0.att.k_k"),
        (lambda t: t | {"model.layers.0.attn.x_x": torch.ones(6, 16)}, LayoutError, "both mean blocks.0.att.x_r"),
        (lambda t: t | {"model.layers.1.attn.x_x": torch.ones(3, 16)}, CorruptFileError, r"shape \[3, 16\]"),
        (lambda t: t | {"model.layers.1.attn.w_lora.lora.0.weight": torch.ones(4)}, CorruptFileError, r"shape \[4\]"),
    ],
)
def test_tables_refuse_what_does_not_fit(change, error, message, tmp_path):
    write_checkpoint(tmp_path / "m.safetensors", change(in_their_names("fla-rwkv7", "7.0")[1]))
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path / "m.safetensors")


def test_tensors_that_a_table_does_not_have_stay_what_they_are(tmp_path):
    _, theirs = in_their_names("fla-rwkv7", "7.0")
    write_checkpoint(tmp_path / "m.safetensors", theirs | {"model.layers.0.attn.odd": torch.ones(2)})
    with open_checkpoint(tmp_path / "m.safetensors") as ck:
        assert ck.identity.misfit.extra == ("model.layers.0.attn.odd",)


def test_config_of_a_folder_is_read(tmp_path):
    write_checkpoint(tmp_path / "model.safetensors", in_their_names("fla-rwkv7", "7.0")[1])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv7"}))
    with open_checkpoint(tmp_path) as ck:
        assert ck.config == {"model_type": "rwkv7"} and ck.kind == "model"


@pytest.mark.parametrize("changed", [{}, {"name": "another"}])
def test_formats_are_registered_once(changed):
    known = FOREIGN_FORMATS["fla-rwkv7"]
    given = {"name": known.name, "described": "x", "target": known.target, "versions": ("7.0",)} | changed
    with pytest.raises(ParameterError, match="fla"):
        register_foreign_format(ForeignFormat(**given, rows=(Row("a", "b"),), recognise=lambda names, facts: False))


@pytest.mark.parametrize(
    ("config", "eps"),
    [
        ({}, None),
        ({"norm_eps": 1e-5}, 4e-5),
        ({"norm_eps": 1e-5, "group_norm_eps": 64e-5}, 64e-5),
    ],
)
def test_the_eps_of_a_folder(config, eps, tmp_path):
    write_checkpoint(tmp_path / "model.safetensors", in_their_names("fla-rwkv7", "7.0")[1])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as ck:
        assert ck.group_norm_eps == pytest.approx(eps) if eps else ck.group_norm_eps is None
    norm = RWKV_Dual.from_pretrained(tmp_path).blocks[0].att.ln_x
    assert norm.eps == pytest.approx(eps or 64e-5)


def test_an_eps_that_is_none(tmp_path):
    write_checkpoint(tmp_path / "model.safetensors", in_their_names("fla-rwkv7", "7.0")[1])
    (tmp_path / "config.json").write_text(json.dumps({"group_norm_eps": "small"}))
    with open_checkpoint(tmp_path) as ck, pytest.raises(CorruptFileError, match="'small'"):
        ck.group_norm_eps  # noqa: B018


def test_a_part_of_a_model_is_recognised_by_all_of_its_names(tmp_path):
    model, theirs = in_their_names("fla-rwkv7", "7.0")
    part = {n: t for n, t in theirs.items() if "attn_norm" in n or "o_proj" in n}
    write_checkpoint(tmp_path / "part.safetensors", part)
    with open_checkpoint(tmp_path / "part.safetensors") as ck:
        assert ck.kind == "partial" and all(same(ck[n], model[n]) for n in ck) and "blocks.1.att.output.weight" in ck
    for others in ({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, {"blocks.0.ln1.weight": torch.ones(4)}):
        write_checkpoint(tmp_path / "part.safetensors", part | others, overwrite=True)
        with open_checkpoint(tmp_path / "part.safetensors") as ck:
            assert ck.foreign_format is None
    write_checkpoint(tmp_path / "part.safetensors", {"lm_head.weight": torch.ones(2, 2)}, overwrite=True)
    with open_checkpoint(tmp_path / "part.safetensors") as ck:
        assert ck.foreign_format is None
