"""The functions behind modes.ipynb, without a kernel: models of every generation pass, a broken operator is placed."""

import json

import pytest
import torch
from models import LAYOUTS, random_model

from rwkv_lab import wkv
from rwkv_lab.analysis import agreement
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import DeviceError, KernelError, LayoutError, OutputError, ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.plotting import png
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.modes import cells as modes
from rwkv_lab.workbench.modes import figures as mode_figures
from rwkv_lab.workbench.parameters import read_parameters
from rwkv_lab.workbench.registry import parameters_of
from rwkv_lab.workbench.steps import run_all

SHORT = {"length": 64, "batch": 2}
pytestmark = pytest.mark.usefixtures("unpainted")


def calm(layout, seed=0) -> dict:
    """Random weights small enough for logits that differ."""
    return {name: t * 0.3 for name, t in random_model(layout, dtype=torch.float32, seed=seed).items()}


@pytest.fixture
def run(tmp_path):
    """run(model, **parameters) -> a run of modes.ipynb on these parameters."""
    return lambda model, **given: start("modes", {"report": str(tmp_path / "report"), "model": str(model), **given})


def result(run) -> dict:
    return json.loads((run.folder / "result.json").read_text())


def break_the_chunked_decay(monkeypatch):
    right = wkv._FORMS["wkv7"]["chunked"]
    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", lambda r, w, *rest: right(r, 1.5 * w, *rest))


@pytest.mark.parametrize("version", ["4.0", "6.0", "7.0"])  # what it compares: analysis/test_agreement.py, on all
def test_a_model_of_a_generation_passes(version, run, tmp_path, capsys):
    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS[version]))
    run = run(tmp_path / "m.pth", **SHORT)
    run_all(run)
    found = result(run)
    assert found["status"] == "ok" and found["metrics"]["version"] == version
    n_rows = 2 * sum(len(wkv.backends(getattr(torch, dtype))) for dtype in ("float64", "float32", "bfloat16"))
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) == n_rows * 3 + 6
    rows = found["metrics"]["rows"]
    assert {(row["mode"], row["backend"]) for row in rows} == {
        (mode, backend) for mode in ("transformer", "rnn") for backend in wkv.backends()
    }
    assert len(rows) == n_rows and found["metrics"]["mismatches"] == []
    assert "drawn at random" in found["metrics"]["tokens"]  # no tokenizer has eleven tokens
    assert [figure.split("/")[-1] for figure in found["figures"]] == [
        f"{name}.png" for name in ("agreement", "growth", "decays", "states", "heads")
    ]
    assert (run.folder / "report.html").read_text().count('src="data:image/png;base64,') == 5
    assert "there is no mismatch to look for" in capsys.readouterr().out


def test_a_packed_model_passes_with_dense_weights_of_its_values(run, tmp_path):
    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS["7.0"]))
    RWKV_Dual.from_pretrained(tmp_path / "m.pth", weights="int8").save_pretrained(tmp_path / "packed")
    run = run(tmp_path / "packed", **SHORT, dtypes=["float64"])
    run_all(run)
    found = result(run)
    assert found["status"] == "ok" and all(check["passed"] for check in found["checks"])
    (note,) = found["notes"]
    assert note.startswith("packed has weights in 8 or 4 bits.")
    rows = agreement.compare_modes(tmp_path / "packed", torch.randint(0, 11, (1, 32)), [torch.float64], ["reference"])
    assert all(row.passed for row in rows)


def test_a_wrong_decay_in_one_backend_fails_and_is_placed_in_words(run, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS["7.0"]))
    run = run(tmp_path / "m.pth", **SHORT, dtypes=["float32"])
    break_the_chunked_decay(monkeypatch)
    with pytest.raises(OutputError, match="transformer, chunked"):
        run_all(run)
    found = result(run)
    assert (found["status"], found["error"]["class"]) == ("failed", "OutputError")
    failed = {(row["mode"], row["backend"]) for row in found["metrics"]["rows"] if row["verdict"] == "FAIL"}
    assert failed == {("transformer", "chunked"), ("rnn", "chunked")}
    (said, _) = found["metrics"]["mismatches"]
    assert "float32, transformer, chunked beside float64" in said
    assert "in layer 0, from token 1 on" in said and "the WKV operator, whose inputs agree" in said
    report = (run.folder / "report.html").read_text()
    assert "Where the mismatch starts" in report and "from token 1 on" in report and "FAIL" in report
    assert "Do not use the output" not in report  # there is none


def test_a_run_that_has_no_good_one_of_its_dtype_is_laid_beside_float64(run, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS["7.0"]))
    run = run(tmp_path / "m.pth", **SHORT, dtypes=["float32"], backends=["chunked"])
    break_the_chunked_decay(monkeypatch)
    with pytest.raises(OutputError):
        run_all(run)
    assert all(" beside float64: The runs part in layer 0" in said for said in result(run)["metrics"]["mismatches"])


def test_a_backend_that_does_not_run_is_neither_passed_nor_failed(run, tmp_path, monkeypatch):
    def none(*_):
        raise KernelError("there is no compiler")

    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS["7.0"]))
    run = run(tmp_path / "m.pth", **SHORT, dtypes=["float32"], backends=["reference", "chunked"])
    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", none)
    rows = modes.compare(run, modes.load(run))
    modes.show_growth(run, modes.load(run), rows)
    assert [row.problem for row in rows] == ["", "there is no compiler"] * 2
    assert run.record.failed_checks == []


def test_two_files_part_where_a_weight_was_changed(run, tmp_path, capsys):
    tensors = calm(LAYOUTS["6.0"])
    write_checkpoint(tmp_path / "good.pth", tensors)
    wrong = tensors["blocks.1.att.value.weight"].clone()
    wrong[3, 5] += 0.1
    write_checkpoint(tmp_path / "bad.pth", tensors | {"blocks.1.att.value.weight": wrong})
    run = run(tmp_path / "good.pth", **SHORT, compare_with=str(tmp_path / "bad.pth"))
    modes.compare_files(run, modes.load(run))
    said = capsys.readouterr().out
    assert "bad.pth beside good.pth" in said and "in layer 1, from token 0 on, at v, the value" in said
    assert [check.passed for check in run.record.checks] == [False] and len(run.record.inputs) == 2
    run.configure(compare_with=str(tmp_path / "good.pth"))
    modes.compare_files(run, modes.load(run))
    assert [check.passed for check in run.record.checks] == [True]


def test_two_files_of_different_layouts_are_refused_at_once(run, tmp_path):
    for version in ("6.0", "7.0"):
        write_checkpoint(tmp_path / f"{version}.pth", calm(LAYOUTS[version]))
    with pytest.raises(LayoutError, match="cannot be compared"):
        modes.load(run(tmp_path / "6.0.pth", compare_with=str(tmp_path / "7.0.pth")))


def test_a_model_that_memory_does_not_hold_is_refused_before_it_is_read(run, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS["7.0"]))
    run = run(tmp_path / "m.pth")
    monkeypatch.setattr(agreement, "memory_free", lambda: 1000)
    with pytest.raises(DeviceError, match=r"m.pth needs .* of memory"):
        modes.load(run)


def test_models_of_bytes_read_text(run, demo_folder):
    subject = modes.load(run("demo:base", length=50_000, batch=2))  # more than there is: it begins again
    assert subject.tokens.shape == (2, 50_000) and "held-out text" in subject.source
    assert subject.tokens.max() < 256 and bytes(subject.tokens[0, :200].tolist()).isascii()


def test_too_few_tokens_say_nothing_about_growth(run, tmp_path):
    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS["5.2"]))
    run = run(tmp_path / "m.pth", length=16, batch=1, dtypes=["float32"], backends=["reference", "chunked"])
    run_all(run)
    growth = [check for check in result(run)["checks"] if "error at the end" in check["name"]]
    assert len(growth) == 4 and all(check["passed"] is None for check in growth)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"length": 8}, "greater than or equal to 16"),
        ({"batch": 0}, "greater than or equal to 1"),
        ({"dtypes": []}, "it is empty"),
        ({"dtypes": ["int8"]}, "'float64'"),
        ({"dtypes": {}}, "-p dtypes float64,float32"),
        ({"backends": ["fast"]}, "reference, chunked"),
        ({"model": ""}, "empty"),
    ],
)
def test_wrong_parameters_are_refused(values, says):
    with pytest.raises(ParameterError) as caught:
        read_parameters(parameters_of("modes"), values, names_are_all=True)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_the_panel(run, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m.pth", calm(LAYOUTS["4.0"]))
    run = run("demo:base")
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    panel = panels.show_panel(run)
    panel.fields["model"].widget.text.value = str(tmp_path / "m.pth")
    panel.fields["length"].widget.value = 20
    panel.fields["dtypes"].widget.value = ("float32",)
    panel.buttons["Run"].click()
    assert result(run)["status"] == "ok" and result(run)["metrics"]["version"] == "4.0"
    assert result(run)["parameters"]["dtypes"] == ["float32"]


@pytest.mark.parametrize("n_layer", [1, 32])
def test_figures_for_any_depth(n_layer):
    decays = [torch.full((1, 4, 2, 8), -(2.0 ** -(i + 1))).numpy() for i in range(n_layer)]
    decays[0][..., 0] = 0  # no decay: a half-life without end
    figures = [
        mode_figures.half_lives(decays, "s"),
        mode_figures.state_sizes([1, 2], torch.rand(2, n_layer).numpy(), "RMS", "s"),
        mode_figures.state_images(torch.randn(n_layer, 8, 8).numpy(), "t", "s", "down", "across", "head"),
        mode_figures.state_images(torch.zeros(1, n_layer, 16).numpy(), "t", "s", "down", "across", ""),
    ]
    for figure in figures:
        assert png(figure).startswith(b"\x89PNG")
        assert figure.get_size_inches()[1] < 8
