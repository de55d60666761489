"""benchmark.ipynb in batch, on the tiny demo model: it ends well, and a wrong parameter ends it before any work."""

import json

import pytest

from rwkv_lab.bench.speed import LIMITS

SMALL = {"lengths": [8], "batches": [1, 2], "dtypes": ["fp32"], "backends": ["chunked"], "peers": [], "rounds": 1}


def test_benchmark(batch):
    run = batch("benchmark", "-y", json.dumps(SMALL))
    assert run.code == 0, run.log
    result = run.result
    assert (result["status"], result["error"]) == ("ok", None)
    rows = result["metrics"]["rows"]
    assert {row["job"] for row in rows} >= {"decode", "prefill", "wkv forward", "wkv backward", "load", "growth decode"}
    assert all(row["samples"] for row in rows), [row["problem"] for row in rows]
    assert all(check["passed"] for check in result["checks"]) and result["metrics"]["machine"]["threads"] == 1
    assert {check["limit"] for check in result["checks"]} >= {LIMITS["fp32"]}
    report = (run.folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == len(result["figures"]) == 5
    assert str(run.folder.parent) not in report
    verdicts = run.output_of("cells.show_verdict").splitlines()
    assert len(verdicts) == len(result["checks"]) and all(line.startswith("PASS  ") for line in verdicts)


@pytest.mark.parametrize(
    ("given", "says"), [({"peers": ["rwkv.cpp"]}, "rwkv.cpp"), ({"lenghts": [8]}, "did you mean lengths?")]
)
def test_wrong_parameters_are_refused(batch, given, says):
    run = batch("benchmark", "-y", json.dumps(SMALL | given))
    assert run.code == 1 and run.result["status"] == "failed"
    assert run.result["error"]["class"] == "ParameterError" and says in run.result["error"]["message"]
