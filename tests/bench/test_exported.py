"""Exported models in the benchmarks: onnxruntime beside our own step, answers first."""

import json

import pytest
from random_models import SIZES, make_layout, write_model

from rwkv_lab.bench import exported
from rwkv_lab.bench.__main__ import main


def test_rates_and_cost_by_length(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exported, "_SECONDS", 0.01)
    source = write_model(tmp_path / "m.pth", make_layout("4.0", **SIZES))
    flags = ["--models", str(source), "--dtypes", "fp32", "--rounds", "2", "--lengths", "8", "24", "--peers"]
    main(["export", *flags, "--folder", str(tmp_path), "--report", str(tmp_path / "r")])
    rows = json.loads((tmp_path / "r/export.json").read_text())["rows"]
    assert [(row["job"], row["engine"], row["size"]) for row in rows] == [
        ("decode", "onnxruntime", 1),
        ("decode", "rwkv_lab", 1),
        ("exported prompt", "onnxruntime", 8),
        ("exported prompt", "onnxruntime", 24),
    ]
    assert all(len(row["samples"]) == 2 for row in rows) and rows[0]["agreement"]["error"] < 1e-5
    assert rows[2]["facts"] == {"times the first length's": 1} and rows[3]["facts"]["times the first length's"] > 0

    graph = exported.OnnxModel(next(tmp_path.glob("*-onnx-fp32")))
    right = exported._answers
    monkeypatch.setattr(exported, "_exported", lambda *given: graph)
    monkeypatch.setattr(exported, "_answers", lambda *given: 1.01 * right(*given))
    wrong = exported.measure_exported(source, "tiny", tmp_path, 1, (8,), weights=["fp32"])[0]
    assert wrong.disagrees and wrong.samples == [] and "disagree" in wrong.problem
