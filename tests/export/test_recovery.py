"""Errors of an export are diagnosed, and tried again only with what can help, each time in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failing_exports import TEXTS

from rwkv_lab.errors import DeviceError, ONNXExportError, OutputError, TracerWarningError, UnorderedMapError
from rwkv_lab.export.attempt import Attempt, Work
from rwkv_lab.export.diagnosis import FAILURES, LADDER, LOSSES, SETTINGS, diagnose, last_resorts
from rwkv_lab.export.recovery import write_with_recovery

ALL = {  # what a writer may be asked for, so that each change is one
    "onnx_exporter": "legacy",
    "attention_implementation": "sdpa",
    "onnx_optimize_graph": True,
    "onnx_opset_version": 23,
    "use_external_data_format": None,
    "device": "cuda",
    "onnx_dynamic_axes": True,
    "example_length": 1,
    "cache_as_tensors": False,
    "example_dtype": "bfloat16",
}


def recover(function, settings, folder, most=9, limit=60.0, **keywords) -> list[Attempt]:
    """The attempts; with an error they are its `attempts`."""
    attempts: list[Attempt] = []
    work = Work(f"failing_exports:{function}", keywords)
    folder.mkdir(exist_ok=True)
    try:
        write_with_recovery(work, settings, folder / "out", most, limit, attempts)
    except Exception as e:
        e.attempts = attempts  # pyright: ignore[reportAttributeAccessIssue]
        raise
    return attempts


@pytest.mark.parametrize("which", TEXTS)
def test_the_one_fix_that_can_work(which, tmp_path, warm_children):
    text, remedy = TEXTS[which]
    settings = ALL | ({"example_length": 5, "onnx_exporter": "dynamo"} if which == "static" else {})
    first, second = recover("by_text", settings, tmp_path, which=which)
    assert first.error == f"ONNXExportError: RuntimeError: {text}" and first.diagnosis and first.lost == []
    assert second.error is None and second.settings == settings | remedy
    assert second.why.startswith(first.diagnosis) and first.seconds > 0
    made = (tmp_path / "out/made-with").read_text()
    assert made.splitlines()[-1] not in ("", str(os.getpid()))  # another process
    lost = {"rotary": ["opset 22, not 23 as asked for"], "static": [LOSSES["onnx_dynamic_axes", False]]}
    assert second.lost == lost.get(which, [])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["made-with"]  # nothing of the first attempt


def test_a_folder_that_is_there_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(OutputError, match="out exists") as caught:
        recover("by_text", ALL, tmp_path, which="static")
    assert caught.value.attempts == [] and (tmp_path / "out/mine").read_text() == "mine"


@pytest.mark.parametrize("which", ["unordered_map", "cache", "rotary", "protobuf", "memory of a GPU", "static"])
def test_a_writer_that_has_no_such_setting(which, tmp_path, warm_children):
    text, remedy = TEXTS[which]
    settings = {name: value for name, value in ALL.items() if name not in remedy} | {"example_length": 5}
    if which == "static":
        settings["onnx_exporter"] = "dynamo"
    failure = diagnose(text, settings)
    with pytest.raises(failure.error) as e:
        recover("by_text", settings, tmp_path, which=which)
    assert len(e.value.attempts) == 1 and not (tmp_path / "out").exists()
    assert str(e.value) == f"RuntimeError: {text}\nThe cause: {failure.cause}.\n{failure.advice}"


def test_causes_that_nothing_helps_against(tmp_path, warm_children):
    cases = {
        "operator": (ONNXExportError, "aten._linalg_eigh\nThe cause: ONNX has no translation of an operator.\nReplace"),
        "kill": (DeviceError, r"killed by signal 9 \(SIGKILL\).*\nThe cause: memory ran out, or .*\nEnd other"),
        "refuse": (OutputError, "^there is no space on the disk.$"),
    }
    for how, (error, says) in cases.items():
        with pytest.raises(error, match=says) as e:
            recover("until", ALL | {"onnx_exporter": "dynamo"}, tmp_path, name="no", value=1, how=how)
        assert len(e.value.attempts) == 1 and e.value.attempts[0].error, how


def test_each_named_error_has_a_cause_and_every_fix_a_setting():
    assert {one.error for one in FAILURES} >= {UnorderedMapError, TracerWarningError, ONNXExportError, DeviceError}
    for one in FAILURES:
        assert {*one.fix, *one.when} <= {*SETTINGS} and one.advice.endswith(".")
    assert all(rung.change.keys() <= {*SETTINGS} for rung in LADDER)
    assert diagnose("unordered_map::at", {}).error is UnorderedMapError
    unsupported = "Exporting the operator 'aten::linalg_eigvalsh' to ONNX opset version 20 is not supported"
    assert diagnose(unsupported, {"onnx_exporter": "legacy"}).fix == {"onnx_exporter": "dynamo"}
    assert diagnose(unsupported, {"onnx_exporter": "dynamo"}).fix == {}
    assert diagnose("GuardOnDataDependentSymNode: u0 > 0", {}).error is TracerWarningError


def test_the_ladder_of_last_resort(tmp_path, warm_children):
    attempts = recover("until", ALL, tmp_path, name="onnx_dynamic_axes", value=False, how="raise")
    changes = [{n: v for n, v in one.settings.items() if ALL[n] != v} for one in attempts]
    assert changes == [
        {},
        {"attention_implementation": "eager"},
        {"onnx_exporter": "dynamo"},
        {"use_external_data_format": True},
        {"device": "cpu"},
        {"onnx_optimize_graph": False},
        {"onnx_opset_version": 20},
        {"onnx_opset_version": 18},
        {"onnx_dynamic_axes": False},  # the old exporter was asked for, and sdpa
    ]
    assert attempts[-1].lost == [LOSSES["onnx_dynamic_axes", False]]
    assert attempts[5].why == "the cause is not known: onnx_optimize_graph = False"
    small = {"onnx_opset_version": 20, "onnx_optimize_graph": True}
    assert list(last_resorts("This is step 1/3: TorchExportError", small)) == []  # neither is reached before it fails
    with pytest.raises(ONNXExportError, match="ValueError: what was never seen") as e:
        recover("until", small, tmp_path / "small", name="no", value=1, how="raise")
    assert [one.settings["onnx_opset_version"] for one in e.value.attempts] == [20, 20, 18]
    assert "3 attempts failed; the first: ONNXExportError: ValueError" in str(e.value)
    assert len(str(e.value).splitlines()) <= 3
    with pytest.raises(ONNXExportError) as e:
        recover("until", small, tmp_path / "less", most=2, name="no", value=1, how="raise")
    assert len(e.value.attempts) == 2


@pytest.mark.parametrize("how", ["crash", "exit"])
def test_processes_that_end_without_an_answer(how, tmp_path, warm_children):
    settings = {"onnx_optimize_graph": True, "onnx_opset_version": 20}
    first, second = recover("until", settings, tmp_path, name="onnx_optimize_graph", value=False, how=how)
    says = {"crash": "killed by signal 11 (SIGSEGV)", "exit": "exit code 3"}
    assert says[how] in first.error and first.diagnosis is None
    assert second.error is None and second.lost == ["the graph is not optimised"]


def test_a_process_that_hangs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for limit in (2.0, 8.0, 32.0):  # on a busy machine it does not get as far as to hang
        with pytest.raises(ONNXExportError, match=f"did not end within {limit:g} seconds"):
            recover("until", {"x": 0}, tmp_path, most=1, limit=limit, name="x", value=1, how="hang")
        if (tmp_path / "hung.pid").exists():
            break
    assert ends(int((tmp_path / "hung.pid").read_text()))  # what it had started, too


PARENT = """
import sys
from pathlib import Path
from rwkv_lab.export.attempt import Work
from rwkv_lab.export.recovery import write_with_recovery
sys.path.append(sys.argv[1])
work = Work("failing_exports:until", {"name": "x", "value": 1, "how": "wait"})
write_with_recovery(work, {"x": 0}, Path(sys.argv[2]), 1, 300, [])
"""


def test_an_attempt_ends_with_the_process_that_asked_for_it(tmp_path):
    here = Path(__file__)
    words = [sys.executable, "-c", PARENT, str(here.parent), str(tmp_path / "out")]
    parent = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(here.parents[2])})
    while not (pid := tmp_path / "attempt.pid").exists() or not pid.read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ends(int(pid.read_text()))


def ends(pid: int) -> bool:
    """Whether a process is gone, or is within ten seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
