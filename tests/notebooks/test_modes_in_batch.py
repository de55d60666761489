"""modes.ipynb in batch: the demo model passes, RWKV-4 too, and a file with one wrong weight is caught."""

from models import LAYOUTS, random_model

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint


def test_modes_on_its_defaults(batch):
    run = batch("modes")
    assert run.code == 0, run.log
    result = run.result
    assert (result["status"], result["error"], result["metrics"]["version"]) == ("ok", None, "7.0")
    assert all(check["passed"] for check in result["checks"])
    assert {row["dtype"] for row in result["metrics"]["rows"]} == {"float64", "float32", "bfloat16"}
    assert "held-out text" in result["metrics"]["tokens"]  # the demo model reads bytes
    report = (run.folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 5 and str(run.folder.parent) not in report
    verdicts = run.output_of("cells.show_verdict").splitlines()
    assert len(verdicts) == len(result["checks"]) and all(line.startswith("PASS  ") for line in verdicts)


def test_modes_of_another_generation_with_parameters(batch, tmp_path):
    write_checkpoint(tmp_path / "m.safetensors", {n: 0.3 * t for n, t in random_model(LAYOUTS["4.0"]).items()})
    given = '{"dtypes": ["float32", "float16"], "backends": ["chunked"], "length": 40, "batch": 1}'
    run = batch("modes", "-r", "model", "m.safetensors", "-y", given, cwd=tmp_path)
    assert run.code == 0, run.log
    rows = run.result["metrics"]["rows"]
    assert [(row["mode"], row["backend"], row["dtype"]) for row in rows] == [
        (mode, "chunked", dtype) for dtype in ("float32", "float16") for mode in ("transformer", "rnn")
    ]
    assert run.result["metrics"]["version"] == "4.0" and "drawn at random" in run.result["metrics"]["tokens"]


def test_a_copy_with_one_wrong_weight_is_placed_in_words_and_fails_the_run(batch, demo_folder, tmp_path):
    good = demo_folder / "demo-base.pth"
    with open_checkpoint(good) as ck:
        tensors = {name: ck[name] for name in ck}
    tensors["blocks.1.att.receptance.weight"][7, 2] += 0.1
    write_checkpoint(tmp_path / "broken.pth", tensors)
    names = ["-r", "model", str(good), "-r", "compare_with", str(tmp_path / "broken.pth")]
    run = batch("modes", *names, "-y", '{"length": 32, "dtypes": ["float32"]}')
    assert run.code == 1 and "OutputError" in run.log
    assert (run.result["status"], run.result["error"]["class"]) == ("failed", "OutputError")
    assert [c["name"] for c in run.result["checks"] if c["passed"] is False] == ["where the two models part"]
    said = "in layer 1, from token 0 on, at r, the receptance"
    assert said in run.output_of("cells.compare_files") and said in run.result["metrics"]["compared"]
    assert said in (run.folder / "report.html").read_text()
