"""convert.ipynb in batch: the demo model for transformers, a quantised GGUF, an adapter, a state, a failure."""

import json

import pytest
from hub_stand_in import TOKEN, hub_stand_in
from tuned_files import write_adapter

from rwkv_lab.checkpoint import open_checkpoint


def test_convert_on_its_defaults(batch, demo_folder):
    run = batch("convert")
    assert run.code == 0, run.log
    result = run.result
    assert (result["status"], result["error"], result["metrics"]["kind"]) == ("ok", None, "model")
    assert len(result["checks"]) == 8 and all(c["passed"] for c in result["checks"])
    assert [f["path"] for f in result["inputs"]] == [str(demo_folder / "demo-base.pth")]
    assert "logits are equal to the last bit; same greedy tokens." in result["metrics"]["summary"]
    assert result["metrics"]["summary"] in run.notebook.read_text()
    assert {path.name for path in run.folder.iterdir()} == {
        "converted",
        "key_map.csv",
        "logits.png",
        "report.html",
        "result.json",
    }
    report = (run.folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 1 and str(run.folder.parent) not in report
    assert "AutoModelForCausalLM.from_pretrained" in report and 'from_pretrained("' in run.output_of("cells.show_use")
    verdicts = run.output_of("cells.prove").splitlines()
    assert len(verdicts) == 8 and all(line.startswith("PASS  ") for line in verdicts)


def test_a_quantised_gguf_from_another_folder(batch, demo_folder, tmp_path):
    pytest.importorskip("gguf", reason="the PyPI package gguf is not installed")
    (tmp_path / "B.pth").write_bytes((demo_folder / "demo-base.pth").read_bytes())
    run = batch("convert", "-r", "source", "B.pth", "-p", "to", "gguf", "-p", "dtype", "Q8_0", "-p", "out", "B.gguf",
                cwd=tmp_path)  # fmt: skip
    assert run.code == 0, run.log
    assert run.result["metrics"]["summary"].startswith("Converted to GGUF Q8_0: ")
    with open_checkpoint(tmp_path / "B.gguf") as ck:
        assert ck.foreign_format.name == "gguf-rwkv7" and ck.quantised["Q8_0"] > 0


def test_an_adapter_and_a_state(batch, demo_folder, tmp_path):
    write_adapter(tmp_path / "lora.pth", demo_folder / "demo-base.pth", lora_r=2)
    run = batch("convert", "-r", "source", str(tmp_path / "lora.pth"), "-p", "to", "fla", "-r", "generation", "7.0")
    assert run.code == 0 and run.result["metrics"]["kind"] == "lora", run.log
    with open_checkpoint(run.folder / "converted") as ck:
        assert ck.kind == "lora" and ck.adapter_config["peft_type"] == "LORA"
    assert run.output_of("cells.compare_models").startswith("A lora does not run by itself")
    run = batch("convert", "-r", "source", "demo:state", "-p", "to", "safetensors")
    assert run.code == 0 and run.result["metrics"]["kind"] == "state", run.log


def test_from_the_hub_and_to_it(batch, demo_folder, tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with hub_stand_in() as hub:
        hub.add("me/models", {"B.pth": (demo_folder / "demo-base.pth").read_bytes(), "C.pth": b"x"}, private=True)
        variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        given = ["-r", "repo_id", "me/models", "-r", "file", "B.pth", "-p", "push_to_hub", "True"]
        run = batch("convert", *given, "-r", "model_name", "me/new", "-r", "licence", "mit", variables=variables)
        assert run.code == 0, run.log
        assert hub.repos["me/new"].private and b"base_model: me/models" in hub.repos["me/new"].files["README.md"]
        refused = batch("convert", "-r", "repo_id", "me/models", variables=variables | {"HF_TOKEN": ""})
    notes = " ".join(run.result["notes"])
    assert "The source is me/models on the Hugging Face Hub" in notes and "files were uploaded to me/new" in notes
    assert run.result["metrics"]["uploaded"]["repo_id"] == "me/new"
    assert run.result["metrics"]["summary"].endswith("same greedy tokens. Uploaded to me/new.")
    assert len(run.result["checks"]) == 10 and all(c["passed"] for c in run.result["checks"])
    written = "".join(path.read_text() for path in (run.notebook, *run.folder.glob("*.[hj][ts]*")))
    assert TOKEN not in written + run.log and "X-Signature" not in written + run.log
    assert refused.code == 1 and refused.result["error"]["class"] == "HubError"
    assert "no model repository me/models, or it is private" in refused.result["error"]["message"]


def test_a_dry_run_stops_after_the_plan(batch):
    run = batch("convert", "-p", "to", "fla", "-p", "dry_run", "True")
    assert run.code == 0, run.log
    assert (run.result["status"], run.result["outputs"], run.result["checks"]) == ("ok", [], [])
    assert {path.name for path in run.folder.iterdir()} == {"key_map.csv", "report.html", "result.json"}
    for cell in ("carry_out", "show_values", "compare_models", "show_use", "cells.prove"):
        assert run.output_of(cell).startswith("dry_run=True: nothing was converted")


def test_a_target_without_this_generation_fails(batch, demo_folder):
    run = batch("convert", "-p", "to", "world")
    assert run.code == 1 and "this is RWKV-7.0" in run.log
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["status"], result["error"]["class"]) == ("failed", "LayoutError")
    assert "It can be written as" in (run.folder / "report.html").read_text()
