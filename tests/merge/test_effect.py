"""What a merge did and did not do: tensors that changed, and how much of the asked-for change reached the output."""

import json
import math
import weakref

import pytest
import torch
from models import MATRICES, SEVEN, random_lora, random_model, random_state, same
from tuned_files import write_adapter

from rwkv_lab import merge
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import NumericsError
from rwkv_lab.merge import compiled, verify_merge
from rwkv_lab.merge.effect import MergeEffect, Meter

COUNT = SEVEN.n_layer * len(MATRICES)  # matrices that `random_lora` adapts
KEY = "blocks.0.att.key.weight"


@pytest.fixture
def run(tmp_path):
    """merge(base, tuned, …) of tensors, or lists of them."""

    def merged(base, tuned, name="out.pth", **given):
        write_checkpoint(tmp_path / "base.pth", base, overwrite=True)
        paths = []
        for i, tensors in enumerate(tuned if isinstance(tuned, list) else [tuned]):
            paths.append(tmp_path / f"tuned{i}.pth")
            write_checkpoint(paths[-1], tensors, overwrite=True)
        return merge(tmp_path / "base.pth", paths, tmp_path / name, overwrite=True, **given)

    return merged


def scaled(tensors: dict, factor: float, part: str = "") -> dict:
    return {n: t * factor if part in n else t for n, t in tensors.items()}


def effect_check(result):
    return next(c for c in result.checks if c.name.startswith("the merge has an effect"))


def arrived_check(result):
    return next(c for c in result.checks if c.name.startswith("share of the asked-for change"))


@pytest.mark.parametrize(
    ("tuned", "given", "count"),
    [
        (scaled(random_lora(full=False), 0), {"alpha": 4}, COUNT),
        (scaled(random_lora(full=False), 0, "lora_B"), {"alpha": 4}, COUNT),
        (random_model(), {}, len(random_model())),
        (random_model(), {"alpha": 0.5}, len(random_model())),
        (random_model(), {"dtype": "fp32"}, len(random_model())),
        ({n: t.float() for n, t in random_model().items()}, {}, len(random_model())),
        (random_model(), {"method": "slerp"}, len(random_model())),
        (random_model(), {"method": "task_arithmetic", "alpha": 2.0}, len(random_model())),
        (random_model(), {"method": "ties"}, len(random_model())),
        (random_model(seed=1), {"method": "linear", "weights": [1, 0]}, len(random_model())),
        (scaled(random_state(), 0), {}, SEVEN.n_layer),
        (random_state(), {"alpha": 1e-300}, SEVEN.n_layer),
    ],
    ids=lambda x: str(len(x)) if isinstance(x, dict) and len(x) > 3 else None,
)
def test_a_merge_without_effect_says_so(tuned, given, count, run):
    result = run(random_model(), tuned, **given)
    assert any(f"{count} of {count} targets are unchanged" in n and "The output is the base" in n for n in result.notes)
    assert effect_check(result).value == 0 and not effect_check(result).passed
    assert all(c.passed for c in verify_merge(result)) and len(result.effect.unchanged) == count


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors"])
def test_what_is_partly_the_base_is_counted(out, run):
    base, tuned = random_model(), random_model()
    for name in list(tuned)[:3]:
        tuned[name] = tuned[name] + 1
    result = run(base, tuned, out)
    still = len(base) - 3
    assert any(n.startswith(f"{still} of {len(base)} targets are unchanged") for n in result.notes)
    assert effect_check(result).value == 3 and effect_check(result).passed
    lora = random_lora(full=False)
    result = run(base, lora | {n: t * 0 for n, t in lora.items() if "ffn" in n}, alpha=4)
    assert effect_check(result).value == COUNT - 4


def test_a_whole_effect_gives_no_note(run):
    result = run(random_model(), random_lora(), alpha=4)
    assert not result.effect.notes() and arrived_check(result).value == pytest.approx(1, abs=1e-3)
    assert all(c.passed for c in result.checks)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("dtype", "short"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_change_below_the_resolution_of_the_output(dtype, short, precision, run):
    """Of matrices with values from 1 to 2, a change of a quarter of a step arrives nowhere."""
    step = torch.finfo(dtype).eps
    base = random_model(dtype=dtype)
    base |= {n: 1 + torch.rand(t.shape).to(dtype).clamp(0.1, 0.9) for n, t in base.items() if t.dim() == 2}
    lora = {
        n: torch.full_like(t, (step / 4 / 3) ** 0.5, dtype=torch.float32) for n, t in random_lora(full=False).items()
    }
    result = run(base, lora, alpha=3, precision=precision)
    assert any(f"below {short}'s resolution" in n and "dtype='fp32' keeps it" in n for n in result.notes), result.notes
    assert any(f"{COUNT} of {COUNT} targets are unchanged" in n for n in result.notes)
    assert not arrived_check(result).passed and arrived_check(result).value == 0
    wide = run(base, lora, alpha=3, precision=precision, dtype="fp32")
    assert wide.effect.share == pytest.approx(1, abs=1e-3) and not wide.effect.notes()
    assert wide.effect.wanted == pytest.approx(result.effect.wanted, rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_norms_are_those_of_the_whole_tensors(precision, run):
    base, lora = random_model(), random_lora(full=False)
    lora = {n: t * 0.04 for n, t in lora.items()}
    result = run(base, lora, alpha=3, precision=precision)
    out = torch.load(result.out, weights_only=True)
    assert 0.05 < result.effect.share < 0.99
    total = 0.0
    for t in result.effect.tensors:
        stem = t.name.removesuffix(".weight")
        delta = lora[f"{stem}.lora_B"].double() @ lora[f"{stem}.lora_A"].double()
        moved = out[t.name].double() - base[t.name].double()
        assert t.wanted == pytest.approx(float(delta.norm()), rel=1e-3)
        assert t.reached == pytest.approx(float((moved * delta).sum() / delta.norm()), rel=1e-2)
        assert t.moved == int(moved.count_nonzero()) and t.values == moved.numel() and t.changed
        total += float(delta.norm()) ** 2
    assert result.effect.wanted == pytest.approx(math.sqrt(total), rel=1e-3)
    assert arrived_check(result).value == round(result.effect.share, 4)


def test_a_base_in_more_digits_than_the_output_is_compared_as_the_output_holds_it(run):
    base = random_model(dtype=torch.float32)
    result = run(base, scaled(random_lora(full=False), 0), alpha=4, dtype="bf16")
    assert effect_check(result).value == 0
    result = run(base, {n: t.bfloat16() for n, t in base.items()})  # rounded, and laid over itself
    assert effect_check(result).value == 0


def test_large_tensors_in_many_blocks(run):
    base = random_model() | {"x.large": torch.randn(1_300_000).bfloat16()}
    tuned = {"emb.weight": base["emb.weight"], "x.large": base["x.large"].clone()}
    assert effect_check(run(base, tuned, allow_extra=["x.*"])).value == 0
    tuned["x.large"][-1] += 1
    for given in ({}, {"alpha": 0.5}, {"dtype": "fp32"}, {"method": "slerp"}):
        result = run(base, tuned, allow_extra=["x.*"], **given)
        assert effect_check(result).value == 1, given
    assert result.effect.tensors[-1].values == 1_300_000


def test_a_strided_base_is_compared_too(tmp_path):
    base = random_model()
    torch.save(base | {KEY: base[KEY].T.contiguous().T}, tmp_path / "base.pth")
    torch.save({KEY: base[KEY]}, tmp_path / "tuned.pth")
    assert effect_check(merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "o.pth")).value == 0
    torch.save({KEY: base[KEY] + 1}, tmp_path / "tuned.pth")
    assert effect_check(merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "p.pth")).value == 1


def test_values_below_the_range_of_fp16_are_counted(run):
    base = random_model()
    base |= {KEY: base[KEY] * 1e-9, "emb.weight": base["emb.weight"] * 1e-5}
    result = run(base, {"head.weight": random_model(seed=3)["head.weight"]}, dtype="fp16")
    small = {s.name: s for s in result.effect.small}
    assert small[KEY].zero == small[KEY].rounded == base[KEY].numel()
    assert small["emb.weight"].zero < small["emb.weight"].rounded
    zero = sum(s.zero for s in result.effect.small)
    assert any(f"{zero} of them became 0" in n and "dtype='bf16'" in n for n in result.notes)
    assert not run(base, {"head.weight": base["head.weight"] + 1}).effect.small


def test_overflow_and_what_is_not_finite_do_not_spoil_the_norms(run):
    base, tuned = random_model(), {KEY: random_model()[KEY] + 1}
    tuned[KEY][0, 0] = 1e30
    with pytest.raises(NumericsError, match="overflow"):
        run(base, tuned, dtype="fp16")
    result = run(base, tuned, dtype="fp16", allow_nonfinite=True)
    assert math.isfinite(result.effect.wanted) and effect_check(result).value == 1
    result = run(
        base | {KEY: tuned[KEY] * float("nan")}, tuned | {KEY: tuned[KEY] * float("nan")}, allow_nonfinite=True
    )
    assert effect_check(result).passed or effect_check(result).value == 0
    huge = {KEY: torch.full_like(base[KEY], 1e25)}  # its square is no float32
    assert run(base, huge, alpha=0.5).effect.wanted == pytest.approx(0.5e25 * base[KEY].numel() ** 0.5, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_an_adapter_that_was_not_trained_has_no_effect(dtype, precision, tmp_path):
    """PiSSA takes away what it adds, up to the rounding of the arithmetic."""
    torch.save(random_model(dtype=dtype), tmp_path / "base.pth")
    for method in ("lora", "pissa", "miss"):
        adapter = write_adapter(tmp_path / f"{method}.pth", tmp_path / "base.pth", size=0.0, method=method, lora_r=3)
        result = merge(tmp_path / "base.pth", adapter, tmp_path / "o.pth", precision=precision, overwrite=True)
        assert effect_check(result).value == 0, result.effect
        assert not result.effect.notes()[0].count("resolution")


@pytest.mark.parametrize("least", [0, 1 << 60], ids=["compiled", "torch"])
def test_a_change_counts_however_small_it_is_and_whatever_else_the_base_holds(least, run, monkeypatch):
    monkeypatch.setattr(compiled, "_LEAST", least)
    lora = random_lora(full=False, dtype=torch.float32)
    # Squares of such numbers are nothing in float32.
    result = run(scaled(random_model(), 0.0), scaled(lora, 1e-12), alpha=3)
    assert len(result.effect.unchanged) == 0 and result.effect.share == pytest.approx(1, abs=1e-2)
    out = torch.load(result.out, weights_only=True)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in out.values()))
    assert result.effect.reached == pytest.approx(norm, rel=1e-2) and 0 < norm < 1e-18
    # One value that is far larger than all others.
    base = random_model(dtype=torch.float32)
    base[KEY][0, 0] = 1e5
    result = run(base, scaled(lora, 0.02), alpha=3)
    assert KEY not in [t.name for t in result.effect.unchanged] and result.effect.share > 0.9


@pytest.mark.parametrize("least", [0, 1 << 60], ids=["compiled", "torch"])
@pytest.mark.parametrize(
    ("tuned", "given"),
    [
        (None, {"alpha": 4}),
        (None, {"alpha": 4, "precision": "float64"}),
        (scaled(random_lora(full=False), 0), {"alpha": 4}),
        ({}, {"alpha": 0.3}),
        ({}, {"method": "task_arithmetic"}),
    ],
    ids=["lora", "in float64", "zeros", "blend", "mix"],
)
def test_where_nothing_is_added_the_bytes_are_the_base_s(tuned, given, least, run, monkeypatch):
    """-0 and 0 are equal, and not the same bytes."""
    monkeypatch.setattr(compiled, "_LEAST", least)
    base, lora = random_model(), random_lora(full=False)
    base[KEY][:2] = -0.0
    lora[KEY.replace("weight", "lora_B")][0] = 0.0  # the first row alone has no change
    tuned = lora if tuned is None else tuned or {KEY: base[KEY]}
    out = torch.load(run(base, tuned, **given).out, weights_only=True)
    rows = 1 if tuned is lora else len(base[KEY])
    assert same(out[KEY][:rows], base[KEY][:rows])
    assert tuned is not lora or out[KEY][1].all()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_an_adapter_of_zeros_on_a_quantised_base_is_told_from_the_rounding(quant, run):
    """Every matrix is rounded as in training, which is a change, and not the adapter's."""
    lora = random_lora(full=False)
    zeros = lora | {n: t * 0 for n, t in lora.items() if "att" in n}
    result = run(random_model(), zeros, alpha=4, parameters={"quant": quant})
    assert any(n == "tuned0.pth adds nothing to 6 of 10 matrices: it has zeros there." for n in result.notes)


@pytest.mark.parametrize(
    ("tuned", "given"),
    [
        (random_model(seed=1), {"alpha": 0}),
        (random_model(seed=1), {"method": "slerp", "alpha": 0}),
        (random_state(), {"alpha": 0}),
        (random_lora(), {"alpha": 0}),
        (random_lora(), {"alpha": [0]}),
        (random_lora(), {"alpha": 4, "weights": [0]}),
        (random_model(), {"method": "passthrough", "parameters": {"layers": ["base[0:2]"]}}),
    ],
    ids=["overlay", "slerp", "state", "lora", "list", "weight", "layers"],
)
def test_a_plan_that_changes_nothing_says_so(tuned, given, run):
    result = run(random_model(), tuned, **given)
    count = len(random_model())
    says = "Nothing of tuned0.pth goes in." if given.get("method") == "passthrough" else f"0 of {count} tensors are to"
    assert any(n.startswith(says) for n in result.plan.notes), result.plan.notes
    assert all(c.passed for c in (*result.checks, *verify_merge(result))) and not result.effect.tensors


def test_an_alpha_or_a_weight_of_zero_among_others_is_named(run):
    loras = [random_lora(full=False), random_lora(full=False, seed=5)]
    for given in ({"alpha": [0, 4]}, {"alpha": 4, "weights": [0, 1]}):
        assert any(n.startswith("tuned0.pth adds nothing") for n in run(random_model(), loras, **given).plan.notes)
    models = [random_model(seed=1), random_model(seed=2)]
    notes = run(random_model(), models, method="linear", weights=[1, 0, 1]).plan.notes
    assert "tuned0.pth has weight 0: nothing of it goes in." in notes
    setting = {"alpha": {"blocks.0": 0, "*": 0.5}}
    notes = run(random_model(), models[0], method="slerp", parameters=setting).plan.notes
    assert any(n.startswith("alpha is 0 for ") and "they are the base's" in n for n in notes)


def test_nothing_is_measured_where_nothing_was_asked_for(run):
    result = run(random_model(), random_model(seed=1), alpha=0)
    assert result.effect == MergeEffect() and len(result.checks) == 2
    dry = run(random_model(), random_model(seed=1), dry_run=True)
    assert dry.effect == MergeEffect() and dry.notes == dry.plan.notes


def test_the_measure_is_the_same_when_a_plan_is_carried_out_again(tmp_path):
    from rwkv_lab.merge import MergeOptions, MergeSpec, open_inputs, plan_merge, write_merge

    torch.save(random_model(), tmp_path / "base.pth")
    torch.save(random_lora(), tmp_path / "lora.pth")
    spec = MergeSpec.read({"base": tmp_path / "base.pth", "tuned": tmp_path / "lora.pth", "alpha": 4})
    with open_inputs(spec) as inputs:
        plan = plan_merge(inputs, spec, tmp_path / "out.pth", MergeOptions.read({"overwrite": True}))
    assert write_merge(plan).effect == write_merge(plan).effect


def test_the_file_beside_says_what_changed(run):
    result = run(random_model(), scaled(random_lora(full=False), 0), alpha=4)
    beside = json.loads(result.outputs[1].path.read_text())
    assert beside["effect"]["targets"] == COUNT and beside["effect"]["changed"] == 0


def test_values_of_the_base_are_let_go_when_their_tensor_is_written():
    """A merge has a meter for every tensor: what each kept of the base grew with the model."""
    held = []

    def blocks():
        for _ in range(2):
            before = torch.ones(4)
            held.append(weakref.ref(before))
            yield torch.zeros(4), before

    meter = Meter("x", 8, torch.float32, None, copied=False)
    for i, values in enumerate(meter.watched(blocks)()):
        meter.see(4 * i, values, values)
    assert meter.result().moved == 8 and [ref() for ref in held] == [None, None]
