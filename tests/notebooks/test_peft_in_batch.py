"""peft.ipynb in batch: the demo's state, a LoRA beside a second one, a fully tuned model."""

from tuned_files import write_adapter, write_fine_tune

COMMON = '{"data": "english"}'  # quickly read


def test_peft_on_its_defaults(batch, demo_folder):
    run = batch("peft")
    assert run.code == 0, run.log
    result = run.result
    assert (result["status"], result["error"], result["metrics"]["kind"]) == ("ok", None, "state")
    assert all(check["passed"] for check in result["checks"])
    assert [f["path"] for f in result["inputs"]] == [str(demo_folder / f"demo-{n}.pth") for n in ("base", "state")]
    assert {path.stem for path in run.folder.glob("*.png")} == {
        "counts",
        "heads",
        "head_sizes",
        "spectra",
        "ranks",
        "state_effect",
        "ablation",
    }
    report = (run.folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 7 and str(run.folder.parent) not in report
    verdicts = run.output_of("cells.show_verdict").splitlines()
    assert len(verdicts) == len(result["checks"]) and all(line.startswith("PASS  ") for line in verdicts)
    assert "The tuned state, head by head" in report and ">nan<" not in report


def test_a_lora_beside_a_second_one_from_another_folder(batch, demo_folder, tmp_path):
    base = demo_folder / "demo-base.pth"
    write_adapter(tmp_path / "a.pth", base, lora_r=4)
    write_adapter(tmp_path / "b", base, lora_r=2, seed=2)  # a folder as of Hugging Face's peft
    names = ["-r", "base", str(base), "-r", "adapter", "a.pth", "-r", "second", "b", "-p", "rank", "2", "-y", COMMON]
    run = batch("peft", *names, cwd=tmp_path)
    assert run.code == 0, run.log
    metrics = run.result["metrics"]
    assert metrics["kind"] == "lora" and len(metrics["matrices"]) == 2 * 6 and len(metrics["cosines"]) == 2 * 6
    assert all(0 < m["share_of_rank_2"] < 1 and m["rank_99"] <= 4 for m in metrics["matrices"].values())
    assert set(metrics["ablation"]["layers"]) == {"layer 0", "layer 1"}
    assert len(run.result["figures"]) == 8 and "no tuned state" in run.output_of("cells.show_heads")


def test_a_fully_tuned_model(batch, demo_folder, tmp_path):
    base = demo_folder / "demo-base.pth"
    tuned = write_fine_tune(tmp_path / "t.safetensors", base)
    run = batch("peft", "-r", "base", str(base), "-r", "adapter", str(tuned), "-y", COMMON)
    assert run.code == 0, run.log
    metrics = run.result["metrics"]
    assert (metrics["kind"], metrics["frozen"]) == ("model", 0) and {"emb", "head"} <= set(metrics["matrices"])
    assert {"emb", "head", "ln", "att.key"} <= set(metrics["ablation"]["parts"])
    assert len(run.result["figures"]) == 7
