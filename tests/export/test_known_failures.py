"""Failures that still occur on today's packages: provoked, and recovered from or refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from known_failures import ASKED, MODELS
from warm_python import MORE

from rwkv_lab.errors import ONNXExportError, TracerWarningError, UnorderedMapError
from rwkv_lab.export.attempt import Attempt, Work
from rwkv_lab.export.diagnosis import LOSSES, diagnose
from rwkv_lab.export.recovery import write_with_recovery

DIAGNOSED = {  # the failure that each model stands for, and what is raised where its fix is not possible
    "gradient checkpointing": ("TorchScript and what it cannot trace", UnorderedMapError),
    "branch on a value": ("branch on a value", TracerWarningError),
    "example of one token": ("example of one token", TracerWarningError),
    "operator": ("operator without a translation", ONNXExportError),
    "cache": ("cache as an object", ONNXExportError),
    "bfloat16": ("bfloat16", ONNXExportError),
    "rotary embedding": ("RotaryEmbedding of opset 23", ONNXExportError),
}
REFUSED = {"branch on a value", "operator"}  # no setting helps


@pytest.fixture(scope="module")
def found(tmp_path_factory, warm) -> dict:
    """What happened, by model, in a process of its own: tracing leaves much behind in torch."""
    for package in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    script = Path(__file__).with_name("known_failures.py")
    path = [str(script.parents[2]), *sys.path]
    words = [
        warm.python,
        "-c",
        f"import sys, runpy; sys.path[:] = {path!r}; runpy.run_path({str(script)!r}, run_name='__main__')",
    ]
    done = subprocess.run(
        [*words, str(tmp_path_factory.mktemp("failures")), *DIAGNOSED],
        capture_output=True,
        text=True,
        env=warm.environment | {MORE: "exporting"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("which", DIAGNOSED)
def test_a_failure_of_today(which, found):
    text, errors = found[which]["text"], found[which]["errors"]
    failure = diagnose(text, ASKED | MODELS[which][1])
    assert failure, f"{which} is not recognised, or does not fail any more: {text or errors}"
    assert (failure.name, failure.error) == DIAGNOSED[which]
    if which in REFUSED:
        assert errors is None and not failure.fix
    else:
        assert max(errors) < 1e-5, errors


def test_recovery_from_two_failures_of_today(tmp_path, found, warm_children):
    """A loop of Python: torch's old exporter writes it for one length, its new one refuses, fixed sizes are left."""
    attempts: list[Attempt] = []
    work = Work("known_failures:write", {"which": "loop"})
    asked = ASKED | MODELS["loop"][1]
    errors = write_with_recovery(work, asked, tmp_path / "out", 5, 600.0, attempts)
    assert max(errors) < 1e-5 and (tmp_path / "out/model.onnx").exists()
    changes = [{n: v for n, v in one.settings.items() if asked[n] != v} for one in attempts]
    assert changes == [{}, {"onnx_exporter": "dynamo"}, {"onnx_exporter": "dynamo", "onnx_dynamic_axes": False}]
    assert attempts[-1].lost == [LOSSES["onnx_dynamic_axes", False]]
    causes = ["torch's old exporter wrote a size of its example into the graph", "the model's code, or torch's"]
    assert [one.diagnosis.startswith(cause) for one, cause in zip(attempts, causes, strict=False)] == [True, True]
    assert attempts[0].error == "TracerWarningError: the length of y is fixed at 5; it must be any."
