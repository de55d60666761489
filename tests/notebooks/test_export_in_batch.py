"""export.ipynb in batch: several levels from a YAML file with an adapter, the demo, and what is refused."""

import json

import pytest
from tuned_files import write_adapter

from rwkv_lab.train import train

pytestmark = pytest.mark.usefixtures("packages")


@pytest.fixture(scope="module")
def packages():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")


FILE = """
export:
  checkpoint: {{path: {lora}}}
  base_model: {{name: {base}}}
  formats: {{pytorch_format: safetensors}}
  optimization: {{quantization_level: [none, int8]}}
  validation: {{test_input_samples: 1}}
  output: {{directory: exports, naming_pattern: "{{model_name}}-{{quantization_level}}"}}
"""


def test_a_configuration_with_an_adapter_and_several_levels(batch, tmp_path):
    """Of one layer: each level is traced in a process of its own, which takes seconds."""
    base = tmp_path / "demo-base.pth"
    train("pretrain", base, n_embd=32, n_layer=1, head_size=16, steps=2, batch_size=2, ctx_len=64)
    write_adapter(tmp_path / "lora.pth", base, size=0.01, lora_r=2, lora_alpha=2)
    text = FILE.format(lora=tmp_path / "lora.pth", base=base)
    (tmp_path / "export.yaml").write_text(text)
    run = batch("export", "-r", "config", "export.yaml", "-p", "onnx_opset_version", "21", cwd=tmp_path,
                variables={"EXPORT_MODEL_NAME": "mine", "EXPORT_TEST_INPUT_SAMPLES": "2"})  # fmt: skip
    assert run.code == 0, run.log
    result, metrics = run.result, run.result["metrics"]
    assert (result["status"], result["error"], metrics["kind"]) == ("ok", None, "lora")
    assert [f["path"] for f in result["inputs"]] == [str(base), str(tmp_path / "lora.pth")]
    outputs = ["mine-none/pytorch/mine.safetensors", "mine-none/onnx", "mine-int8/onnx"]
    assert [f["path"] for f in result["outputs"]] == [str(tmp_path / "exports" / name) for name in outputs]
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["mine-int8", "mine-none"]
    configuration = metrics["configuration"]
    assert configuration["onnx_opset_version"] == {"value": 21, "from": "parameter"}
    assert configuration["model_name"] == {"value": "mine", "from": "EXPORT_MODEL_NAME"}
    assert configuration["test_input_samples"] == {"value": 2, "from": "EXPORT_TEST_INPUT_SAMPLES"}
    assert configuration["pytorch_format"] == {"value": "safetensors", "from": "export.yaml"}
    assert configuration["alpha"] == {"value": None, "from": "default"}

    assert metrics["exports"].keys() == {"none", "int8"} and metrics["exports"]["int8"]["measured"]["kl_mean"] > 0
    assert metrics["exports"]["none"]["peak_disk"] > 100_000 and metrics["exports"]["int8"]["inference_speed_ms"] > 0
    assert (
        metrics["summary"].startswith("Exported float32, int8; the smallest is int8, ")
        and "nats per token" in metrics["summary"]
    )
    assert all(check["passed"] is not False for check in result["checks"])
    names = [check["name"] for check in result["checks"]]
    assert len(names) == len(set(names)) and any(name.startswith("int8: mean KL") for name in names)
    assert {"sizes.png", "agreement.png", "speed.png", "monitoring.png"} < {path.name for path in run.folder.iterdir()}
    report = (run.folder / "report.html").read_text().replace("&#34;", '"')
    for shown in (
        "EXPORT_MODEL_NAME",
        "written with level none",
        'OnnxModel("mine-int8/onnx")',
        "lora.pth merged into demo-base.pth",
    ):
        assert shown in report
    assert str(tmp_path) not in report
    verdicts = run.output_of("cells.prove").splitlines()
    assert len(verdicts) == len(names) and all(line.startswith(("PASS  ", "n/a  ")) for line in verdicts)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (["-r", "config", "wrong.yaml"], "ParameterError", "did you mean quantization_level?"),
        (["-r", "checkpoint_path", "lora.pth"], "ModelMergeError", "base_model_name"),
    ],
)
def test_what_is_wrong_is_refused(batch, demo_folder, tmp_path, given, error, says):
    write_adapter(tmp_path / "lora.pth", demo_folder / "demo-base.pth", lora_r=2)
    (tmp_path / "wrong.yaml").write_text("export: {optimization: {quantisation_level: int8}}")
    run = batch("export", *given, "-r", "output_directory", "out", cwd=tmp_path)
    assert run.code == 1 and says in run.log, run.log
    result = json.loads((run.folder / "result.json").read_text())
    assert result["status"] == "failed" and result["error"]["class"] == error and says in result["error"]["message"]
    assert not (tmp_path / "out").exists() and result["outputs"] == []
