"""Counts, spectra and directions of tunings, against the same numbers computed in another way."""

import math

import pytest
import torch
from tuned_files import ADAPTERS, write_tuned

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis.changes import compare_directions, count_values, measure_changes
from rwkv_lab.analysis.tuning import TuningOptions, open_tuning
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.peft import count_parameters, load_adapter, open_adapter


def counted(base, path):
    with open_tuning(base, path) as t:
        return count_values(t, t.changed_names())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_counts_are_those_of_the_model_that_is_trained(kind, base, tmp_path):
    path = write_tuned(tmp_path / "t.pth", base, kind)
    model = RWKV_Dual.from_pretrained(base)
    with open_adapter(path) as adapter:
        load_adapter(model, adapter)
    expected, found = count_parameters(model), counted(base, path)
    assert (found.trained, found.frozen) == (expected.trained, expected.frozen)


def test_counts_of_a_state_and_of_fine_tunes(base, tmp_path):
    with open_checkpoint(base) as ck:
        total = sum(t.numel for t in ck.info.values())
        norms = sum(t.numel for n, t in ck.info.items() if "ln" in n)
    expected = {"state": (2 * 2 * 16 * 16, total), "model": (total, 0), "norms": (norms, total - norms)}
    for kind, (trained, frozen) in expected.items():
        found = counted(base, write_tuned(tmp_path / f"{kind}.pth", base, kind))
        assert (found.trained, found.frozen) == (trained, frozen)
        assert sum(there for there, _ in found.parts.values()) == total
    assert found.parts["ln"] == (norms, norms)


def test_a_known_change_is_measured_as_it_is(base, tmp_path):
    with open_checkpoint(base) as ck:
        tensors = {n: ck[n].double() for n in ck}
    weight = tensors["blocks.1.att.key.weight"]
    u, s, v = torch.linalg.svd(weight)
    # Singular values of the change: 3 and 1 times the base's largest.
    change = 3 * s[0] * u[:, :1] @ v[:1] + s[0] * u[:, 1:2] @ v[1:2]
    tensors["blocks.1.att.key.weight"] = weight + change
    tensors["blocks.0.ln1.weight"] = 1.5 * tensors["blocks.0.ln1.weight"]
    write_checkpoint(tmp_path / "t.pth", tensors)
    with open_tuning(base, tmp_path / "t.pth") as t:
        assert t.changed_names() == ["blocks.0.ln1.weight", "blocks.1.att.key.weight"]
        found = measure_changes(t, t.changed_names())
    assert found.others == {"blocks.0.ln1.weight": pytest.approx(0.5)}
    (spectrum,) = found.spectra
    assert spectrum.name == "blocks.1.att.key" and spectrum.metrics(rank=1) == {
        "relative": pytest.approx(math.sqrt(10) * float(s[0]) / float(weight.norm())),
        "relative_spectral": pytest.approx(3),
        "effective_rank": pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        "rank_90": 1,
        "rank_99": 2,
        "share_of_rank_1": pytest.approx(0.9),
    }
    assert [check.passed for check in found.checks] == [True]


def test_a_spectrum_that_is_not_the_changes_fails(base, tmp_path, monkeypatch):
    with open_tuning(base, write_tuned(tmp_path / "t.pth", base, "lora")) as t:
        right = type(t).delta
        monkeypatch.setattr(type(t), "delta", lambda self, name: 1.00001 * right(self, name))
        assert [check.passed for check in measure_changes(t, t.changed_names()).checks] == [False]


def test_directions(base, tmp_path):
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g)
    other = torch.linalg.qr(torch.cat([B, torch.randn(32, 2, generator=g)], 1)).Q[:, 2:]  # no direction of B in it
    key, value, rest = ("blocks.0.att.key.lora_", "blocks.1.att.value.lora_", "blocks.1.att.output.lora_")
    one = {key + "A": A, key + "B": B, value + "A": A, value + "B": B, rest + "A": A, rest + "B": B}
    write_checkpoint(tmp_path / "1.pth", one)
    write_checkpoint(tmp_path / "2.pth", {key + "A": A, key + "B": -3 * B, value + "A": A, value + "B": other})
    with (
        open_tuning(base, tmp_path / "1.pth", TuningOptions(alpha=4)) as first,
        open_tuning(base, tmp_path / "2.pth", direction_only=True) as second,
    ):
        found = compare_directions(first, second, first.changed_names())
    assert found.cosines == {
        "blocks.0.att.key.weight": pytest.approx(-1),
        "blocks.1.att.value.weight": pytest.approx(0, abs=1e-6),
    }
    assert set(found.chance.values()) == {1 / 32}
