"""Tuned states in an output: one for every layer, and a word on the programs that ignore them."""

import pytest
import torch
from models import LAYOUTS, random_model, random_state, same

from rwkv_lab import RWKV_Dual, merge, open_checkpoint
from rwkv_lab.errors import LayoutError
from rwkv_lab.merge import verify_merge

WITH_STATES = [v for v in LAYOUTS if v != "4.0"]
FIRST, SECOND = (f"blocks.{i}.att.time_state" for i in range(2))


def merged(folder, base, tuned, out="o.pth", **given):
    torch.save(base, folder / "base.pth")
    torch.save(tuned, folder / "tuned.pth")
    result = merge(folder / "base.pth", folder / "tuned.pth", folder / out, overwrite=True, **given)
    assert all(c.passed for c in (*result.checks, *verify_merge(result))), [*result.checks, *verify_merge(result)]
    assert result.plan.output_bytes == result.out.stat().st_size
    with open_checkpoint(result.out) as ck:
        return result, {n: ck[n] for n in ck}


@pytest.mark.parametrize("version", WITH_STATES)
@pytest.mark.parametrize(
    ("given", "out", "dtype"),
    [
        ({}, "o.pth", torch.float32),
        ({"alpha": 0.5}, "o.safetensors", torch.float32),
        ({"dtype": "bf16"}, "o.pth", torch.bfloat16),
    ],
)
def test_layers_without_a_state_get_zeros(version, given, out, dtype, tmp_path):
    layout = LAYOUTS[version]
    state = random_state(layout)
    base = random_model(layout)
    result, found = merged(tmp_path, base, {SECOND: state[SECOND]}, out, **given)
    assert same(found[FIRST], torch.zeros_like(state[FIRST], dtype=dtype)) and bool(found[SECOND].any())
    assert {r.action for r in result.plan.rows if r.name == FIRST} == {"zeros"} and len(result.plan.changed) == 1
    assert any("1 of 2 layers; the other 1 (0) get zeros" in n for n in result.plan.notes)
    whole, all_states = merged(
        tmp_path, base, {SECOND: state[SECOND], FIRST: torch.zeros_like(state[FIRST])}, out, **given
    )
    assert all(same(found[n], all_states[n]) for n in found) and found.keys() == all_states.keys()


def test_a_base_keeps_the_states_that_it_has(tmp_path):
    state, other = random_state(), random_state(seed=5)
    _, found = merged(tmp_path, random_model() | state, {SECOND: other[SECOND]})
    assert same(found[FIRST], state[FIRST]) and same(found[SECOND], other[SECOND])


def test_states_that_are_left_out_by_patterns_are_zeros_too(tmp_path):
    result, found = merged(tmp_path, random_model(), random_state(), include=["blocks.1"])
    assert not found[FIRST].any() and found[SECOND].any() and result.plan.skipped == (FIRST,)


def test_a_fine_tune_and_a_mix_with_states_of_some_layers(tmp_path):
    tuned = random_model(seed=3) | {SECOND: random_state()[SECOND]}
    for given in ({}, {"method": "task_arithmetic"}, {"method": "linear", "weights": [1, 1]}):
        _, found = merged(tmp_path, random_model(), tuned, **given)
        assert not found[FIRST].any() and found[SECOND].any()
    stacked = {"layers": ["base[0:1]", "tuned[1:2]"]}
    _, found = merged(tmp_path, random_model(), tuned, method="passthrough", parameters=stacked)
    assert not found[FIRST].any() and found[SECOND].any()
    model = RWKV_Dual.from_pretrained(tmp_path / "o.pth")
    assert bool(model(torch.arange(5)[None])[0].isfinite().all())


def test_nothing_is_written_where_no_state_goes_in(tmp_path):
    tuned = {"head.weight": random_model(seed=3)["head.weight"]}
    _, found = merged(tmp_path, random_model() | {FIRST: random_state()[FIRST]}, tuned)
    assert SECOND not in found
    _, found = merged(tmp_path, random_model(), {SECOND: random_state()[SECOND]}, alpha=0)
    assert SECOND not in found and FIRST not in found


def test_states_of_layers_that_the_base_lacks_are_refused(tmp_path):
    state = random_state()
    with pytest.raises(LayoutError, match="states for 3 layers, the base has 2 layers"):
        merged(tmp_path, random_model(), state | {"blocks.2.att.time_state": state[FIRST]})


@pytest.mark.parametrize(
    ("version", "ignored"), [("7.0", "rwkv (ChatRWKV), RWKV-Runner, rwkv7-hf, fla, llama.cpp"), ("6.0", "fla, trans")]
)
def test_the_plan_names_the_programs_that_ignore_a_state(version, ignored, tmp_path):
    layout = LAYOUTS[version]
    result, _ = merged(tmp_path, random_model(layout), random_state(layout))
    note = next(n for n in result.plan.notes if n.startswith(f"time_state in an RWKV-{version} model"))
    assert ignored in note and "ignore it" in note and "RWKV-Runner" in note and note.count("\n") <= 2
    result, _ = merged(tmp_path, random_model(layout), random_model(layout, seed=2))
    assert not any("time_state in" in n for n in result.plan.notes)
