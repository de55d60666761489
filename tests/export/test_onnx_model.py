"""Exported folders in use: text from onnxruntime without torch, and folders that are refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.export import OnnxModel, onnx_graphs

ROOT = Path(__file__).parents[2]


def test_the_readme_runs_without_torch(exported):
    _, folder = exported("7.0")
    (code,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    code += "\nimport sys; print([name for name in ('torch', 'onnx', 'onnxscript') if name in sys.modules])"
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, cwd=folder, capture_output=True, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.decode(errors="replace").splitlines()[-1] == "[]"
    assert len(done.stdout) > 40


def test_it_writes_what_the_model_writes(exported):
    model, folder = exported("6.0")
    for prompt in ("The quick brown fox", [5], "x" * 600):  # the last is read in pieces
        expected = model.generate_with_streaming(prompt, max_new_tokens=24, temperature=0)
        assert OnnxModel(folder).generate(prompt, max_new_tokens=24, temperature=0) == expected


def test_streaming_seeds_and_stops(exported):
    graph = OnnxModel(exported("5.2").folder)
    shown = []
    text = graph.generate("a", 30, seed=3, streaming_callback=lambda token, piece: shown.append(piece))
    assert text == "".join(shown) == graph.generate("a", 30, seed=3) != graph.generate("a", 30, seed=4)
    stop = text[5:7]
    assert graph.generate("a", 30, seed=3, stop=[stop]) == text[: text.index(stop)]
    tokens = [token for token, _ in graph.stream("a", 30, seed=3)]
    assert [token for token, _ in graph.stream("a", 30, seed=3, stop_tokens=[tokens[4]])][-1] == tokens[4]
    assert graph.generate("a", 30, seed=3, streaming_callback=lambda token, piece: False) == shown[0]
    assert graph.generate("a", 0) == ""
    assert graph.generate("", 3, temperature=0) == graph.generate([0], 3, temperature=0)
    assert len({graph.generate("a", 30, seed=None) for _ in range(3)}) > 1
    assert graph.generate("a", 5, top_p=1e-9) == graph.generate("a", 5, temperature=0)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_low_memory_writes_the_same(exported, monkeypatch, weights):
    """Weights of int4 are copied by onnxruntime: those of one graph at a time."""
    folder, opened = exported("7.0", weights).folder, []
    expected = OnnxModel(folder).generate("The quick", 8, temperature=0)
    before = onnx_graphs.open_session
    monkeypatch.setattr(onnx_graphs, "open_session", lambda *given: opened.append(given[0].name) or before(*given))
    graph = OnnxModel(folder, low_memory=True)
    assert [graph.generate("The quick", 8, temperature=0) for _ in range(2)] == [expected] * 2
    reopened = ["step.onnx", "model.onnx", "step.onnx"] if weights == "int4" else []
    assert opened == ["step.onnx", "model.onnx", *reopened]


def test_tokens_and_states_that_do_not_fit(exported):
    graph = OnnxModel(exported("4.0").folder)
    for tokens in ([1, 2], [[]], [[1.0]], [["a"]], [[1], [2, 3]], None):
        with pytest.raises(ParameterError, match="integers of shape"):
            graph.run(tokens)
    with pytest.raises(ParameterError, match="Token 257 is outside the vocabulary"):
        graph.run([[3, 257]])
    with pytest.raises(ParameterError, match="att_shift has shape"):
        graph.run([[1], [2]], graph.create_state(2) | {"att_shift": graph.create_state(1)["att_shift"]})
    with pytest.raises(ParameterError, match="wkv is None"):
        graph.run([[1]], {})
    with pytest.raises(ParameterError, match="no provider 'NoProvider'"):
        OnnxModel(graph.folder, providers=["NoProvider"])


def test_folders_that_are_refused(exported, tmp_path):
    with pytest.raises(ParameterError, match="no export.json"):
        OnnxModel(tmp_path)
    whole = exported("4.0").folder

    def damaged(change) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        change(folder)
        return folder

    for change, message in (
        (lambda folder: (folder / "step.onnx").unlink(), "has no step.onnx"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "has 1 bytes"),
        (lambda folder: (folder / "export.json").write_text("{"), "does not describe"),
        (lambda folder: (folder / "export.json").write_text("[]"), "does not describe"),
        (lambda folder: rename_file(folder, "../model.onnx"), "has no ../model.onnx"),
        (lambda folder: overwrite(folder / "model.onnx"), "is no ONNX file"),
        (lambda folder: overwrite(folder / "initial_state.npz"), "holds no state"),
    ):
        with pytest.raises(CorruptFileError, match=re.escape(message)):
            OnnxModel(damaged(change))


def rename_file(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "export.json").read_text())
    manifest["files"][name] = manifest["files"].pop("model.onnx")
    (folder / "export.json").write_text(json.dumps(manifest))


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def test_a_folder_without_a_tokenizer_is_prompted_by_ids(exported, tmp_path):
    shutil.copytree(exported("4.0").folder, tmp_path / "m")
    manifest = json.loads((tmp_path / "m/export.json").read_text())
    (tmp_path / "m/export.json").write_text(json.dumps(manifest | {"tokenizer": None}))
    graph = OnnxModel(tmp_path / "m")
    with pytest.raises(ParameterError, match="has no tokenizer"):
        graph.generate("a")
    logits, _ = graph.run([[1, 2, 3]])
    ids = [token for token, _ in graph.stream([1, 2, 3], 2, temperature=0)]
    assert ids[0] == np.argmax(logits[0, -1])
