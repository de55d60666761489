"""train.ipynb run by papermill: an adapter on a quantised base, from a file of prompts and responses."""

import json

import nbformat

from rwkv_lab.checkpoint import open_checkpoint


def test_what_cannot_be_trained_fails_the_run_and_leaves_no_output(batch, demo_folder, tmp_path):
    run = batch(
        "train", "-p", "kind", "miss", "-p", "rank", "99", "-p", "steps", "4", "-r", "out", "a.pth", cwd=tmp_path
    )
    assert run.code != 0 and run.result["status"] == "failed" and list(tmp_path.iterdir()) == []
    assert (
        run.result["error"]["class"] == "ParameterError" and "larger than the layer" in run.result["error"]["message"]
    )
    assert "blocks.0.att.receptance: rank 99" in run.log


def test_messages_say_what_to_pass_to_papermill(batch, demo_folder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n')
    run = batch("train", "-r", "data", "x.jsonl", cwd=tmp_path)
    assert run.code != 0 and "Pass -p ignore id to leave it out" in run.log
    assert "Pass -p ignore id to leave it out" in run.result["error"]["message"]


def test_an_adapter_is_trained_in_batch(batch, demo_folder, tmp_path):
    lines = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(30)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    chosen = (
        '{"kind": "lora", "targets": ["att.*"], "rank": 2, "steps": 4, "eval_every": 2, "quant": "nf4", "lr": 1e-3}'
    )
    run = batch("train", "-y", chosen, "-r", "data", "sums.jsonl", "-r", "out", "adapter.pth", cwd=tmp_path)
    assert run.code == 0, run.log
    result = run.result
    assert result["status"] == "ok" and all(c["passed"] for c in result["checks"])
    assert result["metrics"]["steps_done"] == 4
    with open_checkpoint(tmp_path / "adapter.pth") as ck:
        assert ck.kind == "lora" and "blocks.0.att.key.lora_A" in ck and "blocks.0.ffn.key.lora_A" not in ck
    assert run.output_of("cells.compare").startswith("compare=False")
    assert not nbformat.read(run.notebook, as_version=4).metadata.get("widgets", {})
