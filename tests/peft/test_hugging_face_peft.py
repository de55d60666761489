"""Hugging Face's peft as the reference: what it trained runs here with the same logits; what is saved here, there."""

import json

import pytest
import torch
from pairwise import each
from random_models import VERSIONS, make_tokens, relative_rms
from trained import CONFIGS, as_if_trained

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.peft import (
    LoraConfig,
    adapter_of,
    adapters,
    load_adapter,
    merged_state_dict,
    open_adapter,
    save_adapter,
)

pytest.importorskip("peft.tuners")  # "peft" alone is also the name of this folder of tests
import peft  # noqa: E402

TOKENS = make_tokens(2, 13)
TARGETS = ["att.key", "att.output", "ffn.key", "ffn.value"]
OURS = [name for name in CONFIGS if name not in ("bat-rwkv-peft", "pissa-exact")]
CLOSE = 1e-5  # float32; measured up to 2e-6, from sums in another order
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={"blocks.1.att.key": 2, "ffn.value": 5},
        alpha_pattern={"att.output": 3, r"blocks\.0\.ffn.key": 7},
    ),
    "whole": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["head", "emb", "ln1", "ln2"]),
    "regex": lambda: peft.LoraConfig(r=4, target_modules=r".*\.1\.ffn\.(key|value)"),
    "miss": lambda: peft.MissConfig(r=6, target_modules=TARGETS),
    "miss-mini": lambda: peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=TARGETS),
    "bat-hf": lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=TARGETS),
}


def plain(base, version):
    return RWKV_Dual.from_pretrained(base(version))


def theirs(base, version, config, folder):
    """Their model as if trained, saved to the folder."""
    torch.manual_seed(0)
    model = peft.get_peft_model(plain(base, version), config)
    if getattr(config, "init_lora_weights", None) in ("pissa", "pissa_niter_2"):
        model.save_pretrained(f"{folder}-init")
    as_if_trained(model).save_pretrained(folder)
    return model


def ours(base, version, folder, **asked):
    model = plain(base, version)
    with open_adapter(folder, **asked) as adapter:
        load_adapter(model, adapter)
    return model


@pytest.mark.parametrize(("version", "name"), [*each(VERSIONS[:-1], THEIRS), *each(VERSIONS[-1:], THEIRS)])
def test_what_they_trained_runs_here(base, tmp_path, version, name):
    model = theirs(base, version, THEIRS[name](), tmp_path / "a")
    expected = model(TOKENS)[0]
    assert relative_rms(expected, plain(base, version)(TOKENS)[0]) > 1e-2
    here = ours(base, version, tmp_path / "a")
    assert relative_rms(here(TOKENS)[0], expected) < CLOSE
    merged = model.merge_and_unload()
    found = plain(base, version)
    found.load_state_dict(merged_state_dict(here))
    for (n, p), (m, q) in zip(found.named_parameters(), merged.named_parameters(), strict=True):
        assert n == m
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("version", "name"), [*each(VERSIONS[:-1], OURS), *each(VERSIONS[-1:], OURS)])
def test_what_is_trained_here_runs_there(base, adapted, tmp_path, version, name):
    model = as_if_trained(adapted(version, CONFIGS[name]))
    save_adapter(adapter_of(model), tmp_path / "a")
    there = peft.PeftModel.from_pretrained(plain(base, version), tmp_path / "a")
    assert relative_rms(there(TOKENS)[0], model(TOKENS)[0]) < CLOSE
    merged = there.merge_and_unload()
    assert relative_rms(merged(TOKENS)[0], model(TOKENS)[0]) < CLOSE


@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_whole_modules_go_there(base, adapted, tmp_path, version):
    model = as_if_trained(adapted(version, LoraConfig(lora_r=4, train_parts=["emb", "head", "ln"])))
    save_adapter(adapter_of(model), tmp_path / "a")
    there = peft.PeftModel.from_pretrained(plain(base, version), tmp_path / "a")
    assert relative_rms(there(TOKENS)[0], model(TOKENS)[0]) < CLOSE


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2"])
def test_their_pissa(base, tmp_path, version, start):
    """With its start on the original base; without, on what the SVD left over; converted by them, as a plain LoRA."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=start)
    folder = tmp_path / "a"
    model = theirs(base, version, config, folder)
    expected = model(TOKENS)[0]
    with open_checkpoint(folder) as ck:
        assert ck.kind == "pissa"
    with pytest.raises(ParameterError, match="pissa_init"):
        open_adapter(folder)
    here = ours(base, version, folder, pissa_init=f"{folder}-init")
    assert relative_rms(here(TOKENS)[0], expected) < CLOSE

    left_over = model.unload()
    with open_adapter(folder, residual_base=True) as adapter:
        assert adapter.method == "pissa" and adapter.residual_base
        load_adapter(left_over, adapter)
    assert relative_rms(left_over(TOKENS)[0], expected) < CLOSE
    with pytest.raises(ParameterError, match="without what it started from"):
        save_adapter(adapter_of(left_over), tmp_path / "b")

    save_adapter(adapter_of(here), tmp_path / "c")
    there = peft.PeftModel.from_pretrained(plain(base, version), tmp_path / "c")
    assert relative_rms(there(TOKENS)[0], expected) < CLOSE


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_that_they_converted(base, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa")
    model = peft.get_peft_model(plain(base, "7.0"), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    model.peft_config["default"].init_lora_weights = "pissa"
    expected = as_if_trained(model)(TOKENS)[0]
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 8
    assert relative_rms(ours(base, "7.0", tmp_path / "a")(TOKENS)[0], expected) < CLOSE


def test_patterns_keep_their_ranks(base, tmp_path):
    theirs(base, "7.0", THEIRS["patterns"](), tmp_path / "a")
    with open_adapter(tmp_path / "a") as adapter:
        t = adapter.targets
        assert [t[f"blocks.{i}.att.key"].rank for i in (0, 1)] == [4, 2]
        assert [t[f"blocks.{i}.ffn.key"].alpha for i in (0, 1)] == [7, 6]
        assert t["blocks.0.ffn.value"].rank == 5 and t["blocks.0.att.output"].scaling == 3 / 4
        save_adapter(adapter, tmp_path / "b")
    there = peft.PeftModel.from_pretrained(plain(base, "7.0"), tmp_path / "b")
    assert relative_rms(there(TOKENS)[0], ours(base, "7.0", tmp_path / "a")(TOKENS)[0]) < CLOSE


def test_what_they_do_with_half_precision(base, tmp_path):
    """Their adapters are float32 on a bfloat16 base; the same here."""
    model = peft.get_peft_model(plain(base, "7.0").to(torch.bfloat16), THEIRS["lora"]())
    as_if_trained(model).save_pretrained(tmp_path / "a")
    here = plain(base, "7.0").to(torch.bfloat16)
    with open_adapter(tmp_path / "a") as adapter:
        load_adapter(here, adapter)
    assert adapters(here)["blocks.0.att.key"].lora_A.dtype == torch.float32
    assert torch.equal(here(TOKENS)[0], model(TOKENS)[0])
