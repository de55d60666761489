"""`python -m rwkv_lab.bench convert` on a model of a few thousand parameters."""

import json

import pytest
import torch

from rwkv_lab.bench import converting, file_jobs
from rwkv_lab.bench.__main__ import main
from rwkv_lab.checkpoint import Layout
from rwkv_lab.errors import NumericsError, OutputError
from rwkv_lab.progress import human_bytes

SMALL = Layout("7.0", 2, 64, 64, 256, 257, 1, 64, {"w": 8, "a": 8, "v": 8, "g": 8})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Every way in this process; `cp` stays a program."""
    monkeypatch.setitem(converting.SHAPES, "v7-0.1b", SMALL)
    monkeypatch.setattr(converting, "in_a_process", lambda module, *words: converting._measured(*map(str, words)))
    monkeypatch.setattr(converting, "quantising_rates", lambda: {"copy": 1.0})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_way_has_its_row(here, capsys):
    pytest.importorskip("rwkv7_hf", reason="the package rwkv7-hf is not installed")
    main(["convert", "--sizes", "v7-0.1b", "--rounds", "2", "--folder", "models", "--report", "report"])
    report = json.loads((here / "report" / "convert.json").read_text())
    rows = {row["way"]: row for row in report["results"]}
    assert list(rows) == [file_jobs.CP, *converting.OURS, *converting.PEERS]
    for way, row in rows.items():
        if way.startswith("llama.cpp"):
            assert row["problem"] == "absent: --llama-cpp names no folder with convert_hf_to_gguf.py"
            continue
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        if way in converting.OURS:
            assert all(0 < w < s for w, s in zip(row["written"], row["seconds"], strict=True))
    said = capsys.readouterr().out
    size = human_bytes((here / "models" / "v7-0.1b.pth").stat().st_size)
    assert f"| v7-0.1b, {size} | cp | " in said and "| copy | 1.00 |" in said
    assert [p.name for p in (here / "models").iterdir()] == ["v7-0.1b.pth"]


def test_outputs_that_differ_have_no_figures(here, monkeypatch):
    pytest.importorskip("rwkv7_hf", reason="the package rwkv7-hf is not installed")
    right = converting._tensors
    seen = []

    def disturbed(path):
        seen.append(path)
        found = right(path)
        return found | {"emb.weight": found["emb.weight"] + 1} if len(seen) == 2 else found

    monkeypatch.setattr(converting, "_tensors", disturbed)
    with pytest.raises(NumericsError, match=r"rwkv7-hf convert: emb.weight differs .* no figures are reported"):
        converting.benchmark_convert(here, ["v7-0.1b"], 1, None)
    assert [p.name for p in here.iterdir()] == ["v7-0.1b.pth"]


def test_a_disk_that_is_too_small(here, monkeypatch):
    monkeypatch.setattr(converting, "disk_free", lambda folder: 1000)
    with pytest.raises(OutputError, match=r"has 1 kB free; this takes 1.19 MB$"):
        converting.benchmark_convert(here, ["v7-0.1b"], 1, None)


def test_rates_of_quantising_are_of_what_the_package_makes(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(converting, "_rate", lambda job, values: float(len(job())))
    monkeypatch.setattr(torch, "randn", lambda n: torch.zeros(1 << 20))
    rates = converting.quantising_rates()
    assert list(rates) == ["copy", "Q8_0", "Q8_0, package gguf", "Q4_0", "Q4_0, package gguf"]
