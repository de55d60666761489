"""The whole way, from a checkpoint and its base to files that were compared; and what is left after an error."""

import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import ONE_LAYER, make_layout, random_tensors, write_model
from tuned_files import write_adapter, write_state

from rwkv_lab import RWKV_Dual, merge
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.errors import (
    CheckpointValidationError,
    FormatExportError,
    ModelMergeError,
    ONNXExportError,
    OutputError,
    ParameterError,
    ValidationError,
)
from rwkv_lab.export import (
    ConfigurationManager,
    OnnxModel,
    onnx_attempts,
    plan_export,
    run,
    run_levels,
    tensorrt_engines,
)
from rwkv_lab.export.__main__ import main
from rwkv_lab.export.attempt import Attempt
from rwkv_lab.export.families.rwkv import Rwkv, RwkvReference
from rwkv_lab.export.validation_tester import ValidationTester


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base and an adapter of it, in a folder."""
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "B.pth", make_layout("7.0", **ONE_LAYER))
    write_adapter(folder / "lora.pth", folder / "B.pth", lora_r=3, lora_alpha=5)
    return folder


def configured(**values):
    return ConfigurationManager(environment={}).resolve(**values)


def test_an_adapter_becomes_a_model_that_runs(files, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setattr(tensorrt_engines, "find_spec", lambda name: None)  # as where it is not installed
    result = run(
        configured(
            **dict(checkpoint_path=files / "lora.pth", base_model_name=str(files / "B.pth"), output_directory=tmp_path),
            **dict(
                naming_pattern="{model_name}-{quantization_level}", test_input_samples=["The quick brown fox. " * 9]
            ),
            **dict(export_tensorrt=True, tensorrt_length="1,4,8"),
        )
    )
    out = tmp_path / "lora-none"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora-none"]
    names = {"export.log", "onnx", "pytorch", "tensorrt", "result.json", "validation.json"}
    assert {path.name for path in out.iterdir()} == names  # and nothing of the work on the way
    merge(files / "B.pth", files / "lora.pth", tmp_path / "M.pth")
    expected = RWKV_Dual.from_pretrained(tmp_path / "M.pth")([[1, 2, 3]])[0].detach().numpy()
    pytorch = RWKV_Dual.from_pretrained(out / "pytorch/lora.pth")([[1, 2, 3]])[0].detach().numpy()
    assert np.array_equal(pytorch, expected)
    assert np.abs(OnnxModel(out / "onnx").run([[1, 2, 3]])[0] - expected).max() < 1e-5 * np.abs(expected).max()

    written = json.loads((out / "result.json").read_text())
    assert result.success and result.validation_passed and written["success"] and written["validation_passed"]
    assert written["pytorch_model_path"] == str(out / "pytorch/lora.pth") and written["onnx_model_path"] == str(
        out / "onnx"
    )
    assert written["tensorrt_model_path"] is written["error_message"] is None
    assert written["inference_speed_ms"] > 0 and written["memory_usage_mb"] > 1
    size = sum(path.stat().st_size for path in (out / "onnx").iterdir())
    assert written["optimized_size_mb"] == size / 1e6
    assert written["size_reduction_percentage"] == pytest.approx(100 * (1 - size / 1e6 / written["original_size_mb"]))
    assert written["configuration"]["base_model_name"] == {"value": str(files / "B.pth"), "from": "argument"}
    assert {"detect", "merge", "optimise", "pytorch", "onnx", "tensorrt", "validate"} == written["seconds"].keys()
    names = [check["name"] for check in written["checks"]]
    assert any("computed tensors" in name for name in names) and any("onnxruntime and torch" in name for name in names)
    assert written["verdict"].startswith("WARN: TensorRT: not built (the package tensorrt is not installed)")
    assert (out / "tensorrt" / json.loads((out / "tensorrt/profiles.json").read_text())["onnx"] / "step.onnx").exists()
    report = json.loads((out / "validation.json").read_text())
    assert max(report["measured"]["errors"].values()) < 1e-5 and report["measured"]["tokens"] == 189
    assert report["verdict"] == "PASS" and report["speed"]["decode_ratio"] > 0 and report["memory"]["files"] > 1e5
    assert report["structure"]["graphs"]["step.onnx"]["opset"] == {"ai.onnx": 20}
    assert report["structure"]["files"]["model.onnx"]["sha256"] and report["measured"]["greedy_prefixes"] == [16]
    assert report["measured"]["greedy_prefix"] == 16 and report["measured"]["kl_percentiles"].keys() >= {"50", "99"}
    assert "merge: " in (out / "export.log").read_text()


def test_a_graph_of_another_model_is_found_out(exported, tmp_path):
    model, folder = exported("7.0")
    changed = random_tensors(model.layout)
    changed["blocks.1.ffn.value.weight"] *= 1.01
    write_checkpoint(tmp_path / "C.safetensors", changed)
    samples = [[*b"Some text, and more of it."]]
    for source, wrong in ((model, False), (RWKV_Dual.from_pretrained(tmp_path / "C.safetensors"), True)):
        tester = ValidationTester(RwkvReference(source, ""), folder, samples)
        found = tester.compare_model_outputs()
        assert (max(found.errors.values()) > 1e-4) == wrong and found.kl_percentiles == {}
        if wrong:
            with pytest.raises(ValidationError, match="do not compute what the model does: .* at .* are .* apart"):
                tester.checks(found)
        else:
            checks = [*tester.test_model_functionality(), *tester.checks(found)]
            assert [check.passed for check in checks if isinstance(check, Check)] == [True] * 5


def test_what_eight_bits_cost_is_measured(exported, tmp_path):
    model, folder = exported("7.0", "int8")
    tester = ValidationTester(RwkvReference(model, ""), folder, [[*b"Some text, and more of it. " * 8]])
    found = tester.compare_model_outputs()
    assert 1e-6 < found.kl_mean < 0.1 and found.kl_mean < found.kl_percentiles["99"] <= found.kl_largest
    assert 0.5 < found.top1 <= 1 and 0.9 < found.perplexity_ratio < 1.1 and found.kl_standard_error > 0
    kinds = [type(check).__name__ for check in (*tester.test_model_functionality(), *tester.checks(found))]
    assert kinds == ["Check", "NotApplicable", "NotApplicable", "Check", "Check"]
    assert found.drift.keys() == {1, 2, 5, 16, 67, 216} and 0 < found.drift[216]["wkv"] < 0.1
    changed = random_tensors(model.layout)
    changed["blocks.2.ffn.value.weight"] *= 3
    write_checkpoint(tmp_path / "C.safetensors", changed)
    other = RWKV_Dual.from_pretrained(tmp_path / "C.safetensors", mode="rnn")
    tester = ValidationTester(RwkvReference(other, ""), folder, tester.samples)
    assert [check.passed for check in tester.checks(tester.compare_model_outputs())[1:]] == [False, False]


def test_speed_and_memory_are_ratios_of_one_run(exported):
    model, folder = exported("7.0", "int8")
    tester = ValidationTester(RwkvReference(model, ""), folder, [[*b"Some text."]])
    speed, memory = tester.benchmark_inference_speed(), tester.measure_memory_usage()
    assert speed.decode_ratio == pytest.approx(speed.torch_decode_ms / speed.decode_ms) and speed.prefill_ms > 0
    assert memory.files == sum(path.stat().st_size for path in folder.iterdir()) and memory.ratio is not None


def pytorch_alone(folder: Path, **values):
    return configured(**dict(output_directory=folder / "out", naming_pattern="it", export_onnx=False) | values)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir()) if (folder / "out").exists() else []


def test_what_the_pytorch_model_holds(files, tmp_path):
    tensors = random_tensors(make_layout("7.0", **ONE_LAYER))
    torch.save({**tensors, "optimizer.exp_avg": torch.ones(3), "step": 5}, tmp_path / "M.pth")
    given = dict(checkpoint_path=tmp_path / "M.pth")
    result = run(pytorch_alone(tmp_path, **given, quantization_level="fp16", pytorch_format="safetensors"))
    assert any("beside its model: 2 things, 12 bytes: optimizer.exp_avg, step" in line for line in result.warnings)
    model = RWKV_Dual.from_pretrained(tmp_path / "out/it/pytorch/M.safetensors")
    assert torch.equal(model.head.weight, tensors["head.weight"].half().float())
    assert 40 < result.size_reduction_percentage < 60
    assert result.validation_passed is None and "not compared" in result.verdict
    result = run(pytorch_alone(tmp_path, **given, quantization_level="int8", compress_weights=False, overwrite=True))
    assert torch.equal(RWKV_Dual.from_pretrained(result.pytorch_model_path).head.weight, tensors["head.weight"])
    assert "M.pth is in the dtype of its checkpoint: compress_weights is False." in result.warnings
    with pytest.raises(ModelMergeError, match="2 things beside the model.*\nremove_training_artifacts=True"):
        run(pytorch_alone(tmp_path, **given, naming_pattern="kept", remove_training_artifacts=False))
    assert left(tmp_path) == ["it", "kept.failed.json"]


def test_a_pytorch_model_in_few_bits(files, tmp_path):
    """And without tensors that no layer reads, all of it named."""
    layout = make_layout("7.0", **ONE_LAYER | {"n_layer": 2})
    unread = {f"blocks.0.att.{n}": torch.ones(s) for n, s in (("v0", (1, 1, 32)), ("v1", (32, 3)), ("v2", (3, 32)))}
    write_checkpoint(tmp_path / "M.pth", {**random_tensors(layout), **unread})
    given = dict(checkpoint_path=tmp_path / "M.pth", optimise_structure=True, overwrite=True)
    for level, kind, stored in (("nf4", "pth", "nf4"), ("int8", "gguf", "Q8_0")):
        result = run(pytorch_alone(tmp_path, **given, quantization_level=level, pytorch_format=kind))
        assert sorted(result.left_out) == sorted(unread) and result.size_reduction_percentage > 40
        with open_checkpoint(result.pytorch_model_path) as ck:
            assert ck.quantised[stored] >= 12 and not unread.keys() & {*ck}
        if level == "nf4":
            assert len(result.storage["nf4"]["tensors"]) == 12 and result.storage["int8"]["tensors"] == ["head.weight"]
            again = pytorch_alone(tmp_path, checkpoint_path=result.pytorch_model_path, naming_pattern="again")
            for job in (run, lambda one: plan_export([one])):
                with pytest.raises(CheckpointValidationError, match="M.pth is packed: .* An export needs weights"):
                    job(again)
            (tmp_path / "out/again.failed.json").unlink()
    with pytest.raises(FormatExportError, match="48 inputs"):
        path = write_model(tmp_path / "48.pth", make_layout("4.0", n_layer=1, n_head=1, head_size=48, vocab_size=256))
        run(pytorch_alone(tmp_path, checkpoint_path=path, quantization_level="int4", naming_pattern="no"))
    assert left(tmp_path) == ["it", "no.failed.json"]


def test_errors_leave_nothing_that_looks_finished(files, tmp_path):
    write_model(tmp_path / "other.pth", make_layout("7.0", **ONE_LAYER | {"n_head": 2}))
    tensors = random_tensors(make_layout("7.0", **ONE_LAYER))
    tensors["head.weight"][0, 0] = 1e6
    write_checkpoint(tmp_path / "large.pth", tensors)
    write_state(tmp_path / "state.pth", files / "B.pth")
    lora = files / "lora.pth"
    cases = [
        (dict(checkpoint_path=tmp_path / "no.pth"), CheckpointValidationError, "there is no file"),
        (dict(checkpoint_path=lora), ModelMergeError, "of kind lora, no whole model.\nGive .* base_model_name"),
        (dict(checkpoint_path=lora, base_model_name="no.pth"), ModelMergeError, "base_model_name: there is no"),
        (dict(checkpoint_path=lora, base_model_name=str(tmp_path / "other.pth")), ModelMergeError, "lora"),
        (dict(checkpoint_path=tmp_path / "state.pth", base_model_name=str(lora)), ModelMergeError, "no model of a fam"),
        (dict(checkpoint_path=tmp_path / "large.pth", quantization_level="fp16"), FormatExportError, "head.weight"),
    ]
    for values, error, says in cases:
        with pytest.raises(error, match=says):
            run(pytorch_alone(tmp_path, **values))
        assert left(tmp_path) in ([], ["it.failed.json"]), values
    failed = json.loads((tmp_path / "out/it.failed.json").read_text())
    assert failed["success"] is False and failed["error_message"].startswith("FormatExportError: ")
    assert failed["pytorch_model_path"] is None and failed["verdict"].startswith("FAIL: FormatExportError")
    run(pytorch_alone(tmp_path, checkpoint_path=files / "B.pth"))
    assert left(tmp_path) == ["it"]  # what an earlier try left to say is out of date


KILLED = """
import os, signal, sys
from rwkv_lab.export import ConfigurationManager, run_levels
from rwkv_lab.export.families.rwkv import Rwkv

def killed(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

write, Rwkv.write_pytorch = Rwkv.write_pytorch, killed
base, lora, out = sys.argv[1:]
given = dict(checkpoint_path=lora, base_model_name=base, output_directory=out, export_onnx=False)
levels = dict(quantization_level="none,int8", naming_pattern="it-{quantization_level}")
list(run_levels(ConfigurationManager(environment={}).resolve_levels(**given, **levels)))
"""


def test_a_killed_export_leaves_nothing_that_looks_finished(files, tmp_path):
    words = [sys.executable, "-c", KILLED, str(files / "B.pth"), str(files / "lora.pth"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = left(tmp_path)  # of the first export, and of the merge that all of them share
    assert [name.split(".")[1] for name in names] == ["it-none", "merged"]
    assert all(name.endswith(".rwkv_lab-partial") for name in names)
    theirs = tmp_path / "out/.merged-of-mine"
    theirs.mkdir()
    run(pytorch_alone(tmp_path, checkpoint_path=files / "B.pth", naming_pattern="it-none"))
    assert left(tmp_path) == [".merged-of-mine", "it-none"]


def test_two_exports_at_once(files, tmp_path):
    given = dict(checkpoint_path=files / "B.pth", naming_pattern="{model_name}_{timestamp}")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: run(pytorch_alone(tmp_path, **given)), range(2)))
    assert len(left(tmp_path)) == 2 and len({result.export_id for result in results}) == 2
    for result in results:
        assert (Path(result.pytorch_model_path).parents[1] / "result.json").read_text() == result.as_json()


def test_two_exports_of_one_name_at_once(files, tmp_path):
    """One is there, whole; the other is refused, or replaces it where it may."""

    def export(number: int, **values):
        try:
            return run(pytorch_alone(tmp_path, checkpoint_path=files / "B.pth", **values))
        except OutputError as e:
            return e

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(export, range(2)))
        refused = [one for one in found if isinstance(one, OutputError)]
        assert len(refused) == 1 and "it exists. Choose another output" in str(refused[0])
        found = list(pool.map(lambda number: export(number, overwrite=True), range(2)))
    written = json.loads((tmp_path / "out/it/result.json").read_text())
    assert written["export_id"] in {result.export_id for result in found} and left(tmp_path) == ["it"]


def test_a_full_disk_leaves_nothing_but_why(files, tmp_path):
    """A limit on the size of files refuses a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write \S+/out/it/pytorch/B.pth: File too large; nothing"):
            run(pytorch_alone(tmp_path, checkpoint_path=files / "B.pth"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(tmp_path) == ["it.failed.json"]


def test_errors_name_folders_as_they_will_be(files, tmp_path, monkeypatch):
    """Not as they are called while they are made."""
    final = tmp_path / "out/it/onnx"

    def fails(work, asked, folder, most, limit, attempts):
        assert folder != final
        says = f"cannot write {folder.with_name('.onnx.0123456789ab.rwkv_lab-partial')}/model.onnx: No space left"
        attempts.append(Attempt({}, "as asked for", error=says))
        raise ONNXExportError(says)

    monkeypatch.setattr(onnx_attempts, "write_with_recovery", fails)
    expected = f"cannot write {final}/model.onnx: No space left"
    with pytest.raises(ONNXExportError) as caught:
        run(pytorch_alone(tmp_path, checkpoint_path=files / "B.pth", export_pytorch=False, export_onnx=True))
    failed = json.loads((tmp_path / "out/it.failed.json").read_text())
    assert str(caught.value) == failed["attempts"][0]["error"] == expected
    assert failed["verdict"] == f"FAIL: ONNXExportError: {expected}"


def test_an_adapter_that_does_not_say_its_base_is_named_in_the_verdict(files, tmp_path):
    result = run(pytorch_alone(tmp_path, checkpoint_path=files / "lora.pth", base_model_name=str(files / "B.pth")))
    silent = "lora.pth does not say on which base it was trained"
    assert result.verdict.startswith("WARN: ") and silent in result.verdict
    result.validation_passed = None
    assert result.verdict.startswith("WARN: exported, and not compared with the model. ") and silent in result.verdict
    assert silent in json.loads((tmp_path / "out/it/result.json").read_text())["verdict"]


def test_several_levels_are_merged_once(files, tmp_path, monkeypatch):
    merged, merge_once = [], Rwkv.merge
    monkeypatch.setattr(Rwkv, "merge", lambda *arguments: merged.append(1) or merge_once(*arguments))
    given = dict(checkpoint_path=files / "lora.pth", base_model_name=str(files / "B.pth"), export_onnx=False)
    given |= dict(output_directory=tmp_path / "out", naming_pattern="it", quantization_level=["none", "fp16"])
    configurations = ConfigurationManager(environment={}).resolve_levels(**given)
    first, second = run_levels(configurations)
    assert left(tmp_path) == ["it-fp16", "it-none"] and len(merged) == 1
    exact, half = (RWKV_Dual.from_pretrained(result.pytorch_model_path).head.weight for result in (first, second))
    assert torch.equal(exact.half().float(), half) and first.checks == second.checks and first.validation_passed
    other = configurations[1].changed(base_model_name="")
    with pytest.raises(ParameterError, match="different models"):
        run_levels([configurations[0], other])
    with pytest.raises(OutputError, match="it-none exists"):
        list(run_levels(configurations))
    assert left(tmp_path) == ["it-fp16", "it-none", "it-none.failed.json"]


def test_folders_that_are_not_written_to(files, tmp_path):
    given = dict(checkpoint_path=files / "B.pth")
    run(pytorch_alone(tmp_path, **given))
    before = (tmp_path / "out/it/result.json").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        run(pytorch_alone(tmp_path, **given))
    assert (tmp_path / "out/it/result.json").read_bytes() == before
    again = run(pytorch_alone(tmp_path, **given, overwrite=True))
    assert json.loads((tmp_path / "out/it/result.json").read_text())["export_id"] == again.export_id
    inside = dict(checkpoint_path=tmp_path / "out/it/pytorch/B.pth", overwrite=True)
    with pytest.raises(OutputError, match="holds the checkpoint"):
        run(pytorch_alone(tmp_path, **inside))
    assert (tmp_path / "out/it/pytorch/B.pth").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        run(pytorch_alone(tmp_path, **given, output_directory=tmp_path / "file/out"))


def test_from_a_command_line(files, tmp_path, capsys, monkeypatch):
    text = f"export: {{checkpoint: {{path: {files / 'B.pth'}}}, formats: {{onnx: false}}}}"
    (tmp_path / "export.yaml").write_text(text)
    monkeypatch.setenv("EXPORT_OUTPUT_DIR", str(tmp_path / "out"))
    words = ["--config", str(tmp_path / "export.yaml"), "--naming-pattern", "it"]
    assert main(words) == 0 and left(tmp_path) == ["it"]
    where = tmp_path / "out/it/pytorch/B.pth"  # nothing is left to compare in a file that is written alone
    assert capsys.readouterr().out.splitlines()[-1] == f"WARN: exported, and not compared with the model: {where}"
    assert main(words) == 1
    assert "OutputError: " in capsys.readouterr().err
