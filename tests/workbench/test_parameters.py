"""Every parameter is checked by name, type and range, and a refusal states what to do."""

import os

import pytest
import torch

from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.workbench.parameters import read_parameters
from rwkv_lab.workbench.registry import notebook_names, parameters_of

OWN = {"base": "b.pth", "tuned": "t.pth"}


def read(namespace, notebook="merge", names_are_all=True):
    return read_parameters(parameters_of(notebook), namespace, names_are_all)


def refusal(namespace, **kwargs) -> str:
    with pytest.raises(ParameterError) as caught:
        read(namespace, **kwargs)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


@pytest.mark.parametrize("notebook", notebook_names())
def test_defaults_are_valid(notebook):
    assert read({}, notebook).model_dump() == {n: f.default for n, f in parameters_of(notebook).model_fields.items()}


def test_unknown_name_lists_the_allowed_ones_and_the_nearest():
    message = refusal({"alhpa": 0.5})
    assert "'alhpa'" in message and "did you mean alpha?" in message and "overwrite" in message


def test_in_lab_a_persons_own_variables_are_no_parameters():
    assert read({"scratch": 3, "alpha": 0.5}, names_are_all=False).alpha == 0.5


def test_modules_functions_and_private_names_are_no_parameters():
    assert read({"os": os, "read": read, "_3": 3, "In": [""], "Out": {}}).alpha is None


@pytest.mark.parametrize(
    "name", ["alpha = print", "os.environ['X']", "alpha, base", "a = 1; import os; b", "_hidden", "dry_run: bool"]
)
def test_a_name_that_is_code_or_hidden_is_refused(name):
    """papermill writes `name = value` into a cell as it is."""
    with pytest.raises(ParameterError):
        read({"In": ["", f"# Parameters\n{name} = 1\n"]})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dry_run": "true"}, "spelled like this"),
        ({"dry_run": 1}, "boolean"),
        ({"alpha": "much"}, "valid number"),
        ({"alpha": True}, "valid number"),
        ({"alpha": float("nan")}, "finite"),
        ({"alpha": float("inf")}, "finite"),
        ({"alpha": "nan"}, "finite"),
        ({"base": ""}, "empty"),
        ({"base": "  "}, "empty"),
        ({"base": 12e4}, "-r base"),
        ({"base": "a\0b"}, "zero byte"),
        ({"base": "demo:bose"}, "demo:base"),
        ({"include": {}}, "-p include 'blocks.0.*'"),
        ({"include": [1]}, "valid string"),
        ({"include": [""]}, "empty"),
        ({"scan": "some"}, "'all' or 'changed'"),
        ({"method": "slurp"}, "did you mean slerp?"),
    ],
)
def test_wrong_values_are_refused(values, says):
    message = refusal(values)
    assert says in message and message.startswith(next(iter(values)))


def test_other_wrong_parameters_are_named_too():
    assert "Wrong too: dry_run, scan" in refusal({"alpha": "x", "dry_run": "x", "scan": "x"})


@pytest.mark.parametrize("notebook", ["train"])
@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": 10.0}, {"steps": True}, {"lr": 0}, {"kind": "fulll"}])
def test_wrong_values_of_train_are_refused(notebook, values):
    assert refusal(values, notebook=notebook).startswith(next(iter(values)))


def test_a_number_that_yaml_took_for_text_is_a_number():
    assert read({"alpha": "1e-3"}).alpha == 0.001
    assert read({"lr": "1e-3"}, "train").lr == 0.001


def test_a_whole_number_serves_where_a_fraction_may_stand():
    alpha = read({"alpha": 1}).alpha
    assert alpha == 1 and isinstance(alpha, float)


def test_paths_are_seen_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read(OWN)
    assert (config.base, config.out) == (str(tmp_path / "b.pth"), "")


@pytest.mark.parametrize(("given", "missing"), [("base", "tuned"), ("tuned", "base")])
def test_own_and_demo_files_are_not_mixed(given, missing, tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_LAB_DEMO", str(tmp_path))
    with pytest.raises(ParameterError, match=f"^{missing} is missing"):
        read({given: "own.pth"}).check_files()


def test_what_was_trained_on_the_demo_model_merges_into_it(demo_folder, tmp_path):
    read({"tuned": str(demo_folder / "demo-state.pth")}).check_files()
    torch.save({"blocks.0.att.time_state": torch.zeros(2, 64, 64)}, tmp_path / "other.pth")
    with pytest.raises(ParameterError, match="base is missing: (.|\n)*time_state(.|\n)*Give both"):
        read({"tuned": str(tmp_path / "other.pth")}).check_files()


def test_a_state_is_trained_on_some_model():
    assert refusal({"base": ""}, notebook="train").startswith("base is missing")
    assert read({"base": "", "kind": "pretrain"}, "train").base == ""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "full", "quant": "nf4"}, "kind='full' takes no quant"),
        ({"alpha": 3.0}, "alpha=3.0 goes with lora"),
        ({"targets": ["att.key"]}, "goes with lora, pissa, miss"),
        ({"patience": 2}, "eval_every"),
        ({"autocast": "float16"}, "CUDA"),
        ({"kind": "lora", "steps": 5, "warmup": 6}, "warmup=6"),
    ],
)
def test_parameters_of_a_training_go_together(values, says):
    assert says in refusal(values, notebook="train")
    assert read({"kind": "lora", "targets": ["att.key"], "rank": 4, "alpha": 3, "quant": "nf4"}, "train").rank == 4


def test_changing_is_all_or_nothing():
    config = read({})
    assert config.changed(alpha=0.5, scan="changed").alpha == 0.5
    with pytest.raises(ParameterError):
        config.changed(alpha=0.5, scan="some")
    with pytest.raises(ParameterError):
        config.changed(alhpa=0.5)
    assert config.alpha is None


def test_alpha_is_checked_against_the_method_that_auto_finds(demo_folder):
    files = {"base": str(demo_folder / "demo-base.pth"), "tuned": str(demo_folder / "demo-state.pth")}
    read({**files, "alpha": 1.0}).check_files()
    for namespace in ({**files, "alpha": 1.5}, {"alpha": 1.5}, {"alpha": -0.1}):
        with pytest.raises(ParameterError, match="alpha"):
            read(namespace).check_files()
    with pytest.raises(LayoutError, match="no tensor named .*lora_A"):
        read({**files, "method": "lora"}).check_files()
