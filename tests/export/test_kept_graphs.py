"""Graphs are traced once, and found again by other processes; a file of one that is not whole is as good as none."""

import subprocess

import onnx_ir as ir
import pytest
from random_models import load_model, make_layout, write_model

from rwkv_lab.export import export_onnx
from rwkv_lab.export.onnx import kept_graphs, tracing
from rwkv_lab.model.dual import outline
from rwkv_lab.model.loading import open_model

# With another seed of hashes, and without what traces.
ELSEWHERE = """
import sys
from pathlib import Path
from rwkv_lab.export import export_onnx
from rwkv_lab.export.onnx import tracing
tracing._traced = None
export_onnx(Path(sys.argv[1]), Path(sys.argv[2]), "int8")
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for graphs, in a process that has traced none."""
    monkeypatch.setenv("RWKV_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tracing, "_KEPT", {})
    return tmp_path / "cache" / "graphs"


def test_levels_are_traced_once_in_all_processes(cache, warm, tmp_path, monkeypatch, caplog):
    source = write_model(tmp_path / "m.pth", make_layout("4.0", n_layer=1))  # the one that is traced most quickly
    traced, trace_once, known = [], tracing._traced, {}

    def trace(module, *given):
        traced.append(1)
        if module.one_token not in known:  # tracing takes seconds
            known[module.one_token] = trace_once(module, *given)
        return known[module.one_token].clone()

    monkeypatch.setattr(tracing, "_traced", trace)

    def export(name: str, weights: str) -> dict[str, bytes]:
        tracing._KEPT.clear()  # as in another process
        export_onnx(source, tmp_path / name, weights)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    with open_model(source) as (ck, layout):
        model = outline(ck, layout)
    assert not tracing.is_kept(model, 20, True, "scan")
    first, files = export("first", "fp32"), list(cache.iterdir())
    assert len(traced) == len(files) == 2
    assert tracing.is_kept(model, 20, True, "scan") and not tracing.is_kept(model, 21, True, "scan")
    assert export("again", "fp32") == first and len(traced) == 2
    words = [warm.python, "-c", ELSEWHERE, source, tmp_path / "there"]
    subprocess.run(words, check=True, env=warm.environment | {"RWKV_LAB_CACHE": str(cache.parent)})
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == export("here", "int8")
    assert len(traced) == 2

    data = files[0].read_bytes()
    files[0].write_bytes(data[:-1])
    files[1].write_bytes(b"")
    assert export("after damage", "fp32") == first and len(traced) == 4
    assert files[0].read_bytes() == data  # written anew
    for file in files:
        file.unlink()
    cache.rmdir()
    cache.write_text("no folder")
    caplog.set_level("INFO", "rwkv_lab")
    assert export("without a folder", "fp32") == first and len(traced) == 6
    assert "a traced graph is not kept: " in caplog.text


def test_a_name_stands_for_all_that_decides_a_graph(cache, monkeypatch):
    names = [kept_graphs._path(key) for key in ("one", "other", "one")]
    assert names[0] == names[2] != names[1]
    monkeypatch.setattr(kept_graphs, "version", lambda package: "0.1")
    names.append(kept_graphs._path("one"))
    monkeypatch.setattr(kept_graphs, "_sources", lambda: "changed")
    names.append(kept_graphs._path("one"))
    assert len({*names}) == 4


def test_the_oldest_go(cache, monkeypatch):
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="empty"), ir_version=10)
    monkeypatch.setattr(kept_graphs, "_MOST", 2)
    for key in ("first", "second", "third"):
        kept_graphs.keep(key, model)
    assert len(list(cache.iterdir())) == 2 and kept_graphs.find("third").graph.name == "empty"


def test_a_model_in_memory_is_traced_for_itself(cache, tmp_path, monkeypatch):
    """It may have been changed in ways that its names and shapes do not tell."""
    model = load_model(tmp_path, "4.0", n_layer=1)
    for name in ("find", "keep"):
        monkeypatch.setattr(kept_graphs, name, None)
    monkeypatch.setattr(tracing, "_traced", lambda *given: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        export_onnx(model, tmp_path / "out")
