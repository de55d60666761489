"""Profiles: by size and by what earlier exports ended in; what they set is shown."""

import json

import pytest
from random_models import ONE_LAYER, make_layout, write_model

from rwkv_lab.checks import Check
from rwkv_lab.errors import ONNXExportError, ParameterError
from rwkv_lab.export import ConfigurationManager, ExportConfiguration, ExportResult, run
from rwkv_lab.export.profiles import PROFILES, choose_profile, earlier_failures


def configured(**values):
    return ConfigurationManager(environment={}).resolve(checkpoint_path="B.pth", **values)


def test_a_profile_sets_what_was_not_given():
    found = configured(profile="conservative", max_attempts=7)
    assert found.onnx_optimize_graph is False and found.use_external_data_format is True and found.max_attempts == 7
    origins = found.origins
    assert origins["onnx_optimize_graph"] == origins["attempt_time_limit"] == "profile"
    assert origins["max_attempts"] == origins["profile"] == "argument" and origins["log_level"] == "default"
    assert "onnx_optimize_graph = False  (profile)" in found.described()
    assert found.with_profile("aggressive").attempt_time_limit == 1800 and found.attempt_time_limit == 7200
    given = configured(profile="conservative", onnx_optimize_graph=True)
    assert given.onnx_optimize_graph is True and given.origins["onnx_optimize_graph"] == "argument"
    assert configured().onnx_optimize_graph is True  # "auto" is settled when the model is known
    with pytest.raises(ParameterError, match="profile"):
        configured(profile="brave")
    with pytest.raises(ParameterError, match="name"):
        found.with_profile("brave")
    assert all(values.keys() <= ExportConfiguration.model_fields.keys() for values in PROFILES.values())


def test_by_size_and_by_earlier_errors():
    named = {
        (size, failures): choose_profile(size, failures)[0] for size in (10**6, 10**9, 10**10) for failures in (0, 1, 2)
    }
    assert [named[10**6, n] for n in (0, 1, 2)] == ["aggressive", "balanced", "conservative"]
    assert [named[10**9, n] for n in (0, 1, 2)] == ["balanced", "conservative", "conservative"]
    assert named[10**10, 0] == "conservative"
    assert choose_profile(834_000, 1)[1] == "0.8 million parameters, 1 earlier exports with a failed attempt"


def test_errors_are_read_from_earlier_results(tmp_path):
    def write(name, checkpoint, *errors, **other):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        result = {"configuration": {"checkpoint_path": {"value": str(checkpoint)}}}
        path.write_text(json.dumps(result | {"attempts": [{"error": error} for error in errors]} | other))

    B = tmp_path / "B.pth"
    assert earlier_failures(tmp_path / "none", B) == earlier_failures(tmp_path, B) == 0
    write("one.failed.json", B, "ONNXExportError: a", "ONNXExportError: b")
    write("two/result.json", B, "ONNXExportError: a", None)
    write("three/result.json", B, None)
    write("four.failed.json", tmp_path / "C.pth", "ONNXExportError: a")
    write("five.failed.json", B)  # it failed before the graphs
    write("six.failed.json", B, attempts=3)
    (tmp_path / "seven.failed.json").write_text("[")
    (tmp_path / "eight.failed.json").write_text("[1]")
    assert earlier_failures(tmp_path, B) == 2


def test_an_export_states_its_profile_and_its_attempts(tmp_path):
    write_model(tmp_path / "B.pth", make_layout("7.0", **ONE_LAYER))
    given = dict(checkpoint_path=tmp_path / "B.pth", output_directory=tmp_path / "out", export_onnx=False)
    limits = dict(export_onnx=True, attempt_time_limit=0.01, max_attempts=2, naming_pattern="hurried")
    with pytest.raises(ONNXExportError, match="2 attempts failed; the first: .* did not end within 0.01 seconds"):
        run(ConfigurationManager(environment={}).resolve(**given | limits))
    failed = json.loads((tmp_path / "out/hurried.failed.json").read_text())
    assert [one["why"] for one in failed["attempts"]] == [
        "as asked for",
        "the cause is not known: use_external_data_format = True",
    ]
    assert failed["configuration"]["max_attempts"] == {"value": 2, "from": "argument"}
    result = run(ConfigurationManager(environment={}).resolve(**given, naming_pattern="it"))
    found = json.loads((tmp_path / "out/it/result.json").read_text())["configuration"]
    why = "auto: 0.0 million parameters, 1 earlier exports with a failed attempt"
    assert found["profile"] == {"value": "balanced", "from": why} == result.configuration["profile"]
    assert found["max_attempts"] == {"value": 5, "from": "profile"}
    result = run(ExportConfiguration(**given, naming_pattern="other", profile="aggressive"))
    assert result.configuration["profile"] == {"value": "aggressive", "from": "argument"}
    assert result.configuration["max_attempts"] == {"value": 9, "from": "profile"}


def test_a_degraded_result_says_so():
    lost = ["opset 22, not 23 as asked for"]
    assert ExportResult("", "", True, validation_passed=True, degraded=lost).verdict == f"DEGRADED: {lost[0]}"
    assert ExportResult("", "", False, error_message="it ended", degraded=lost).verdict == "FAIL: it ended"
    not_compared = ExportResult("", "", True, degraded=lost)
    assert not_compared.verdict == f"DEGRADED: {lost[0]}; exported, and not compared with the model"
    failed = [Check("merged", 0, 0, True), Check("mean KL", 1.0, 0.5, False), Check("top-1", 0.1, 0.9, False)]
    wrong = ExportResult("", "", True, validation_passed=False, degraded=lost, checks=failed)
    assert wrong.verdict == f"FAIL: mean KL; degraded: {lost[0]}"
