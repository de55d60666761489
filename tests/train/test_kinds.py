"""Each kind of training: what it trains, what it writes, and what is refused."""

import json

import pytest
import torch
from pairwise import each
from tiny_training import LRS, SHORT, sha256

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.train import (
    TrainSpec,
    compare_methods,
    load_corpus,
    open_trained,
    plan_training,
    train,
)

PLAIN = [(kind, "none") for kind in ("full", "state", "lora", "pissa", "miss")]
PACKED = each(("state", "lora", "miss", "pissa"), ("int8", "nf4"))


def held_out_bits(model, data, ctx_len) -> float:
    from rwkv_lab.model import bits_per_byte

    return bits_per_byte(model, load_corpus(str(data)).held_out, ctx_len)


@pytest.mark.parametrize(("kind", "quant"), PLAIN + PACKED)
def test_a_kind_learns_and_its_file_is_what_was_trained(kind, quant, small, texts, tmp_path):
    before = sha256(small)
    settings = dict(base=small, data=str(texts), lr=LRS[kind], quant=quant, **SHORT | {"steps": 20})
    result = train(kind, tmp_path / "out.safetensors", **settings)
    assert result.bits_after < result.bits_before and sha256(small) == before
    again = open_trained(TrainSpec.read(dict(kind=kind, base=small, quant=quant)), result.out)
    # The same values in the same arithmetic; only batches of other sizes are summed in another order.
    assert held_out_bits(again, texts, SHORT["ctx_len"]) == pytest.approx(result.bits_after, rel=1e-6)
    plan = plan_training(kind, small, quant=quant)
    assert (plan.count, plan.frozen) == (result.trained, result.frozen)
    with open_checkpoint(result.out) as ck:
        assert ck.kind == {"full": "model"}.get(kind, kind)
    assert sha256(train(kind, tmp_path / "again.safetensors", **settings).out) == sha256(result.out)


def test_targets_parts_and_alpha_reach_the_adapter(small, texts, tmp_path):
    chosen = dict(targets=["att.key"], train_parts=["ln", "time_state"], rank=2, alpha=3.0)
    result = train("lora", tmp_path / "out.safetensors", str(texts), small, **SHORT, **chosen)
    with open_checkpoint(result.out) as ck:
        assert ck["blocks.0.att.key.lora_A"].shape == (2, 32) and "blocks.0.att.value.lora_A" not in ck
        assert "blocks.1.att.time_state" in ck and "ln_out.bias" in ck
    assert plan_training("lora", small, **chosen).count == result.trained
    folder = train("lora", tmp_path / "folder", str(texts), small, **SHORT, targets=["att.key"], rank=2, alpha=3.0).out
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 3


def test_accumulated_batches_are_one_large_batch(small, texts, tmp_path):
    """The same windows, in one pass or four; sums of float32 in another order."""
    settings = dict(base=small, data=str(texts), steps=4, ctx_len=16, samples=False, lr=1e-3, dtype="float64")
    one = train("full", tmp_path / "one.pth", batch_size=8, **settings)
    four = train("full", tmp_path / "four.pth", batch_size=2, accumulate=4, **settings)
    assert four.losses == pytest.approx(one.losses, rel=1e-9)
    lean = train("full", tmp_path / "lean.pth", batch_size=8, gradient_checkpointing=True, **settings)
    assert lean.losses == pytest.approx(one.losses, rel=1e-9)


@pytest.mark.parametrize("kind", ["full", "lora", "state"])
def test_autocast_and_bfloat16_models_stay_near_float32(kind, small, texts, tmp_path):
    settings = dict(base=small, data=str(texts), lr=LRS[kind], quant="nf4" if kind == "lora" else "none", **SHORT)
    exact = train(kind, tmp_path / "exact.pth", **settings)
    for name, how in (("auto.pth", {"autocast": "bfloat16"}), ("half.pth", {"dtype": "bfloat16"})):
        if kind == "full" and "dtype" in how:
            continue  # updates of bfloat16 weights are mostly rounded away
        rough = train(kind, tmp_path / name, **settings, **how)
        # bfloat16 has 8 bits: half a per cent a product, over two layers.
        assert rough.losses == pytest.approx(exact.losses, rel=0.02)
        with open_checkpoint(rough.out) as ck:
            assert ck[next(iter(ck))].dtype == torch.float32


def test_the_log_says_what_happened(small, texts, tmp_path):
    seen = []
    arguments = dict(eval_every=2, log_folder=tmp_path / "log", on_step=lambda step, losses: seen.append(step))
    result = train("lora", tmp_path / "out.pth", str(texts), small, **SHORT, **arguments)
    rows = (tmp_path / "log" / "log.csv").read_text().splitlines()
    assert rows[0] == "step,loss,lr,grad_norm,tokens,held_out,seconds" and len(rows) == 7
    assert [float(row.split(",")[1]) for row in rows[1:]] == result.losses
    assert float(rows[2].split(",")[5]) == result.held_out[0][1] and rows[1].split(",")[5] == ""
    log = json.loads((tmp_path / "log" / "log.json").read_text())
    assert log["settings"]["kind"] == "lora" and log["bits_after"] == result.bits_after and seen == [1, 2, 3, 4, 5, 6]


def test_methods_are_compared_at_equal_parameters(small, texts):
    found = compare_methods(small, str(texts), steps=8, batch_size=4, ctx_len=16)
    assert [c.method for c in found] == ["lora", "pissa", "miss", "state"]
    assert {c.trained for c in found} == {2 * 2 * 16 * 16} and [c.rank for c in found] == [2, 2, 4, None]
    # Before the first step all are the base's function; each method's layers add up in another order, and float32
    # rounds at 6e-8.
    assert [c.bits_before for c in found] == pytest.approx([found[0].bits_before] * 4, rel=1e-6)
    with pytest.raises(ParameterError, match="no method 'full'"):
        compare_methods(small, methods=["full"])


def test_what_does_not_go_together_is_refused(small, texts, tmp_path):
    cases = [
        ("full", dict(quant="nf4"), "quant='nf4' goes with state, lora"),
        ("lora", dict(quant="int3"), "quant='int3'"),
        ("miss", dict(alpha=1.0), "alpha=1.0 goes with lora"),
        ("state", dict(targets=["att.key"]), "goes with lora, pissa, miss"),
        ("lora", dict(targets=["att.kye"]), "targets: the pattern 'att.kye'(.|\n)*att.key"),
        ("lora", dict(rank=33), "larger than the layer"),
        ("lora", dict(rank=0), "rank=0"),
        ("lora", dict(autocast="float16"), "CUDA"),
        ("lora", dict(autocast="bfloat16", dtype="bfloat16"), "float32"),
        ("lora", dict(patience=2), "eval_every"),
        ("lora", dict(lr="a"), "lr='a': it should be a valid number"),
        ("lora", dict(seed="a"), "seed='a': it should be a valid integer"),
        ("lora", dict(seed=2**64), "less than 9223372036854775808"),
        ("lora", dict(steps=1.5), "steps=1.5: it should be a valid integer"),
        ("lora", dict(steps=True), "steps=True"),
        ("lora", dict(device="meta"), "device='meta'"),
        ("lora", dict(device="foo"), "no device 'foo'"),
        ("lora", dict(train_parts="ln"), "train_parts='ln': it should be a valid list"),
        ("lora", dict(on_step=3), "on_step=3: it should be callable"),
        ("state", dict(rank=4), "rank=4 goes with lora, pissa, miss"),
        ("lora", dict(warmup=7), "warmup=7"),
        ("lora", dict(accumulate=0), "accumulate=0"),
        ("lora", dict(parallel="tp"), "'ddp' or 'fsdp'"),
        ("lora", dict(checkpoint_every=-1), "checkpoint_every=-1"),
        ("lora", dict(device="cuda"), "CUDA") if not torch.cuda.is_available() else ("lora", dict(rank=-1), "rank"),
    ]
    for kind, arguments, words in cases:
        with pytest.raises(ParameterError, match=words):
            train(kind, tmp_path / "out.pth", str(texts), small, **SHORT | arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_a_folder_cannot_hold_is_refused_before_the_first_step(small, texts, tmp_path):
    def on_step(step, losses):
        raise AssertionError("trained")

    for kind, arguments, words in (
        ("lora", dict(train_parts=["time_state"]), "holds whole modules only"),
        ("pissa", dict(quant="nf4"), "PiSSA on a base in nf4"),
        ("pissa", dict(quant="int8"), "pth"),
    ):
        with pytest.raises(ParameterError, match=words):
            train(kind, tmp_path / "folder", str(texts), small, **SHORT | arguments, on_step=on_step)
    assert list(tmp_path.iterdir()) == []


def test_float16_gradients_are_scaled_and_overflowing_steps_left_out(small, texts, tmp_path, monkeypatch):
    """Meant for CUDA; a CPU does the same arithmetic slowly. The first scale, 65536, overflows on purpose."""
    from rwkv_lab.train import fitting, spec

    monkeypatch.setattr(spec, "check_device", lambda device, autocast: None)
    make = torch.amp.GradScaler
    monkeypatch.setattr(fitting.torch.amp, "GradScaler", lambda *a, **k: make(*a, **k, init_scale=2.0**24))
    settings = dict(base=small, data=str(texts), lr=1e-2, **SHORT | {"steps": 20})
    exact = train("lora", tmp_path / "exact.pth", **settings)
    rough = train("lora", tmp_path / "rough.pth", autocast="float16", log_folder=tmp_path, **settings)
    steps = json.loads((tmp_path / "log.json").read_text())["steps"]
    left_out = sum(row["grad_norm"] is None for row in steps)
    assert 0 < left_out < 20 and rough.bits_after < rough.bits_before
    assert rough.losses[0] == pytest.approx(exact.losses[0], rel=2e-3)  # float16 has 11 bits
