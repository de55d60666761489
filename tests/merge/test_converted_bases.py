"""Folders of other ecosystems are merged as they are: the same bytes as from BlinkDL's file, proved as well."""

import pytest
import torch
from models import random_lora, random_model, random_state

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.convert import convert
from rwkv_lab.merge import merge, verify_merge


@pytest.fixture
def files(tmp_path):
    tensors = {"base": random_model(), "model": random_model(seed=9), "state": random_state(), "lora": random_lora()}
    for name, content in tensors.items():
        write_checkpoint(tmp_path / f"{name}.pth", content)
    for name in ("base", "model"):
        convert(tmp_path / f"{name}.pth", "fla", tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("tuned", "options"), [("state.pth", {}), ("lora.pth", {"alpha": 8}), ("model", {"alpha": 0.5})]
)
def test_a_folder_is_merged(tuned, options, files):
    of_folder = merge(files / "base", files / tuned, files / "a.pth", **options)
    tuned = "model.pth" if tuned == "model" else tuned
    of_file = merge(files / "base.pth", files / tuned, files / "b.pth", **options)
    a, b = (torch.load(result.out, weights_only=True) for result in (of_folder, of_file))
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in b)
    checks = verify_merge(of_folder)
    assert all(check.passed for check in checks), checks
