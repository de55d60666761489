"""`python -m rwkv_lab.convert`."""

import json

import pytest
from models import random_model, snapshot

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert.__main__ import main


@pytest.fixture
def source(tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model(unused=True))
    return tmp_path / "m.pth"


def test_flags_are_the_options(source, tmp_path, capsys):
    words = ["--source", str(source), "--to", "fla", "--out", str(tmp_path / "out"), "--max-shard-size", "3kB"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "dropped blocks.0.att.v0: " in printed and "PASS" in printed and "FAIL" not in printed
    with open_checkpoint(tmp_path / "out") as ck:
        assert len(ck.files) > 2


def test_options_of_a_file_and_flags_on_top(source, tmp_path):
    options = {"source": str(source), "to": "fla", "out": str(tmp_path / "a.pth"), "dtype": "fp32"}
    (tmp_path / "o.json").write_text(json.dumps(options))
    assert main(["--json", str(tmp_path / "o.json"), "--to", "pth", "--no-verify"]) == 0
    with open_checkpoint(tmp_path / "a.pth") as ck:
        assert str(ck.info["emb.weight"].dtype) == "torch.float32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "fla"], "out must be given"),
        (["--to", "fla", "--out", "x"], "source is missing: a file or folder on this disk; or repo_id"),
        (["--source", "m.pth", "--to", "fla", "--out", "x", "--max-shard-size", "much"], "a size such as"),
        (["--source", "none.pth", "--to", "fla", "--out", "x"], "there is no file"),
        (["--json", "none.json"], "there is no file none.json"),
    ],
)
def test_refusals_are_one_message(words, message, source, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert main(words) == 1
    assert message in capsys.readouterr().err and snapshot(tmp_path) == before
