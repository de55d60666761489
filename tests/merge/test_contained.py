"""What an output says that it contains, after whole models were mixed: every adapter that any of them held."""

import json

import pytest
import torch
from models import random_lora, random_model

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.merge.contained_adapters import adapters_in

CASES = {
    "overlay": {},
    "linear": {"weights": [1, 1, 1]},
    "slerp": {},
    "task_arithmetic": {"alpha": 0.5},
    "ties": {},
    "model_stock": {},
    "passthrough": {"parameters": {"layers": ["base[0:1]", "tuned[1:2]", "tuned2[1:2]"]}},
}


@pytest.fixture
def models(tmp_path):
    """plain.pth, and a.pth and b.pth: others that hold a.lora.pth, and both a.lora.pth and b.lora.pth."""
    for seed, name in enumerate(("plain", "one", "two")):
        torch.save(random_model(seed=seed), tmp_path / f"{name}.pth")
    for seed, name in enumerate(("a", "b")):
        torch.save(random_lora(seed=seed, full=False), tmp_path / f"{name}.lora.pth")
    loras = [tmp_path / "a.lora.pth", tmp_path / "b.lora.pth"]
    merge(tmp_path / "one.pth", loras[0], tmp_path / "a.pth", alpha=4)
    merge(tmp_path / "two.pth", loras, tmp_path / "b.pth", alpha=4)
    return tmp_path


def names(path) -> list[str]:
    with open_checkpoint(path) as ck:
        return [one["name"] for one in adapters_in(ck)]


@pytest.mark.parametrize("method", CASES)
def test_adapters_in_any_of_the_models_are_known_again(method, models):
    tuned = [models / "b.pth"] if method in ("overlay", "slerp") else [models / "a.pth", models / "b.pth"]
    result = merge(models / "plain.pth", tuned, models / "o.safetensors", method=method, **CASES[method])
    assert all(c.passed for c in (*result.checks, *verify_merge(result)))
    assert names(result.out) == ["a.lora.pth", "b.lora.pth"]
    beside = json.loads((models / "o.safetensors.json").read_text())
    assert [one["name"] for one in beside["contains"]] == ["a.lora.pth", "b.lora.pth"]
    with pytest.raises(ParameterError, match="contains b.lora.pth already"):
        merge(result.out, models / "b.lora.pth", models / "p.pth", alpha=4)


def test_the_base_keeps_its_own_where_nothing_goes_in(models):
    for method in ("overlay", "task_arithmetic"):
        merge(models / "a.pth", [models / "b.pth"], models / f"{method}.pth", method=method, alpha=0)
        assert names(models / f"{method}.pth") == ["a.lora.pth"]
    merge(models / "a.pth", [models / "plain.pth"], models / "o.pth", method="slerp")
    assert names(models / "o.pth") == ["a.lora.pth"]


@pytest.fixture
def held(tmp_path):
    """merge(base, adapters, name, …) of small files by name, and the paths."""
    torch.save({n: t.float() for n, t in random_model().items()}, tmp_path / "base.pth")
    for seed, name in enumerate(("a", "b")):
        torch.save(random_lora(seed=seed, full=False), tmp_path / f"{name}.pth")

    def run(base, adapters, out, **given):
        adapters = [tmp_path / f"{a}.pth" for a in adapters]
        return merge(tmp_path / f"{base}.pth", adapters, tmp_path / f"{out}.pth", **{"alpha": 4, **given})

    return run


UNDO = {"unmerge": True}


@pytest.mark.parametrize(
    ("in_by", "out_by", "says"),
    [
        ({}, {"alpha": 8}, "a.pth was merged .*with scaling .*alpha and use_rslora"),
        ({}, {"parameters": UNDO | {"use_rslora": True}}, "scaling"),
        ({"weights": [0.5]}, {}, "with weight 0.5; .* weights as it was then"),
        ({"include": ["blocks.0.*"]}, {}, "with include .*blocks.0"),
        ({}, {"include": ["blocks.0.*"]}, "with include None"),
        ({}, {"exclude": ["blocks.0.*"]}, "with exclude None"),
    ],
)
def test_what_is_taken_out_is_what_went_in(in_by, out_by, says, held):
    held("base", "a", "m", **in_by)
    with pytest.raises(ParameterError, match=says.replace(" .*", "(.|\n)*")):
        held("m", "a", "back", **{"parameters": UNDO, **out_by})
    back = held("m", "a", "back", **in_by, parameters=UNDO).out
    with open_checkpoint(back) as found, open_checkpoint(back.with_name("base.pth")) as before:
        for name in before.info:
            torch.testing.assert_close(found[name], before[name], rtol=1e-5, atol=1e-5)
        assert not adapters_in(found)


def test_what_is_not_in_there_is_not_taken_out(held):
    held("base", "a", "m")
    with pytest.raises(ParameterError, match="contains a.pth, its provenance says so, and not b.pth"):
        held("m", "b", "n", parameters=UNDO)
    held("m", "a", "back", parameters=UNDO)
    with pytest.raises(ParameterError, match="a.pth was taken out of .*back.pth already"):
        held("back", "a", "n", parameters=UNDO)
    # Merged by a program that says nothing of it.
    notes = held("base", "b", "n", parameters=UNDO, dry_run=True).plan.notes
    assert any("Nothing in the base's provenance says that it contains this adapter, b.pth" in n for n in notes)


def test_the_same_adapter_twice_in_one_list(held, tmp_path):
    (tmp_path / "copy.pth").write_bytes((tmp_path / "a.pth").read_bytes())
    with pytest.raises(ParameterError, match="a.pth and copy.pth are the same adapter"):
        held("base", ["a", "b", "copy"], "m")


def test_what_went_through_a_mix_is_not_taken_out(models):
    result = merge(models / "plain.pth", [models / "a.pth"], models / "o.pth", method="slerp")
    with pytest.raises(ParameterError, match="mix of models"):
        merge(result.out, models / "a.lora.pth", models / "p.pth", alpha=4, parameters=UNDO)


def test_a_state_leaves_the_adapters_as_they_are(models):
    torch.save({"head.weight": random_model(seed=5)["head.weight"]}, models / "head.pth")
    result = merge(models / "a.pth", models / "head.pth", models / "o.pth")
    merge(result.out, models / "a.lora.pth", models / "p.pth", alpha=4, parameters=UNDO)
    assert not names(models / "p.pth") and names(result.out) == ["a.lora.pth"]


def test_an_alpha_of_zero_in_a_list_adds_nothing_of_that_adapter(held, tmp_path):
    one = held("base", "b", "one")
    both = held("base", ["a", "b"], "both", alpha=[0, 4])
    assert all(c.passed for c in verify_merge(both)) and names(both.out) == ["b.pth"]
    with open_checkpoint(one.out) as x, open_checkpoint(both.out) as y:
        assert all(torch.equal(x[n], y[n]) for n in x.info)
    none = held("base", "a", "none", alpha=[0])
    with open_checkpoint(none.out) as x, open_checkpoint(tmp_path / "base.pth") as y:
        assert all(torch.equal(x[n], y[n]) for n in y.info) and not adapters_in(x)


def test_a_note_where_an_adapter_leaves_layers_alone(held, tmp_path):
    lora = {n: t for n, t in random_lora(full=False).items() if n.startswith("blocks.0.")}
    torch.save(lora, tmp_path / "shallow.pth")
    assert any("shallow.pth adapts 1 of 2 layers" in n for n in held("base", ["shallow"], "m", dry_run=True).plan.notes)
    assert not any("layers" in n for n in held("base", "a", "m", dry_run=True).plan.notes)
