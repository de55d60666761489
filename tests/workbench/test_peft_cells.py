"""The functions behind peft.ipynb, without a kernel: what they show, against the same numbers had in another way."""

import json
import math
from dataclasses import replace
from shutil import copyfile

import numpy as np
import pytest
import torch
from models import snapshot
from random_models import make_layout, write_model
from tuned_files import write_adapter, write_state, write_tuned

from rwkv_lab.analysis import tuned_model
from rwkv_lab.analysis.spectra import Spectrum
from rwkv_lab.analysis.tuning import TuningOptions
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import OutputError, ParameterError, RwkvLabError
from rwkv_lab.plotting import png
from rwkv_lab.train import train
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.parameters import read_parameters
from rwkv_lab.workbench.peft import cells
from rwkv_lab.workbench.peft import figures as peft_figures
from rwkv_lab.workbench.registry import parameters_of
from rwkv_lab.workbench.steps import run_all

OF_MATRICES = ["energy_frobenius", "energy_spectral", "spectra", "ranks", "effective_rank"]
OF_STATES = ["heads", "state_effect"]
FIGURES = {
    "lora": ["counts", *OF_MATRICES, "ablation"],
    "lora-besides": ["counts", "head_sizes", *OF_MATRICES, *OF_STATES, "ablation"],
    "pissa-nf4": ["counts", *OF_MATRICES, "ablation"],
    "bat-int8": ["counts", *OF_MATRICES, "ablation"],
    "state": ["counts", "head_sizes", "spectra", "ranks", *OF_STATES, "ablation"],
    "model": ["counts", *OF_MATRICES, "ablation"],
    "norms": ["counts", "energy_frobenius", "ablation"],
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch, unpainted):
    """Little text, and figures that are made but not painted: that is done below, and in batch."""
    monkeypatch.setattr(cells, "_EXCERPTS", 3)
    monkeypatch.setattr(cells, "_TEXTS", 2)


@pytest.fixture
def base(demo_folder):
    return demo_folder / "demo-base.pth"


@pytest.fixture(scope="module")
def made_once(demo_folder, tmp_path_factory):
    """made_once(kind, **values) -> path of a tuned file of that kind, the same for all tests."""
    folder, base = tmp_path_factory.mktemp("tuned"), demo_folder / "demo-base.pth"

    def make(kind, **values):
        path = folder / f"{kind}{values}.pth"
        if path.exists():
            return path
        return write_tuned(path, base, kind, **values)

    return make


@pytest.fixture
def made(made_once, tmp_path):
    """made(kind, name=kind, **values) -> a copy of that file of the test's own, with that name."""
    return lambda kind, name=None, **values: copyfile(made_once(kind, **values), tmp_path / f"{name or kind}.pth")


@pytest.fixture
def run(base, tmp_path):
    """run(adapter, **parameters) -> a run of peft.ipynb on these parameters, on English, which is quickly read."""
    given = {"report": str(tmp_path / "report"), "base": str(base), "data": "english"}
    return lambda adapter, **values: start("peft", {**given, "adapter": str(adapter), **values})


def result(run) -> dict:
    return json.loads((run.folder / "result.json").read_text())


def test_tokens_and_records_are_read_as_in_training(run, made, tmp_path):
    rows = [{"prompt": f"p {i}", "response": f"r {i}", "id": i + 1} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    np.save(tmp_path / "tokens.npy", np.arange(6000) % 257)
    with pytest.raises(ParameterError, match='ignore=."id".'):
        run_all(run(made("state"), data=str(tmp_path / "mine.jsonl")))
    for given in ({"data": str(tmp_path / "mine.jsonl"), "ignore": ["id"]}, {"data": str(tmp_path / "tokens.npy")}):
        one = run(made("state"), **given)
        run_all(one)
        assert result(one)["metrics"]["bits_per_byte"]["with"] > 0


def test_a_tuning_of_another_base_says_so(run, made, base, tmp_path):
    train("state", tmp_path / "own.pth", "english", base, steps=1, batch_size=1, ctx_len=8, samples=False)
    with open_checkpoint(base) as ck:
        write_checkpoint(tmp_path / "other.pth", {name: 1.1 * ck[name] for name in ck})
    for beside, notes in ((base, 0), (tmp_path / "other.pth", 1)):
        one = run(tmp_path / "own.pth", base=str(beside))
        cells.describe(one)
        assert len(one.record.notes) == notes
    assert "own.pth was trained on demo-base.pth; other.pth has other weights" in one.record.notes[0]


@pytest.mark.parametrize("kind", FIGURES)
def test_every_kind_ends_well(run, made, kind, capsys):
    run = run(made(kind))
    run_all(run)
    found = result(run)
    assert found["status"] == "ok" and all(check["passed"] is not False for check in found["checks"])
    assert [figure.split("/")[-1] for figure in found["figures"]] == [f"{name}.png" for name in FIGURES[kind]]
    report = (run.folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == len(FIGURES[kind]) and str(run.folder.parent) not in report
    printed = capsys.readouterr().out
    assert ("holds no tuned state" in printed) == ("heads" not in FIGURES[kind])
    assert ("No matrix of the base is changed" in printed) == ("spectra" not in FIGURES[kind])
    assert "second is empty" in printed
    same = [check["passed"] for check in found["checks"] if "as it was trained" in check["name"]]
    assert same == [None if kind == "norms" else True]


def test_cosines(run, base, tmp_path):
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g)
    other = torch.linalg.qr(torch.cat([B, torch.randn(32, 2, generator=g)], 1)).Q[:, 2:]  # no direction of B in it
    key, value = "blocks.0.att.key.lora_", "blocks.1.att.value.lora_"
    write_checkpoint(tmp_path / "1.pth", {key + "A": A, key + "B": B, value + "A": A, value + "B": B})
    write_checkpoint(tmp_path / "2.pth", {key + "A": A, key + "B": -3 * B, value + "A": A, value + "B": other})
    run = run(tmp_path / "1.pth", alpha=4, second=str(tmp_path / "2.pth"))  # the second's alpha is not needed
    cosines = cells.compare(run, cells.describe(run))
    assert cosines == {
        "blocks.0.att.key.weight": pytest.approx(-1),
        "blocks.1.att.value.weight": pytest.approx(0, abs=1e-6),
    }
    assert [picture.name for picture in run.page.pictures] == ["counts", "cosines"] and len(run.record.inputs) == 3


def test_tunings_without_a_common_tensor_are_not_compared(run, made, capsys):
    run = run(made("lora"), second=str(made("state")))
    assert cells.compare(run, cells.describe(run)) == {}
    assert "nothing to compare" in capsys.readouterr().out


def test_targets_choose_what_is_measured(run, made):
    run = run(made("lora"), targets=["att.key", "blocks.1.ffn.*"])
    names = cells.describe(run)
    assert [n.removesuffix(".weight") for n in names] == [
        "blocks.0.att.key",
        "blocks.1.att.key",
        "blocks.1.ffn.key",
        "blocks.1.ffn.value",
    ]
    assert [f"{s.name}.weight" for s in cells.measure(run, names).spectra] == names
    cells.show_ablation(run, names)
    assert set(run.record.metrics["ablation"]["parts"]) == {"att.key", "ffn.key", "ffn.value"}


@pytest.mark.parametrize("version", ["4.0", "6.0"])
def test_models_whose_vocabulary_tells_no_tokenizer_are_measured_as_far_as_that_goes(run, tmp_path, version):
    base = write_model(tmp_path / "b.safetensors", make_layout(version))
    adapter = write_adapter(tmp_path / "a.safetensors", base, lora_r=2)
    one = run(adapter, base=str(base))
    run_all(one)
    (without,) = [c for c in result(one)["checks"] if c["passed"] is None]
    assert "which layers' tuning matters" in without["name"] and "tokenizer" in without["value"]
    if version == "6.0":
        one = run(write_state(tmp_path / "s.pth", base), base=str(base))
        run_all(one)
        assert "drawn at random" in result(one)["metrics"]["state_effect"]["tokens"]


def test_a_model_that_memory_does_not_hold_is_measured_without_being_run(run, made, monkeypatch):
    monkeypatch.setattr(tuned_model, "memory_free", lambda: 1000)
    run = run(made("state"))
    run_all(run)
    found = result(run)
    assert found["status"] == "ok" and [c["passed"] for c in found["checks"]] == [None, None]
    assert "of memory" in found["checks"][0]["value"]


def test_a_tuning_that_answers_otherwise_than_it_was_trained_fails(run, made, monkeypatch):
    monkeypatch.setattr(tuned_model, "load_adapter", lambda *_: None)
    run = run(made("lora", size=0.5))
    with pytest.raises(OutputError, match="as it was trained"):
        run_all(run)
    assert result(run)["status"] == "failed"


def nan_in(path, name):
    with open_checkpoint(path) as ck:
        tensors, note = {n: ck[n] for n in ck}, ck.metadata
    tensors[name].view(-1)[0] = torch.nan
    broken = path.with_name(f"nan-{path.name}")
    write_checkpoint(broken, tensors, note)
    return broken


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("missing", "ParameterError", "no file"),
        ("garbage", "CorruptFileError", "garbage.pth"),
        ("the base itself", "ParameterError", "same file"),
        ("a copy of the base", "ParameterError", "changes nothing"),
        ("a fresh adapter", "ParameterError", "changes nothing"),
        ("a state of zeros", "ParameterError", "changes nothing"),
        ("no alpha", "ParameterError", "pass alpha="),
        ("alpha of a state", "ParameterError", "leave them out"),
        ("unmerge", "ParameterError", "nothing is merged"),
        ("three values", "ParameterError", "a list of two"),
        ("another generation", "LayoutError", "blocks.0.ffn.key of the base is [52, 32]"),
        ("a lack of depth", "LayoutError", "with 1 layer:"),
        ("another depth, a state", "LayoutError", "the model has layers 0 to 2"),
        ("another depth, a model", "LayoutError", "n_layer differs"),
        ("NaN in an adapter", "NumericsError", "NaN or Inf"),
        ("NaN in a state", "NumericsError", "NaN or Inf"),
        ("NaN in a model", "NumericsError", "blocks.1.att.key.weight"),
        ("NaN in the base", "NumericsError", "blocks.1.att.key.weight"),
        ("an adapter as the base", "LayoutError", "not a whole RWKV model"),
        ("targets", "ParameterError", "Did you mean att.key?"),
        ("no text", "ParameterError", "none.txt"),
        ("a second of another model", "LayoutError", "other"),
    ],
)
def test_what_is_wrong_leaves_nothing_but_word_of_it(run, made, base, tmp_path, case, error, words):
    lora, values = made("lora"), {}
    if case.startswith(("another", "a lack")):
        version, layers = ("6.0", 2) if case == "another generation" else ("7.0", 1 if case == "a lack of depth" else 3)
        values["base"] = str(write_model(tmp_path / "other.safetensors", make_layout(version, n_layer=layers)))
    (tmp_path / "garbage.pth").write_bytes(bytes(range(256)) * 40)
    adapter = {
        "missing": lambda: tmp_path / "none.pth",
        "garbage": lambda: tmp_path / "garbage.pth",
        "the base itself": lambda: base,
        "a copy of the base": lambda: made("model", size=0.0),
        "a fresh adapter": lambda: write_adapter(tmp_path / "fresh.pth", base, size=0.0, method="pissa", lora_r=2),
        "a state of zeros": lambda: made("state", size=0.0),
        "alpha of a state": lambda: made("state"),
        "another depth, a state": lambda: made("state"),
        "another depth, a model": lambda: made("model"),
        "NaN in an adapter": lambda: nan_in(lora, "blocks.1.att.key.lora_A"),
        "NaN in a state": lambda: nan_in(made("state"), "blocks.1.att.time_state"),
        "NaN in a model": lambda: nan_in(made("model"), "blocks.1.att.key.weight"),
    }.get(case, lambda: lora)()
    if case == "an adapter as the base":
        made("lora-besides")
    if case == "no alpha":
        with open_checkpoint(lora) as ck:
            write_checkpoint(adapter := tmp_path / "silent.pth", {n: ck[n] for n in ck})
    if case == "NaN in the base":
        values["base"] = str(nan_in(made("model", "base", size=0.0), "blocks.1.att.key.weight"))
    if case == "a second of another model":
        other = write_model(tmp_path / "other.safetensors", make_layout("7.0", n_layer=3))
        values["second"] = str(write_adapter(tmp_path / "other.pth", other, lora_r=2))
    values |= {
        "alpha of a state": {"alpha": 2.0},
        "unmerge": {"parameters": {"unmerge": True}},
        "three values": {"parameters": {"bat": ["hf", "hf", "hf"]}},
        "an adapter as the base": {"base": str(tmp_path / "lora-besides.pth")},
        "targets": {"targets": ["att.kye"]},
        "no text": {"data": str(tmp_path / "none.txt")},
    }.get(case, {})
    before = snapshot(tmp_path)
    with pytest.raises(RwkvLabError) as caught:
        run_all(run(adapter, **values))
    assert type(caught.value).__name__ == error and words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    found = json.loads((tmp_path / "report" / "result.json").read_text())
    assert found["status"] == "failed" and words in found["error"]["message"]
    after = snapshot(tmp_path)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    second, state = case == "a second of another model", case == "another depth, a state"  # found after the counts
    pictures = {"report/counts.png"} if second or state else set()
    pictures |= {f"report/{name}.png" for name in OF_MATRICES} if second else set()
    assert changed <= {"report", "report/result.json", "report/report.html"} | pictures


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"adapter": "demo:lora"}, "demo:base, demo:state"),
        ({"base": "/b.pth"}, "adapter is missing"),
        ({"targets": {}}, "-p targets att.key,ffn.key"),
        ({"adaptor": "x"}, "did you mean adapter?"),
    ],
)
def test_wrong_parameters_are_refused(values, says):
    with pytest.raises(ParameterError) as caught:
        read_parameters(parameters_of("peft"), values, names_are_all=True)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_what_is_said_of_two_adapters():
    given = {"alpha": 3.0, "pissa_init": ["", "/i.pth"], "parameters": {"bat": ["hf", None], "quant": "nf4"}}
    config = read_parameters(parameters_of("peft"), given, names_are_all=True)
    assert config.tuning_options(0) == TuningOptions(3.0, None, {"bat": "hf", "quant": "nf4"})
    assert config.tuning_options(1) == TuningOptions(None, "/i.pth", {})


def test_the_panel(run, made, monkeypatch):
    run = run(made("state"))
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    panel = panels.show_panel(run)
    panel.fields["adapter"].widget.text.value = str(made("lora"))
    panel.fields["rank"].widget.value = 2
    panel.fields["targets"].widget.value = "att.key"
    panel.buttons["Run"].click()
    assert panel.message.value == "" and result(run)["status"] == "ok"
    assert "share_of_rank_2" in result(run)["metrics"]["matrices"]["blocks.0.att.key"]
    assert '"use_rslora"' in panel.fields["parameters"].widget.placeholder


@pytest.mark.parametrize("many", [1, 33])
def test_figures_of_any_size(many):
    def spectrum(name):
        return Spectrum(name, (8, 8), torch.rand(8).double().sort(descending=True).values, 1.0, 1.0)

    spectra = [spectrum(f"blocks.{i}.att.m{kind}$_<b>") for i in (0, 1) for kind in range(min(many, 13))]
    spectra.append(replace(spectra[0], singular_values=torch.zeros(8).double()))
    cosines = {f"blocks.{i}.att.m{i % 3}.weight": 0.9 for i in range(many)} | {"blocks.0.a": math.nan, "emb": -1.0}
    costs = {f"layer {i}": 0.1 * i - 0.05 for i in range(many)}
    state = torch.randn(many, many, 4, 4).numpy()
    tokens = 3 * many - 2
    made = [
        peft_figures.counts_by_part({"att.key": (10_000, 100), "x": (0, 5)}, "s"),
        peft_figures.spectra_by_matrix(spectra, 8, "s"),
        peft_figures.ranks_by_matrix(spectra, "s"),
        peft_figures.cosine_map(cosines, "t", "s"),
        peft_figures.state_heads(state, "s"),
        peft_figures.head_map(abs(state[..., 0, 0]), abs(state[..., 1, 1]), 4, "s"),
        peft_figures.effect_by_position(torch.rand(3, tokens).numpy(), torch.randn(3, tokens).numpy(), "s"),
        peft_figures.ablation_costs([costs, {}], 0.2, "s"),
    ]
    for figure in made:
        assert png(figure).startswith(b"\x89PNG")
        assert figure.get_size_inches()[1] < 16
