"""Mistakes in parameters that must not end in a traceback, in a file that is not what was meant, or in silence."""

import json
import os
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from models import random_lora, random_model, random_state, same, snapshot

from rwkv_lab import RWKV_Dual, merge, open_checkpoint
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import LayoutError, OutputError, ParameterError
from rwkv_lab.merge import verify_merge, writing


@pytest.fixture
def files(tmp_path):
    torch.save(random_model(), tmp_path / "base.pth")
    torch.save(random_state(), tmp_path / "state.pth")
    torch.save(random_lora(), tmp_path / "lora.pth")
    return tmp_path


def state_into_base(folder, **given):
    return merge(folder / "base.pth", folder / "state.pth", folder / "out.pth", **given)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"exclude": ["*"]}, "keep out all"),
        ({"include": ["blocks.0.*"], "exclude": ["*.time_state"]}, "keep out all"),
        ({"include": [3]}, "3 is no pattern"),
        ({"exclude": 5}, "must be a list"),
        ({"allow_extra": "emb*"}, "must be a list"),
        ({"allowed_dir": 3}, "should be a path"),
        ({"base": None}, "base=None"),
        ({"tuned": "https://host/state.pth"}, "is an address"),
        ({"out": ""}, "is empty"),
        ({"out": "a\0.pth"}, "zero byte"),
        ({"out": "line\nbreak.pth"}, "printable"),
        ({"out": os.fsdecode(b"caf\xe9.pth")}, "printable"),
        ({"tuned": "base.pth"}, "same file"),
        ({"tuned": "lora.pth", "alpha": 1e40}, "float32"),
    ],
)
def test_mistakes_are_refused_in_our_words(given, says, files, monkeypatch):
    monkeypatch.chdir(files)
    before = snapshot(files)
    with pytest.raises(ParameterError, match=says):
        merge(**({"base": "base.pth", "tuned": "state.pth", "out": "out.pth"} | given))
    assert snapshot(files) == before


def test_no_patterns_and_an_empty_list_mean_the_same(files):
    state_into_base(files)
    first = (files / "out.pth").read_bytes()
    state_into_base(files, include=[], exclude=[], allow_extra=[], alpha=1, overwrite=True)
    assert (files / "out.pth").read_bytes() == first


def test_home_folders_are_understood(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    result = merge("~/base.pth", "~/state.pth", "~/out.pth")
    assert result.out == files / "out.pth" and (files / "out.pth").is_file()


def test_a_dry_run_has_nothing_to_verify(files):
    with pytest.raises(ParameterError, match="dry run"):
        verify_merge(state_into_base(files, dry_run=True))


def test_a_result_is_good_from_any_folder(files, monkeypatch):
    monkeypatch.chdir(files)
    result = merge("base.pth", "state.pth", "out.pth")
    monkeypatch.chdir("/")
    assert all(c.passed for c in verify_merge(result))


def test_the_plan_says_itself(files):
    text = str(state_into_base(files, dry_run=True).plan)
    assert text.startswith("state into RWKV-7.0") and "2 of" in text


def test_the_note_beside_is_the_outputs_own(files):
    """Many writers of one output, with other recipes: whichever came last, file and note agree."""

    def write(alpha):
        state_into_base(files, alpha=alpha, overwrite=True)

    threads = [threading.Thread(target=write, args=(a / 8,)) for a in range(1, 9)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert note_of(files)["recipe"] == recipe_inside(files / "out.pth")


def test_a_run_that_dies_before_its_note_leaves_no_other_note(files, monkeypatch):
    state_into_base(files, alpha=0.5)
    monkeypatch.setattr(writing, "describe_output", die)
    with pytest.raises(KeyboardInterrupt):
        state_into_base(files, alpha=0.25, overwrite=True)
    assert recipe_inside(files / "out.pth")["alpha"] == 0.25 and not (files / "out.pth.json").exists()


def test_the_note_of_another_program_is_left_alone(files, monkeypatch):
    real = writing.write_stream

    def with_a_note_meanwhile(out, *rest):
        (files / "out.pth.json").write_text("mine")
        return real(out, *rest)

    monkeypatch.setattr(writing, "write_stream", with_a_note_meanwhile)
    with pytest.raises(OutputError, match="out.pth.json exists"):
        state_into_base(files)
    assert (files / "out.pth.json").read_text() == "mine" and not (files / "out.pth").exists()


def die(*given):
    raise KeyboardInterrupt


def note_of(folder: Path) -> dict:
    return json.loads((folder / "out.pth.json").read_text())


def recipe_inside(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("rwkv_lab.json"))
        return json.loads(archive.read(name))["recipe"]


def test_states_for_some_layers_leave_the_others_at_zero(files):
    state_into_base(files, include=["blocks.1.*"])
    model = RWKV_Dual.from_pretrained(files / "out.pth")
    assert not model.blocks[0].att.time_state.any()
    assert same(model.blocks[1].att.time_state.detach(), random_state()["blocks.1.att.time_state"])


def test_a_dict_within_the_dict_is_named(tmp_path):
    torch.save({"state_dict": random_model(), "epoch": 3}, tmp_path / "nested.pth")
    with open_checkpoint(tmp_path / "nested.pth") as ck:
        assert ck.kind == "unknown" and "'state_dict'" in ck.reason


def test_a_dtype_that_is_not_supported_is_no_danger(tmp_path):
    torch.save({"emb.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "f8.pth")
    with pytest.raises(LayoutError, match="float8"):
        open_checkpoint(tmp_path / "f8.pth")


def test_mixed_dtypes_stay_unless_one_is_asked_for(files):
    torch.save(random_model(dtype=torch.float32), files / "base.pth")
    part = {"head.weight": random_model(seed=4)["head.weight"]}
    write_checkpoint(files / "part.pth", part)
    for dtype, expected in ((None, torch.bfloat16), ("fp32", torch.float32)):
        merge(files / "base.pth", files / "part.pth", files / "out.pth", dtype=dtype, overwrite=True)
        with open_checkpoint(files / "out.pth") as ck:
            assert ck.info["head.weight"].dtype == expected and ck.info["emb.weight"].dtype == torch.float32
