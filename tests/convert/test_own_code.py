"""A folder with modelling code of its own is loaded, run, trained and saved again where rwkv_lab is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import make_layout, make_tokens, write_model

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.convert import convert, to_pth

USE = Path(__file__).with_name("use_of_a_folder.py")
VERSIONS = ("5.0", "5.1", "5.2", "6.0", "7.0")


def written(folder, version, time_state=False, **sizes):
    """(a random model, a folder for transformers made of it)"""
    path = write_model(folder / "m.pth", make_layout(version, **sizes), time_state=time_state)
    return path, convert(path, "transformers", folder / "out", verify=True).out


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder with one of each version, used by one process: transformers and peft take seconds to import."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="Hugging Face's `peft` is not installed")
    all_of_them = tmp_path_factory.mktemp("used")
    for version in VERSIONS:
        (all_of_them / version).mkdir()
        write_what_is_used(version, all_of_them / version)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(all_of_them / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(USE), *(str(all_of_them / version) for version in VERSIONS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=all_of_them, timeout=600)
    return all_of_them, done


def write_what_is_used(version: str, folder: Path) -> None:
    sizes = {"n_layer": 3, "n_head": 3, "head_size": 8, "n_embd": 20 if version == "7.0" else None}
    path, _ = written(folder, version, time_state=version != "5.1", **sizes)
    model, tokens = RWKV_Dual.from_pretrained(path).requires_grad_(False), make_tokens(2, 37)
    greedy = tokens[:1, :9]
    for _ in range(6):
        greedy = torch.cat([greedy, model(greedy)[0][:, -1:].argmax(-1)], 1)
    torch.save({"tokens": tokens, "logits": model(tokens)[0], "greedy": greedy[0, 9:]}, folder / "expected.pt")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_is_used_without_rwkv_lab(version, used):
    folder, done = used[0] / version, used[1]
    assert f"{version} used" in done.stdout.splitlines(), done.stderr[-3000:]
    expected = torch.load(folder / "expected.pt")
    again = RWKV_Dual.from_pretrained(folder / "again").requires_grad_(False)
    assert torch.equal(again(expected["tokens"])[0], expected["logits"])  # what transformers saved is read as it is


@pytest.mark.parametrize("version", VERSIONS)
def test_the_folder_gives_the_checkpoint_back(version, tmp_path):
    path, folder = written(tmp_path, version, time_state=True)
    to_pth(folder, tmp_path / "again.pth")
    with open_checkpoint(path) as ours, open_checkpoint(tmp_path / "again.pth") as again:
        unused = {f"blocks.0.att.v{i}" for i in "012"} if version == "7.0" else set()
        assert set(again) == set(ours) - unused
        for name in again:
            assert torch.equal(again[name].flatten(), ours[name].flatten())
