"""The plan of a training: what it states from headers alone, and that it is what is executed."""

import os

import pytest
import torch
from models import LAYOUTS, random_model
from tiny_training import SHORT, sha256

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import TrainOptions, TrainSpec, make_plan, plan_training, run_training, train


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("version", ["4.0", "5.2", "6.0", "7.0"])
def test_plans_and_training_agree_on_every_generation(version, quant, texts, tmp_path):
    base = tmp_path / "base.pth"
    tensors = random_model(LAYOUTS[version], torch.float32, unused=True)
    wide = {"emb.weight": torch.randn(257, 16) * 0.1, "head.weight": torch.randn(257, 16) * 0.1}
    write_checkpoint(base, {name: t * 0.1 for name, t in tensors.items()} | wide)
    for kind in ("lora", "miss") if quant == "nf4" or version == "4.0" else ("full", "state", "lora"):
        settings = {} if kind in ("full", "state") else {"rank": 2}
        made = train(kind, tmp_path / f"{kind}.pth", str(texts), base, quant=quant, **settings, **SHORT | {"steps": 2})
        plan = plan_training(kind, base, quant=quant, **settings)
        assert (plan.count, plan.frozen) == (made.trained, made.frozen)


def test_a_plan_knows_what_a_quantised_base_saves(small):
    whole, packed = (plan_training("lora", small, rank=2, quant=quant) for quant in ("none", "nf4"))
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert whole.weights_bytes - packed.weights_bytes == matrices * 4 - matrices * 4.5 / 8
    assert whole.gradients_bytes == packed.gradients_bytes == 4 * whole.count
    small_steps = plan_training("full", small, gradient_checkpointing=True)
    assert small_steps.activations_bytes < plan_training("full", small).activations_bytes
    assert plan_training("pretrain").layout.n_embd == 128


@pytest.fixture
def plan(small, texts, tmp_path):
    """Of a LoRA, on a copy of the tiny model that a test may change."""
    base = tmp_path / "base.pth"
    base.write_bytes(small.read_bytes())
    short = {name: value for name, value in SHORT.items() if name != "samples"}
    return make_plan(TrainSpec.read(dict(kind="lora", base=base, data=str(texts), rank=2, **short)))


def test_the_plan_that_was_made_is_executed(plan, tmp_path):
    result = run_training(plan, tmp_path / "planned.pth", TrainOptions.read(dict(samples=False)))
    assert (result.trained, result.frozen) == (plan.count, plan.frozen)
    spec = {name: getattr(plan.spec, name) for name in TrainSpec.model_fields}
    assert sha256(train(out=tmp_path / "direct.pth", samples=False, **spec).out) == sha256(result.out)
    assert str(plan) == f"TrainPlan(lora of {plan.layout}: {plan.count:,} trained, {plan.frozen:,} frozen)"


@pytest.mark.parametrize("change", ["other bytes", "written again", "gone"])
def test_a_plan_whose_base_has_changed_is_refused(plan, change, tmp_path):
    base = tmp_path / "base.pth"
    if change == "gone":
        base.unlink()
    elif change == "written again":
        os.utime(base, ns=(0, plan.base_files[0].modified + 1))
    else:
        base.write_bytes(base.read_bytes() + b"x")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ParameterError, CorruptFileError), match="base.pth"):
        run_training(plan, tmp_path / "out.pth", TrainOptions.read({}))
    assert sorted(tmp_path.iterdir()) == before


def test_planning_leaves_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan_training("pretrain")
    assert torch.equal(torch.rand(3), expected)


def test_a_fresh_model_has_the_planned_size():
    plan, model = plan_training("pretrain", n_embd=64, n_layer=2, head_size=16), RWKV_Dual(64, 2, 257, head_size=16)
    assert plan.layout == model.layout
    assert [row[:2] for row in plan.trained] == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    with pytest.raises(ParameterError, match="n_embd a multiple of head_size=32"):
        plan_training("pretrain", n_embd=100)


def test_a_fresh_model_is_planned_without_being_made(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("made")

    monkeypatch.setattr(RWKV_Dual, "__init__", refuse)
    assert plan_training("pretrain", n_embd=2048, n_layer=24, head_size=64).count > 1_000_000_000


def test_what_cannot_be_planned_is_refused(small, tmp_path):
    with pytest.raises(ParameterError, match="rank 33 is larger than the layer"):
        plan_training("miss", small, rank=33)
    with pytest.raises(ParameterError, match="did you mean rank?"):
        plan_training("miss", small, rnak=3)
    write_checkpoint(tmp_path / "state.pth", {"blocks.0.att.time_state": torch.zeros(2, 16, 16)})
    with pytest.raises(LayoutError, match="whole model"):
        plan_training("lora", tmp_path / "state.pth")
