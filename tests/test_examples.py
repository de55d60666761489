"""Every script in examples/ runs on tiny models, prints what it promises, and every measurement has one."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
from tuned_files import write_fine_tune, write_tuned

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# For each script: its arguments, made from the fixture `files`, and what it prints at least.
CASES: dict[str, list[tuple[str, list[str]]]] = {
    "ablate_a_tuning": [
        ("", ["with all of it ", "without layer 1: ", "PASS  bits per byte with all parts put back"]),
        ("base lora english", ["without att.key: ", "PASS  logits with the tuning merged here, and with it loaded"]),
    ],
    "changes_of_a_tuning": [
        ("", ["demo-state.pth, a tuned state, trains 1,024 values; "]),
        ("base lora other", ["blocks.0.att.key: ‖Δ‖ / ‖W‖ ", "blocks.0.att.key.weight: cosine +1.000 to other.pth"]),
        ("base norms", ["blocks.1.ln2.bias: ‖Δ‖ / ‖W‖ "]),
    ],
    "compare_modes": [("", ["float32, rnn, chunked ", "PASS  float64: state after 64 tokens in one pass"])],
    "convert_and_compare": [
        ("", ["blocks.{i}.att.key.weight ", "flushed to zero", "‖Δ‖ / ‖W‖ ", "PASS  logits of source and output"])
    ],
    "effect_of_a_state": [("", ["layer 1, head 1: norm ", "token 64: predictions "])],
    "find_mismatch": [
        ("base base", ["Both compute the same."]),
        ("base model", ["The runs part in layer 0, from token 0 on, at what comes in"]),
    ],
    "inspect_checkpoint": [
        ("", ["demo-base.pth: kind model, RWKV-7.0", "values that are NaN or Inf: 0"]),
        ("lora", ["kind lora, no whole model", "blocks.0.att.key.lora_A"]),
    ],
    "merge_and_compare": [
        (
            "",
            ["plan: state into RWKV-7.0", "Bits per byte of held-out text, base to merged: ", "PASS  the merged"],
        ),
        ("base lora", ["blocks.0.att.key.weight ", "‖Δ‖ / ‖W‖ "]),
    ],
    "state_along_a_text": [("", ["layer 1: half of its channels forget half", "after 4 tokens: RMS of the state "])],
    "train_an_adapter": [
        ("out base english 5", ["trains 4,608 values", "PASS  kind of the output: lora (limit lora)"])
    ],
}


@pytest.fixture(scope="module")
def files(demo_folder, tmp_path_factory) -> dict[str, str]:
    """What stands in CASES -> a path."""
    folder, base = tmp_path_factory.mktemp("files"), demo_folder / "demo-base.pth"
    made = {kind: write_tuned(folder / f"{kind}.pth", base, kind) for kind in ("lora", "norms")}
    made["other"] = write_tuned(folder / "other.pth", base, "lora")
    made["model"] = write_fine_tune(folder / "model.pth", base)
    return {name: str(path) for name, path in ({"base": base, "out": folder / "out.pth"} | made).items()}


def test_every_example_has_a_case():
    assert EXAMPLES and {path.stem for path in EXAMPLES} == set(CASES)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_an_example_prints_what_it_promises(name, arguments, expected, files, capsys, monkeypatch):
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *(files.get(word, word) for word in arguments.split())])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(text in printed for text in expected), printed
    assert "FAIL" not in printed


def measurements() -> dict[str, str]:
    """Public functions of analysis that return a dataclass of theirs, and the modules that they are in."""
    trees = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "rwkv_lab" / "analysis").glob("*.py")}
    classes = {node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    return {
        node.name: module
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is not None
        if classes & {n.id for n in ast.walk(node.returns) if isinstance(n, ast.Name)}
    }


def test_every_measurement_has_an_example():
    called = {
        node.func.id
        for path in EXAMPLES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    found = measurements()
    assert {"compare_modes", "measure_ablation", "compare_behaviour"} <= set(found)
    # `measure_changes` has the spectra: these two give them for a checkpoint or an adapter that is open already.
    assert set(found) - called <= {"adapter_spectra", "model_spectra"}
