"""Presets of a training by the size of its model: what they set, where they look, what they leave alone."""

import json

import pytest

from rwkv_lab.errors import ParameterError
from rwkv_lab.train import TrainSpec, plan_training, presets, train
from rwkv_lab.train.presets import PRESETS
from rwkv_lab.workbench.registry import parameters_of


@pytest.fixture(scope="module")
def base(demo_folder):
    return demo_folder / "demo-base.pth"


@pytest.mark.parametrize(
    ("kind", "size", "lr", "rank"),
    [
        ("pretrain", "0.1B", 6e-4, None),
        ("pretrain", "1.5B", 3e-4, None),
        ("pretrain", "7B", 1.5e-4, None),
        ("full", "1.5B", 1e-5, None),
        ("lora", "0.4B", 1e-4, 8),
        ("pissa", "2.9B", 2e-5, 32),
        ("state", "0.1B", 1.0, None),
    ],
)
def test_a_named_size_sets_what_is_not_given(kind, size, lr, rank, base):
    plan = plan_training(kind, base, preset=size, batch_size=2)
    assert (plan.spec.lr, plan.spec.ctx_len, plan.spec.batch_size, plan.spec.rank) == (lr, 512, 2, rank)
    (note,) = plan.notes
    assert note.startswith(f"The preset for {size} set ctx_len 512") and f"lr {lr:g}" in note
    assert "batch_size" not in note  # it was given
    assert ("a value to start from" in note) == (kind == "pretrain" and size == "7B")


def test_auto_looks_at_the_size_of_the_fresh_model():
    found = [
        TrainSpec.read({"kind": "pretrain", "preset": "auto", "n_embd": c, "n_layer": n}).preset_settings()[0]
        for c, n in ((128, 3), (768, 12), (1024, 24), (2048, 24), (2560, 32), (4096, 32))
    ]
    assert found == ["", *PRESETS]


def test_auto_leaves_a_small_base_with_the_kinds_own_numbers(base):
    plan = plan_training("lora", base, preset="auto")
    plain = plan_training("lora", base)
    assert plan.spec == plain.spec and "set nothing: the model is smaller" in plan.notes[0] and plain.notes == ()


def test_auto_reads_the_size_of_the_base_from_its_header(base, monkeypatch):
    monkeypatch.setattr(presets, "_SMALLEST", 1000)
    spec = TrainSpec.read({"kind": "lora", "base": str(base), "preset": "auto"})
    assert spec.preset_settings()[0] == "0.1B" and spec.effective("lr") == 1e-4


def test_a_size_that_there_is_not_is_refused_with_those_there_are(base):
    with pytest.raises(ParameterError, match=r"preset='3B': it should be one of '', auto, 0.1B"):
        plan_training("lora", base, preset="3B")


def test_the_result_says_what_was_set_and_holds_it(base, tmp_path):
    result = train("state", tmp_path / "s.pth", base=base, preset="0.1B", steps=1, batch_size=1, ctx_len=16)
    assert result.notes[0] == "The preset for 0.1B set lr 1."
    assert json.dumps(result.notes)


def test_the_panel_shows_the_numbers_of_the_preset(base):
    values = {name: field.default for name, field in parameters_of("train").model_fields.items()}
    given = values | {"kind": "lora", "base": str(base), "preset": "2.9B"}
    found = parameters_of("train").stands_for(given)
    assert (found["lr"], found["rank"], found["alpha"], found["ctx_len"]) == (1e-4, 32, 64, 512)
    assert parameters_of("train").stands_for(values | {"preset": "auto"})["lr"] == 1.0  # the demo model is small
