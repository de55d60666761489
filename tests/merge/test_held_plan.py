"""A plan that is kept is carried out as it was shown, and refused once an input is another one."""

import os

import pytest
import torch
from models import random_model, random_state, snapshot
from safetensors.torch import save_file

from rwkv_lab import merge
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import MergeOptions, MergeSpec, open_inputs, plan_merge, write_merge
from rwkv_lab.merge.mixing_method import MIXING, mixing_method


@pytest.fixture
def files(tmp_path):
    save_file(random_model(), tmp_path / "base.safetensors")
    save_file(random_state(), tmp_path / "state.safetensors")
    return tmp_path


def held_plan(files, out="out.pth"):
    """A plan whose inputs are closed again."""
    spec = MergeSpec.read({"base": files / "base.safetensors", "tuned": files / "state.safetensors"})
    with open_inputs(spec) as inputs:
        return plan_merge(inputs, spec, files / out)


def test_a_held_plan_writes_what_a_merge_writes(files):
    plan = held_plan(files)
    assert not plan.out.exists()
    result = write_merge(plan)
    at_once = merge(files / "base.safetensors", files / "state.safetensors", files / "other.pth")
    assert result.plan is plan and result.plan.rows == at_once.plan.rows
    assert result.out.read_bytes() == at_once.out.read_bytes()


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def touched(path):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def renamed_in_the_header(path):
    """Another header of the same length, with the old time of change."""
    stat, content = path.stat(), path.read_bytes()
    assert content.count(b"blocks.1.") > content.count(b"blocks.7.") == 0
    path.write_bytes(content.replace(b"blocks.1.", b"blocks.7."))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def gone(path):
    path.unlink()


@pytest.mark.parametrize("change", [longer, touched, renamed_in_the_header, gone], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["base", "state"])
def test_a_held_plan_is_refused_once_an_input_has_changed(which, change, files):
    plan = held_plan(files)
    change(files / f"{which}.safetensors")
    before = snapshot(files)
    with pytest.raises(ParameterError, match=f"{which}.safetensors"):
        write_merge(plan)
    assert snapshot(files) == before


def test_a_plan_is_not_carried_out_with_another_hash(files):
    with pytest.raises(ParameterError, match="make the plan again"):
        write_merge(held_plan(files), MergeOptions(hash="sha256"))
    assert not (files / "out.pth").exists()


def test_inputs_have_their_roles(files):
    result = merge(files / "base.safetensors", files / "state.safetensors", files / "out.pth", hash="sha256")
    assert [(f.role, f.path.name) for f in result.inputs] == [
        ("base", "base.safetensors"),
        ("tuned", "state.safetensors"),
    ]
    assert all(f.fingerprint.startswith("sha256:") for f in result.inputs)


def test_a_mixing_method_without_a_proof_is_refused():
    def halved(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
        return base / 2

    with pytest.raises(ParameterError, match="'halved' has no proof"):
        mixing_method("Half of the base")(halved)
    assert "halved" not in MIXING
