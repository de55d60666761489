"""The functions behind convert.ipynb: targets, dtypes, adapters, states, refusals, the panel's fields."""

import csv
import json
import re

import pytest
import torch
from models import random_state
from random_models import make_layout, random_tensors, write_model
from tuned_files import write_adapter

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, OutputError, ParameterError
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.again import recorded_arguments
from rwkv_lab.workbench.convert import cells
from rwkv_lab.workbench.steps import run_all

pytestmark = pytest.mark.usefixtures("unpainted")


@pytest.fixture
def model(tmp_path):
    return str(write_model(tmp_path / "m.pth", make_layout("7.0", head_size=32, vocab_size=256)))


def done(tmp_path, **given) -> dict:
    run_all(start("convert", given | {"report": str(tmp_path / "report")}))
    return result_of(tmp_path)


def result_of(tmp_path) -> dict:
    return json.loads((tmp_path / "report" / "result.json").read_text())


def report_of(tmp_path) -> str:
    return (tmp_path / "report" / "report.html").read_text().replace("&#39;", "'").replace("&gt;", ">")


def test_a_folder_with_the_same_values(model, tmp_path):
    result = done(tmp_path, source=model, to="fla")
    assert result["status"] == "ok" and all(c["passed"] for c in result["checks"])
    assert result["metrics"]["logits"]["relative_rms"] == 0
    assert result["metrics"]["greedy"] == {"same": 48, "tokens": 48}
    assert re.fullmatch(
        r"Converted to fla: [\d.]+ kB -> [\d.]+ kB; logits are equal to the last bit; same greedy tokens\.",
        result["metrics"]["summary"],
    )
    with open_checkpoint(tmp_path / "report" / "converted") as ck:
        assert ck.foreign_format.name == "fla-rwkv7"
    report = report_of(tmp_path)
    for shown in ("model.layers.{i}.attn.r_proj.weight", "RWKV7ForCausalLM.from_pretrained", "config.json"):
        assert shown in report
    assert "{path}" not in report and str(tmp_path) not in report


def test_rounding_is_counted_and_drawn(model, tmp_path):
    with open_checkpoint(model) as ck:
        tensors = {name: ck[name] for name in ck}
    tensors["emb.weight"].view(-1)[:3] = torch.tensor([1e-9, -1e-9, 3e-8])
    write_checkpoint(model, tensors, overwrite=True)
    result = done(tmp_path, source=model, to="pth", dtype="fp16")
    assert result["status"] == "ok" and {"ranges.png", "change_of_values.png", "logits.png"} <= names(tmp_path)
    rounding = result["metrics"]["rounding"]
    assert rounding["flushed"] == 2 and rounding["overflow"] == 0 and rounding["rounded"] > 1000
    assert 0 < result["metrics"]["logits"]["relative_rms"] < 1e-2 and 0 < result["metrics"]["largest_change"] < 1e-3
    assert "Ranges and rounding" in report_of(tmp_path) and "% RMS" in result["metrics"]["summary"]


def names(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "report").iterdir()}


def test_quantised_gguf(model, tmp_path):
    pytest.importorskip("gguf", reason="the PyPI package gguf is not installed")
    result = done(tmp_path, source=model, to="gguf", dtype="Q8_0", out=str(tmp_path / "m.gguf"))
    assert result["status"] == "ok" and result["metrics"]["summary"].startswith("Converted to GGUF Q8_0: ")
    assert 0 < result["metrics"]["logits"]["relative_rms"] < 0.1
    (logits,) = [c for c in result["checks"] if c["name"].startswith("logits")]
    assert logits["limit"] == "finite: quantised values have no other bound" and "Llama(" in report_of(tmp_path)


def test_the_key_map_is_folded_in_the_report_and_whole_beside_it(model, tmp_path):
    done(tmp_path, source=model, to="fla")
    with open(tmp_path / "report" / "key_map.csv") as file:
        rows = list(csv.DictReader(file))
    with open_checkpoint(tmp_path / "report" / "converted") as ck:
        assert {(row["theirs"], row["ours"]) for row in rows} == {(t, o) for o, t in ck.names_in_file.items()}
    table = re.search(r"Key map \((\d+)\)", report_of(tmp_path))
    assert table and int(table[1]) < len(rows)
    assert ">0–1</td>" in report_of(tmp_path)


def test_what_is_dropped_and_why(tmp_path):
    """A state that the target has no place for is left out of both models that are compared."""
    tensors = random_tensors(make_layout("7.0", head_size=32, vocab_size=256), time_state=True)
    write_checkpoint(tmp_path / "m.pth", tensors)
    result = done(tmp_path, source=str(tmp_path / "m.pth"), to="fla")
    assert result["status"] == "ok" and result["metrics"]["dropped"] == 2
    assert result["metrics"]["logits"]["relative_rms"] == 0
    assert "What is dropped (1)" in report_of(tmp_path) and "start from zeros" in report_of(tmp_path)


def test_an_adapter(model, tmp_path):
    write_adapter(tmp_path / "lora.pth", model, lora_r=4, lora_alpha=8)
    result = done(tmp_path, source=str(tmp_path / "lora.pth"), to="fla", generation="7.0")
    assert result["status"] == "ok" and "logits" not in result["metrics"]
    assert {c["name"].split(",")[0] for c in result["checks"]} >= {"changes that differ from the source's"}
    assert re.search(r"; \d+ tensors compared with the source\.$", result["metrics"]["summary"])
    assert "PeftModel.from_pretrained" in report_of(tmp_path)


def test_a_state(tmp_path):
    write_checkpoint(tmp_path / "state.pth", random_state())
    result = done(tmp_path, source=str(tmp_path / "state.pth"), to="fla")
    assert result["status"] == "ok" and (tmp_path / "report" / "converted.safetensors").is_file()
    assert "a tuned state for" in report_of(tmp_path) and "load_file(" in report_of(tmp_path)


def test_a_vocabulary_without_tokenizer_continues_numbers(tmp_path):
    write_model(tmp_path / "m.pth", make_layout("7.0", head_size=32, vocab_size=70))
    result = done(tmp_path, source=str(tmp_path / "m.pth"), to="fla")
    assert result["metrics"]["greedy"]["same"] == 48
    assert re.search(r"After the prompt <code>0 2 4 6 ", report_of(tmp_path))


def test_a_model_that_does_not_fit_into_memory_is_written_and_not_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_lab.analysis.conversion.memory_free", lambda: 1000)
    result = done(tmp_path, source=model, to="fla")
    assert result["status"] == "ok" and "Not run: in float32 it needs" in result["metrics"]["summary"]
    assert [c["passed"] for c in result["checks"]].count(None) == 2


def test_without_verification_the_report_says_so(model, tmp_path):
    result = done(tmp_path, source=model, to="fla", verify=False)
    assert any(c["value"] == "not applicable: verify=False" for c in result["checks"])


def test_an_output_with_another_value_fails_the_run(model, tmp_path):
    run = start("convert", {"source": model, "to": "pth", "report": str(tmp_path / "report")})
    plan = cells.plan(run)
    result = cells.carry_out(run, plan)
    with open_checkpoint(result.out) as ck:
        tensors = {name: ck[name] for name in ck}
    tensors["head.weight"][5] += 1
    write_checkpoint(result.out, tensors, overwrite=True)
    cells.prove(run, result, cells.compare_models(run, result))
    with pytest.raises(OutputError, match="first: FAIL  logits of source and output"):
        run.finish(must_pass=True)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"to": "flaa"}, ParameterError, "did you mean fla"),
        ({"max_shard_size": "2 apples"}, ParameterError, "a size such as"),
        ({"source": "none.pth"}, ParameterError, "none.pth"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_happens(given, error, says, model, tmp_path):
    with pytest.raises(error, match=says):
        start("convert", {"source": model, "report": str(tmp_path / "report")} | given)
    assert result_of(tmp_path)["status"] == "failed"


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"to": "world"}, LayoutError, "this is RWKV-7.0"),
        ({"to": "fla", "size": "0.4B"}, ParameterError, "24 layers of 1024 channels"),
        ({"to": "pth", "out": "{model}"}, OutputError, "m.pth"),
    ],
)
def test_what_is_wrong_is_refused_by_the_plan(given, error, says, model, tmp_path):
    given = {name: value.replace("{model}", model) for name, value in given.items()}
    with pytest.raises(error, match=says):
        done(tmp_path, source=model, **given)
    assert result_of(tmp_path)["status"] == "failed" and not list((tmp_path / "report").glob("converted*"))


def test_overflow_leaves_nothing_behind(model, tmp_path):
    with open_checkpoint(model) as ck:
        tensors = {name: ck[name] for name in ck}
    tensors["emb.weight"].view(-1)[0] = 1e6
    write_checkpoint(model, tensors, overwrite=True)
    with pytest.raises(NumericsError, match="allow_nonfinite"):
        done(tmp_path, source=model, to="pth", dtype="fp16")
    assert result_of(tmp_path)["status"] == "failed" and not (tmp_path / "report" / "converted.pth").exists()
    result = done(tmp_path, source=model, to="pth", dtype="fp16", allow_nonfinite=True)
    assert result["status"] == "ok" and result["metrics"]["rounding"]["overflow"] == 1


def test_an_interrupted_run_leaves_the_older_output_as_it_was(model, tmp_path, monkeypatch):
    done(tmp_path, source=model, to="pth")
    older = (tmp_path / "report" / "converted.pth").read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("rwkv_lab.convert.writing._add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        done(tmp_path, source=model, to="pth", dtype="fp16")
    result = result_of(tmp_path)
    assert (result["status"], result["error"]["class"], result["outputs"]) == ("failed", "KeyboardInterrupt", [])
    assert (tmp_path / "report" / "converted.pth").read_bytes() == older
    assert {p.name for p in (tmp_path / "report" / "failed").iterdir()} == {"key_map.csv", "report.html", "result.json"}
    assert names(tmp_path) == {
        "converted.pth", "failed", "key_map.csv", "logits.png", "report.html", "report.json", "result.json"
    }  # fmt: skip


def test_the_next_run_replaces_an_output_without_a_name(model, tmp_path):
    for dtype in ("bf16", "fp16"):
        assert done(tmp_path, source=model, to="fla", dtype=dtype)["status"] == "ok"
    with open_checkpoint(tmp_path / "report" / "converted") as ck:
        assert ck["emb.weight"].dtype == torch.float16


def test_the_panel_shows_what_the_target_takes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    panel = panels.show_panel(start("convert", {"source": model, "report": str(tmp_path / "report")}))
    shown = lambda name: panel.fields[name].box.layout.display != "none"  # noqa: E731
    assert panel.fields["max_shard_size"].value == "5GB" and panel.fields["to"].value == "transformers"
    assert shown("max_shard_size") and shown("rescale")
    panel.fields["to"].widget.value = "gguf"
    assert not shown("max_shard_size") and shown("rescale")
    panel.fields["to"].widget.value = "fla"
    assert shown("max_shard_size") and not shown("rescale")
    panel.fields["max_shard_size"].widget.value = "2 apples"
    assert "a size such as" in panel.message.value
    panel.fields["max_shard_size"].widget.value = "20KB"
    assert panel.message.value == "" and panel.run.config.spec().max_shard_size == 20_000
    panel.buttons["Run"].click()
    assert result_of(tmp_path)["status"] == "ok"
    assert (tmp_path / "report" / "converted" / "model.safetensors.index.json").exists()


def test_what_repeats_a_run_may_replace_the_folder_that_it_wrote(model, tmp_path):
    out = tmp_path / "out"
    done(tmp_path, source=model, to="fla", out=str(out))
    arguments = recorded_arguments(tmp_path / "report")
    assert arguments[arguments.index("overwrite") + 1] == "True" and "max_shard_size" not in arguments
    assert arguments[arguments.index("to") + 1] == "fla"
    write_checkpoint(out / "model.safetensors", {"emb.weight": torch.ones(3)}, overwrite=True)
    assert "overwrite" not in recorded_arguments(tmp_path / "report")
