"""The functions behind train.ipynb, and its panel, without a browser."""

import json
import os

import pytest
from models import snapshot

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.steps import run_all
from rwkv_lab.workbench.train import cells as training

SHORT = dict(steps=6, batch_size=2, ctx_len=32)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; " * 500)
    return str(path)


def a_run(tmp_path, **values):
    return start("train", {"report": str(tmp_path / "report"), **SHORT, **values})


def result_of(run) -> dict:
    return json.loads((run.folder / "result.json").read_text())


def test_dry_run_plans_and_writes_nothing(tmp_path, demo_folder, text, capsys):
    run = a_run(tmp_path, kind="lora", rank=2, targets=["att.key"], quant="nf4", data=text, dry_run=True)
    plan = training.plan(run)
    assert plan.count == 2 * 2 * (32 + 32) and "0.45% of" in dict(run.page.facts)["trained"]
    assert "weights" in dict(run.page.facts)["memory"] and dict(run.page.facts)["frozen matrices"] == "nf4"
    result = training.carry_out(run, plan)
    training.show_curves(run, plan, result)
    training.show_samples(run, result)
    training.prove(run, plan, result)
    assert result is None and training.compare(run, plan) is None
    assert capsys.readouterr().out.count("dry_run=True: nothing was trained") == 5
    run.finish(must_pass=True)
    assert result_of(run)["status"] == "ok" and not list(run.folder.glob("*.pth"))


@pytest.mark.parametrize(
    "values",
    [
        dict(kind="full", lr=1e-3, autocast="bfloat16"),
        dict(kind="lora", rank=2, quant="int8", lr=1e-3),
        dict(kind="pissa", rank=2, lr=1e-3),
        dict(kind="miss", rank=2, quant="nf4", dtype="bfloat16", lr=1e-3),
    ],
    ids=lambda values: values["kind"],
)
def test_everything_ends_well(tmp_path, demo_folder, text, values, monkeypatch):
    run = a_run(tmp_path, data=text, eval_every=3, **values)
    run_all(run)
    result = result_of(run)
    assert result["status"] == "ok" and all(c["passed"] for c in result["checks"])
    assert result["metrics"]["steps_done"] == 6 and len(result["figures"]) == 3
    with open_checkpoint(run.folder / "trained.pth") as ck:
        assert ck.kind == {"full": "model"}.get(values["kind"], values["kind"])
    assert (run.folder / "log.csv").exists() and (run.folder / "report.html").exists()


def test_examples_are_trained_on_too(tmp_path, demo_folder):
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) for i in range(20)))
    run = a_run(tmp_path, kind="lora", data=str(data), lr=1e-3)
    run_all(run)
    assert result_of(run)["status"] == "ok" and "examples" in dict(run.page.facts)["text"]


def test_what_the_context_cuts_is_in_plan_result_and_report(tmp_path, demo_folder):
    data = tmp_path / "sums.txt"
    lines = [{"question": f"{i}", "answer": "a" * i, "id": i} for i in range(1, 40)]
    data.write_text("\n".join(map(json.dumps, lines)))
    run = a_run(tmp_path, kind="lora", data=str(data), lr=1e-3, ignore=["id"], long="cut", ctx_len=40)
    run_all(run)
    result, report = result_of(run), (run.folder / "report.html").read_text()
    sentence = next(note for note in result["notes"] if "of 39 examples are longer than ctx_len=40" in note)
    assert sentence in dict.fromkeys(value for _, value in run.page.facts) and "ctx_len=62 would keep all" in report
    assert any("id (39)" in note for note in result["notes"])
    metrics = result["metrics"]
    assert metrics["examples_longer_than_ctx_len"] == metrics["examples_without_their_end"] > 0
    assert metrics["ctx_len_that_cuts_none"] == 62 and metrics["tokens_lost"] > 0
    assert result["status"] == "ok" and len(run.page.samples) >= 1


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (dict(kind="lora", rank=33), "ParameterError", "blocks.0.att.receptance: rank 33 is larger than the layer"),
        (dict(kind="miss", targets=["att.kye"]), "ParameterError", "'att.kye' matches none"),
        (dict(kind="lora", train_parts=["norms"]), "ParameterError", "'norms' matches none of the"),
        (dict(kind="state", ctx_len=20_000), "ParameterError", "smaller ctx_len"),
        (dict(kind="full", data="empty.txt"), "ParameterError", "has 0 bytes"),
        (dict(kind="lora", data="empty.jsonl"), "ParameterError", "0 different examples"),
        (dict(kind="full", base="nan.pth"), "NumericsError", "nan bits per byte before any step"),
        (dict(kind="pissa", base="nan.pth"), "NumericsError", "blocks.1.att.key"),
        (dict(kind="lora", base="nan.pth", quant="nf4"), "NumericsError", "blocks.1.att.key"),
        (dict(kind="full", lr=1e30), "NumericsError", "smaller lr"),
    ],
    ids=str,
)
def test_a_refused_training_leaves_nothing_but_word_of_it(tmp_path, demo_folder, text, values, error, words):
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).touch()
    with open_checkpoint(demo_folder / "demo-base.pth") as ck:
        tensors = {name: ck[name] for name in ck}
    tensors["blocks.1.att.key.weight"][0, 0] = float("nan")
    write_checkpoint(tmp_path / "nan.pth", tensors)
    here = {name: str(tmp_path / value) for name, value in values.items() if name in ("data", "base")}
    run = a_run(tmp_path, **{"data": text, **values, **here})
    before = snapshot(tmp_path)
    with pytest.raises(RwkvLabError):
        run_all(run)
    found = result_of(run)
    assert (found["status"], found["error"]["class"]) == ("failed", error) and words in found["error"]["message"]
    after = snapshot(tmp_path)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"report/result.json", "report/report.html"}


def test_methods_are_shown_at_equal_parameters(tmp_path, demo_folder, text, monkeypatch):
    asked = {}

    def quick(base, data, **settings):
        asked.update(settings)
        return compare_methods(base, data, steps=2, batch_size=2, **settings)

    compare_methods = training.compare_methods
    monkeypatch.setattr(training, "compare_methods", quick)
    run = a_run(tmp_path, kind="state", data=text, compare=True)
    found = training.compare(run, training.plan(run))
    assert len({c.trained for c in found}) == 1 and asked["ctx_len"] == 32
    assert set(run.record.metrics["compared"]) == {"lora", "pissa", "miss", "state"}
    assert run.page.tables[-1].title == "Methods at equal trained parameters"


def test_what_is_trained_is_what_was_planned(tmp_path, demo_folder, text):
    run = a_run(tmp_path, kind="state", data=text)
    plan = training.plan(run)
    run.configure(steps=3)
    with pytest.raises(ParameterError, match="^steps changed since the plan was made; make the plan again"):
        training.carry_out(run, plan)
    run.configure(steps=SHORT["steps"])
    result = training.carry_out(run, plan)
    assert len(result.losses) == plan.spec.steps == SHORT["steps"]
    (base,) = plan.base_files
    os.utime(base.path, ns=(0, base.modified + 1))
    try:
        with pytest.raises(ParameterError, match="has changed since the plan was made"):
            training.carry_out(run, plan)
    finally:
        os.utime(base.path, ns=(0, base.modified))


def test_the_panel_sets_numbers_trains_and_draws_the_loss(tmp_path, demo_folder, text, monkeypatch):
    run = a_run(tmp_path, data=text)
    assert panels.show_panel(run) is None  # no front end is there
    drawn = []
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    monkeypatch.setattr(training, "frontend_present", lambda: True)
    monkeypatch.setattr(training, "_REDRAW", 0.0)
    loss_curve = training.figures.loss_curve
    monkeypatch.setattr(training.figures, "loss_curve", lambda *a: drawn.append(a[1]) or loss_curve(*a))
    panel = panels.show_panel(run)
    assert "to start from" in panel.fields["base"].widget.text.tooltip  # its own words, not those of merge.ipynb
    assert panel.fields["alpha"].widget.placeholder == "empty: 16"  # twice the rank
    panel.fields["kind"].widget.value = "lora"
    panel.fields["rank"].widget.value = "4"
    panel.fields["steps"].widget.value = "many"
    assert "many" in panel.message.value and run.config.steps == 6
    panel.fields["steps"].widget.value = "3"
    panel.fields["lr"].widget.value = "1e-3"
    assert (run.config.kind, run.config.rank, run.config.steps, run.config.lr) == ("lora", 4, 3, 1e-3)
    panel.buttons["Plan"].click()
    assert not (run.folder / "trained.pth").exists()
    panel.buttons["Run"].click()
    assert panel.message.value == "" and result_of(run)["status"] == "ok"
    assert [s for s in drawn if s.startswith("step ")] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
