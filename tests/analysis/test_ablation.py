"""An ablation against models from which the same part of the tuning was really taken."""

from dataclasses import replace

import pytest
import torch
from random_models import make_layout, write_model
from tuned_files import write_adapter, write_tuned

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis import tuned_model
from rwkv_lab.analysis.ablation import measure_ablation
from rwkv_lab.analysis.texts import held_out_excerpts
from rwkv_lab.analysis.tuning import open_tuning
from rwkv_lab.model import bits_per_byte
from rwkv_lab.peft import load_adapter, open_adapter

KINDS = ("lora", "lora-besides", "pissa-nf4", "bat-int8", "state", "model", "norms")


@pytest.fixture(scope="module")
def text():
    return held_out_excerpts("english", 3, 200)


def measured(base, path, text, names=None):
    with open_tuning(base, path) as t:
        return measure_ablation(t, names or t.changed_names(), text)


def test_a_layer_ablated_is_an_adapter_without_it(base, tmp_path, text):
    path = write_tuned(tmp_path / "t.pth", base, "lora")
    found = measured(base, path, text)

    def bits(keep):
        model = RWKV_Dual.from_pretrained(base).requires_grad_(False)
        with open_adapter(path) as adapter:
            targets = {x: t for x, t in adapter.targets.items() if keep(x)}
            if targets:
                load_adapter(model, replace(adapter, targets=targets))
        return pytest.approx(bits_per_byte(model, text, 256), rel=1e-5)

    assert found.measured and found.tuned == bits(lambda x: True) and found.base == bits(lambda x: False)
    assert found.layers == {f"layer {i}": bits(lambda x, i=i: f"blocks.{i}." not in x) for i in (0, 1)}
    assert found.parts["ffn.value"] == bits(lambda x: not x.endswith("ffn.value")) and len(found.parts) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_checks_of_every_kind_pass(kind, base, tmp_path, text):
    found = measured(base, write_tuned(tmp_path / "t.pth", base, kind), text)
    same, back = found.checks
    assert back.passed and back.value == 0
    assert same.reason == "a part of a model does not run by itself" if kind == "norms" else same.passed
    assert ("outside the layers" in found.layers) == (kind in ("lora-besides", "model", "norms"))
    assert (found.parts == {}) == (kind in ("state", "norms")) and found.base != found.tuned


def test_names_choose_what_is_ablated(base, tmp_path, text):
    path = write_tuned(tmp_path / "t.pth", base, "lora")
    found = measured(base, path, text, ["blocks.1.att.key.weight", "blocks.1.ffn.key.weight"])
    assert list(found.layers) == ["layer 1"] and list(found.parts) == ["att.key", "ffn.key"]


def test_a_model_that_does_not_fit_into_memory(base, tmp_path, text, monkeypatch):
    monkeypatch.setattr(tuned_model, "memory_free", lambda: 1000)
    found = measured(base, write_tuned(tmp_path / "t.pth", base, "state"), text)
    (check,) = found.checks
    assert not found.measured and check.name == "which layers' tuning matters" and "1 kB are free" in check.reason


def test_a_vocabulary_that_tells_no_tokenizer(tmp_path, text):
    base = write_model(tmp_path / "b.safetensors", make_layout("6.0"))
    found = measured(base, write_adapter(tmp_path / "a.safetensors", base, lora_r=2), text)
    same, check = found.checks
    assert not found.measured and same.passed and "tokenizer" in check.reason


def test_a_tuning_that_is_not_what_was_trained_fails(base, tmp_path, text, monkeypatch):
    monkeypatch.setattr(tuned_model, "load_adapter", lambda *_: None)
    found = measured(base, write_tuned(tmp_path / "t.pth", base, "lora", size=0.5), text)
    assert [check.passed for check in found.checks] == [False, True]


def test_a_part_that_does_not_come_back_fails(base, tmp_path, text, monkeypatch):
    path = write_tuned(tmp_path / "t.pth", base, "lora")
    with open_tuning(base, path) as t:
        right, calls = type(t).after, []

        def drifts(self, name):
            calls.append(name)
            return right(self, name) * (1 + 0.01 * (len(calls) > len(t.names())))

        monkeypatch.setattr(type(t), "after", drifts)
        found = measure_ablation(t, t.names(), text)
    assert [check.passed for check in found.checks] == [True, False]
    assert torch.isfinite(torch.tensor([found.base, found.tuned])).all()
