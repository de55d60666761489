"""What an output says that it contains, after whole models were mixed: every adapter that any of them held."""

import json

import pytest
import torch
from models import random_lora, random_model

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.merge.provenance import adapters_in

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
