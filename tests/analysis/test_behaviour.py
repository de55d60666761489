"""Merged models are run beside what they were made of; where that says nothing, the check says so and does not pass."""

import json

import pytest
import tokenizers
import torch
from random_models import make_layout, write_model
from tokenizers import pre_tokenizers
from tuned_files import write_fine_tune, write_state

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis import behaviour
from rwkv_lab.analysis.behaviour import Behaviour, compare_behaviour
from rwkv_lab.analysis.texts import Reading
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.merge import merge
from rwkv_lab.train import load_corpus, measure_held_out


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(behaviour, "_SAMPLE", 5)


@pytest.fixture
def tensors(demo_folder):
    with open_checkpoint(demo_folder / "demo-base.pth") as ck:
        return {name: ck[name] for name in ck}


def compared(result, **reading) -> Behaviour:
    return compare_behaviour(result, Reading(**{"most": 300} | reading))


def reasons(found) -> list[str]:
    return [c.reason for c in found.checks if isinstance(c, NotApplicable)]


def test_a_merged_state_answers_as_base_and_state_file_do(demo_folder, tmp_path):
    result = merge(demo_folder / "demo-base.pth", demo_folder / "demo-state.pth", tmp_path / "m.pth")
    found = compared(result)
    assert len(found.checks) == 4 and all(c.passed for c in found.checks)
    assert set(found.bits["english"]) == {"base", "merged", "base + state file"} and len(found.samples) == 4


def test_the_summary_tells_better_from_worse():
    bits = {"english": {"base": 2.4, "merged": 2.52}, "python": {"base": 2.0, "merged": 1.9, "tuned": 1.8}}
    assert Behaviour(bits | {"code": {"base": 1.0, "merged": 1.0}}).summary == (
        "Bits per byte of held-out text, base to merged: english 2.400 to 2.520, 5.0% worse; "
        "python 2.000 to 1.900, 5.0% better; code 1.000 to 1.000, the same."
    )
    hardly = {"cats": {"base": 7.396, "merged": 7.394}}
    assert Behaviour(hardly).summary.endswith("cats 7.396 to 7.394, no difference that counts.")
    assert Behaviour().summary == ""


def test_texts_of_ones_own(demo_folder, tmp_path):
    result = merge(demo_folder / "demo-base.pth", demo_folder / "demo-state.pth", tmp_path / "m.pth")
    (tmp_path / "mine.txt").write_text("the cat sat on the mat. " * 1000)
    found = compared(result, data=(str(tmp_path / "mine.txt"),))
    assert list(found.bits) == ["mine.txt"] and "held-out mine.txt, merged against" in found.checks[2].name
    assert found.measured["mine.txt"].size == 299 and found.samples[0].prompt.strip() in "the cat sat on the mat. " * 2


def test_the_prompts_of_held_out_examples_are_answered(demo_folder, tmp_path):
    lines = [{"prompt": f"What is {i} and 1? ", "response": f"It is {i + 1}."} for i in range(100)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = merge(demo_folder / "demo-base.pth", demo_folder / "demo-state.pth", tmp_path / "m.pth")
    found = compared(result, data=(str(tmp_path / "mine.jsonl"),))
    assert len(found.samples) == 2 and list(found.samples[0].texts) == ["in the data", "base", "merged"]
    assert found.samples[0].texts["in the data"].startswith("It is") and found.samples[0].prompt.startswith("What is")


def test_models_that_were_mixed_stand_beside_base_and_merged(demo_folder, tmp_path, tensors):
    for name, factor in (("one", 1.01), ("two", 1.02)):
        write_checkpoint(tmp_path / f"{name}.pth", {n: t * factor for n, t in tensors.items()})
    tuned = [tmp_path / "one.pth", tmp_path / "two.pth"]
    found = compared(merge(demo_folder / "demo-base.pth", tuned, tmp_path / "m.pth", "linear", weights=[1, 1, 1]))
    assert list(found.bits["english"]) == ["base", "merged", "one", "two"]
    assert list(found.samples[0].texts) == ["base", "merged", "one", "two"]
    alone = RWKV_Dual.from_pretrained(tmp_path / "two.pth")
    assert found.bits["english"]["two"] == measure_held_out(alone, load_corpus("english"), most=300).bits


def test_text_is_measured_by_the_tokenizer_that_is_named(demo_folder, tmp_path):
    write_model(tmp_path / "base.pth", make_layout("7.0", vocab_size=260))
    write_state(tmp_path / "state.pth", tmp_path / "base.pth")
    result = merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "m.pth")
    assert "does not tell its tokenizer" in compared(result).unread
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = compared(result, tokenizer=str(tmp_path / "tokenizer.json"))
    assert found.unread == "" and found.bits["python"]["merged"] > 0 and len(found.samples) == 4


@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_a_world_model_of_any_generation_reads_and_writes(version, tmp_path):
    write_model(tmp_path / "base.pth", make_layout(version, n_layer=1, vocab_size=65536))
    write_fine_tune(tmp_path / "tuned.pth", tmp_path / "base.pth", seed=1)
    found = compared(merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "m.pth"), data=("english",))
    assert found.unread == "" and len(found.samples) == 2
    assert found.bits["english"]["base"] != found.bits["english"]["merged"] == found.bits["english"]["tuned"]


def test_another_file_in_its_place_is_found_out(demo_folder, tmp_path, tensors):
    result = merge(demo_folder / "demo-base.pth", demo_folder / "demo-state.pth", tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck:
        merged = {name: ck[name] for name in ck}
    merged["blocks.1.att.time_state"] = merged["blocks.1.att.time_state"] * 3
    write_checkpoint(tmp_path / "m.pth", merged, overwrite=True)
    checks = compared(result).checks
    assert checks[0].passed and not any(c.passed for c in checks[1:])


def test_nan_in_the_merged_model_is_found_out(demo_folder, tmp_path, tensors):
    result = merge(demo_folder / "demo-base.pth", demo_folder / "demo-state.pth", tmp_path / "m.pth")
    tensors["ln_out.weight"][3] = float("nan")
    write_checkpoint(tmp_path / "m.pth", tensors, overwrite=True)
    found = compared(result)
    assert isinstance(found.checks[0], Check) and not any(c.passed for c in found.checks if isinstance(c, Check))


def test_a_whole_fine_tune_answers_as_itself(demo_folder, tmp_path, tensors):
    write_checkpoint(tmp_path / "tuned.safetensors", {n: t + 0.01 for n, t in tensors.items()})
    result = merge(demo_folder / "demo-base.pth", tmp_path / "tuned.safetensors", tmp_path / "m.pth")
    found = compared(result)
    assert "tuned" in found.bits["python"] and all(c.passed for c in found.checks)


def test_other_vocabularies_are_compared_by_logits_alone(demo_folder, tmp_path, tensors):
    wide = tensors | {n: torch.cat([tensors[n]] * 2) for n in ("emb.weight", "head.weight")}
    write_checkpoint(tmp_path / "base.pth", wide)
    state = demo_folder / "demo-state.pth"
    found = compared(merge(tmp_path / "base.pth", state, tmp_path / "m.pth", allow_other_base=True))
    assert "does not tell its tokenizer. Give it as tokenizer" in found.unread
    assert found.bits == {} and found.samples == [] and [c.passed for c in found.checks] == [True, True]


def test_what_cannot_be_compared_is_not_passed(demo_folder, tmp_path, tensors):
    base, state = demo_folder / "demo-base.pth", demo_folder / "demo-state.pth"
    lora = {"blocks.0.att.key.lora_A": torch.randn(2, 32), "blocks.0.att.key.lora_B": torch.randn(32, 2)}
    write_checkpoint(tmp_path / "lora.pth", lora)
    write_checkpoint(tmp_path / "part.pth", {"head.weight": tensors["head.weight"]})
    write_checkpoint(tmp_path / "more.pth", {n: tensors[n] for n in ("head.weight", "ln_out.weight")})
    for i, (tuned, options, reason) in enumerate(
        [
            (tmp_path / "lora.pth", {"alpha": 4.0}, "no file"),
            (state, {"alpha": 0.5}, "no file"),
            (state, {"dtype": "bf16"}, "rounds"),
            (tmp_path / "more.pth", {"exclude": ["ln_out.*"]}, "keep 1 tensor "),
            (tmp_path / "part.pth", {}, "part of a model"),
        ]
    ):
        found = compared(merge(base, tuned, tmp_path / f"{i}.pth", **options))
        assert len(found.checks) == 2 and found.checks[0].passed and reason in reasons(found)[0]


def test_a_merged_model_that_does_not_load_has_failed(demo_folder, tmp_path, tensors):
    result = merge(demo_folder / "demo-base.pth", demo_folder / "demo-state.pth", tmp_path / "m.pth")
    del tensors["ln_out.weight"]
    write_checkpoint(tmp_path / "m.pth", tensors, overwrite=True)
    found = compared(result)
    assert not found.checks[0].passed and "ln_out.weight" in found.checks[0].value


def test_states_for_some_layers_run(demo_folder, tmp_path):
    state = demo_folder / "demo-state.pth"
    found = compared(merge(demo_folder / "demo-base.pth", state, tmp_path / "m.pth", exclude=["blocks.0.*"]))
    assert found.checks[0].passed and "keep 1 tensor " in reasons(found)[0]


def test_what_was_allowed_does_not_fail_the_run(demo_folder, tmp_path, tensors):
    base, state = demo_folder / "demo-base.pth", demo_folder / "demo-state.pth"
    write_checkpoint(tmp_path / "base.pth", tensors | {"odd": torch.zeros(3)})
    more = {"allow_extra": ["odd"], "allow_other_base": True}
    found = compared(merge(tmp_path / "base.pth", state, tmp_path / "n.pth", **more))
    assert len(reasons(found)) == 2 and "does not know, such as odd" in reasons(found)[0]
    with open_checkpoint(state) as ck:
        states = {name: ck[name] for name in ck}
    next(iter(states.values()))[0, 0, 0] = float("inf")
    write_checkpoint(tmp_path / "state.pth", states)
    found = compared(merge(base, tmp_path / "state.pth", tmp_path / "i.pth", allow_nonfinite=True))
    assert len(reasons(found)) == 2 and "were allowed" in reasons(found)[0]


def test_models_that_do_not_fit_into_memory(demo_folder, tmp_path, monkeypatch):
    result = merge(demo_folder / "demo-base.pth", demo_folder / "demo-state.pth", tmp_path / "m.pth")
    monkeypatch.setattr(behaviour, "memory_free", lambda: 1000)
    assert len(reasons(compared(result))) == 2 and "1 kB are free" in reasons(compared(result))[0]
