"""Batch runs: what is right ends with 0 and "ok", what is wrong with another code, "failed", and the reason."""

import json
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint

# Kernels take seconds to start, so the refusals run side by side, in the background of the first test.
REFUSALS = {
    "unknown name": (["-p", "alhpa", "0.5"], "ParameterError", "did you mean alpha?"),
    "text for a bool": (["-p", "dry_run", "true"], "ParameterError", "dry_run='true'"),
    "alpha nan": (["-p", "alpha", "nan"], "ParameterError", "alpha=nan"),
    "alpha out of range": (["-p", "alpha", "1.5"], "ParameterError", "alpha=1.5"),
    "empty base": (["-r", "base", ""], "ParameterError", "base=''"),
    "weights": (["-y", '{"weights": [0.5]}'], "ParameterError", "takes no weights"),
    "missing file": (["-r", "base", "{tmp}/none.pth", "-r", "tuned", "{state}"], "ParameterError", "none.pth"),
    "garbage": (["-r", "base", "{tmp}/garbage.pth", "-r", "tuned", "{state}"], "CorruptFileError", "garbage.pth"),
}


@pytest.fixture(scope="module")
def refusals(batch, demo_folder, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("refused")
    (tmp / "garbage.pth").write_bytes(bytes(range(256)) * 40)
    out = tmp / "out.pth"

    def run(case: str):
        options = [o.format(tmp=tmp, state=demo_folder / "demo-state.pth") if "{tmp}" in o or "{state}" in o else o
                   for o in REFUSALS[case][0]]  # fmt: skip
        return batch("merge", *options, "-r", "out", str(out))

    with ThreadPoolExecutor(2) as pool:
        return out, dict(zip(REFUSALS, pool.map(run, REFUSALS), strict=True))


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_refused(refusals, case):
    out, runs = refusals
    run, (_, error, says) = runs[case], REFUSALS[case]
    assert run.code == 1 and says in run.log
    assert run.result["status"] == "failed" and run.result["error"]["class"] == error
    assert says in run.result["error"]["message"]
    assert says in (run.folder / "report.html").read_text().replace("&#39;", "'")
    assert not out.exists() and not list(run.folder.glob("*.pth"))


def test_no_traceback_stands_before_the_message(refusals):
    executed = refusals[1]["unknown name"].notebook.read_text()
    assert "did you mean alpha?" in executed and "read_parameters(" not in executed


def test_merge_on_its_defaults(merged, demo_folder):
    assert merged.code == 0, merged.log
    result = merged.result
    assert (result["status"], result["error"], result["metrics"]["method"]) == ("ok", None, "state")
    assert len(result["checks"]) >= 10 and all(c["passed"] for c in result["checks"])
    assert [f["path"] for f in result["inputs"]] == [str(demo_folder / f"demo-{n}.pth") for n in ("base", "state")]
    assert set(result["metrics"]["bits_per_byte"]) == {"english", "python"}
    assert result["metrics"]["summary"].startswith("Bits per byte of held-out text, base to merged: english ")
    with open_checkpoint(result["outputs"][0]["path"]) as ck:
        assert ck.kind == "model" and "blocks.1.att.time_state" in ck
    assert len(result["figures"]) == 4
    report = (merged.folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 4 and str(merged.folder.parent) not in report


def test_merge_prints_its_verdicts(merged):
    lines = merged.output_of("cells.prove").splitlines()
    assert len(lines) >= 10 and all(line.startswith("PASS  ") for line in lines)
    assert any("bits per byte of held-out python, merged against base + state file" in line for line in lines)


def test_no_widget_is_saved_in_batch(merged):
    notebook = nbformat.read(merged.notebook, as_version=4)
    assert not notebook.metadata.get("widgets", {})
    assert "stderr" not in {o.get("name") for c in notebook.cells for o in c.get("outputs", [])}


def test_merge_with_parameters_from_another_folder(batch, demo_folder, tmp_path):
    """Relative paths are the caller's, a fine-tune is blended, patterns choose, and the older output is replaced."""
    with open_checkpoint(demo_folder / "demo-base.pth") as ck:
        tensors = {name: ck[name] for name in ck}
    write_checkpoint(tmp_path / "tuned.safetensors", {n: t + 0.01 for n, t in tensors.items()})
    write_checkpoint(tmp_path / "base.pth", tensors)
    (tmp_path / "out.safetensors").write_text("old")
    names = ["-r", "base", "base.pth", "-r", "tuned", "tuned.safetensors", "-r", "out", "out.safetensors"]
    more = ["-y", '{"include": ["blocks.0.*"], "alpha": 5e-1}', "-p", "overwrite", "True"]
    run = batch("merge", *names, *more, cwd=tmp_path)
    assert run.code == 0, run.log
    result = run.result
    assert result["parameters"]["out"] == str(tmp_path / "out.safetensors") and result["parameters"]["alpha"] == 0.5
    assert all(c["passed"] is not False for c in result["checks"])
    assert any(str(c["value"]).startswith("not applicable") for c in result["checks"])
    with open_checkpoint(tmp_path / "out.safetensors") as ck:
        name = "blocks.0.ffn.key.weight"
        torch.testing.assert_close(ck[name], tensors[name] + 0.005)
        assert torch.equal(ck["blocks.1.ffn.key.weight"], tensors["blocks.1.ffn.key.weight"])


def test_dry_run_stops_after_the_plan(batch):
    run = batch("merge", "-p", "dry_run", "True")
    assert run.code == 0, run.log
    assert (run.result["status"], run.result["outputs"], run.result["checks"]) == ("ok", [], [])
    assert run.result["metrics"]["output_bytes"] > 0 and not list(run.folder.glob("*.pth"))
    for cell in ("carry_out", "show_what_moved", "compare_models", "cells.prove"):
        assert run.output_of(cell).startswith("dry_run=True: nothing was merged")


def test_inspect_finds_a_nan_and_a_hostile_name_without_failing(batch, demo_folder, tmp_path):
    with open_checkpoint(demo_folder / "demo-base.pth") as ck:
        tensors = {name: ck[name] for name in ck} | {"<script>alert(1)</script>": torch.tensor([1.0, float("nan")])}
    write_checkpoint(tmp_path / "x.pth", tensors)
    run = batch("inspect", "-r", "checkpoint", str(tmp_path / "x.pth"))
    assert run.code == 0, run.log
    result = run.result
    assert (
        result["status"] == "ok" and result["metrics"]["layout"]["version"] == "7.0" and result["metrics"]["nan"] == 1
    )
    assert {c["name"] for c in result["checks"] if not c["passed"]} == {
        "tensors that the layout does not know",
        "values that are NaN",
    }
    assert "<script>alert" not in (run.folder / "report.html").read_text()
    for cell in json.loads(run.notebook.read_text())["cells"]:
        for output in cell.get("outputs", []):
            assert "<script>alert" not in "".join(output.get("data", {}).get("text/html", ""))
