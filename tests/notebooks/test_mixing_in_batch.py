"""merge.ipynb mixes several models: lists and mappings through papermill, figures and report as for every merge."""

import json

import pytest

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint


@pytest.fixture
def models(demo_folder, tmp_path) -> list[str]:
    with open_checkpoint(demo_folder / "demo-base.pth") as ck:
        tensors = {name: ck[name] for name in ck}
    write_checkpoint(tmp_path / "base.pth", tensors)
    for i in (1, 2):
        write_checkpoint(tmp_path / f"t{i}.pth", {n: t * (1 + 0.01 * i) for n, t in tensors.items()})
    return [str(tmp_path / n) for n in ("base.pth", "t1.pth", "t2.pth")]


def test_ties_of_two_models(batch, models):
    base, *tuned = models
    given = {"base": base, "tuned": tuned, "method": "ties", "weights": [1, 0.5], "parameters": {"density": 0.5}}
    run = batch("merge", "-y", json.dumps(given))
    assert run.code == 0, run.log
    result = run.result
    assert result["parameters"]["tuned"] == tuned and result["metrics"]["method"] == "ties"
    assert all(c["passed"] is not False for c in result["checks"]) and len(result["inputs"]) == 3
    assert {f.name for f in run.folder.glob("*.png")} >= {"what_moved.png", "deltas.png", "bits_per_byte.png"}
    report = (run.folder / "report.html").read_text()
    assert "of each model&#39;s delta only the largest values" in report and "logit of the decay rate" in report
    assert "no file that could be loaded instead" in report


def test_a_parameter_that_the_method_does_not_take_fails(batch, models):
    given = {"base": models[0], "tuned": models[1], "method": "slerp", "parameters": {"density": 0.5}}
    run = batch("merge", "-y", json.dumps(given))
    assert run.code != 0 and run.result["error"]["class"] == "ParameterError"
    assert "takes no parameter 'density'" in run.result["error"]["message"]
