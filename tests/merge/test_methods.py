"""What a merge computes, against arithmetic written out here."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import LAYOUTS, SEVEN, random_lora, random_model, random_state, same
from safetensors.torch import load_file, save_file

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.merge.planning import selected_names


def save(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def load(path) -> dict:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.fixture
def run(tmp_path):
    """Merges tensors that are in memory; gives the output's, after `verify_merge` passed."""

    def merged(base, tuned, formats=("pth", "pth", "pth"), **given):
        paths = [tmp_path / f"{n}.{f}" for n, f in zip(("base", "tuned", "out"), formats, strict=True)]
        result = merge(save(paths[0], base), save(paths[1], tuned), paths[2], overwrite=True, **given)
        assert all(c.passed for c in result.checks[:2])  # what follows is the effect, which tiny changes do not have
        checks = verify_merge(result)
        assert all(c.passed for c in checks), [str(c) for c in checks if not c.passed]
        assert result.plan.output_bytes == paths[2].stat().st_size
        found = load(paths[2])
        assert [r.name for r in result.plan.rows if r.name in found] == [r.name for r in result.plan.rows]
        assert all((found[r.name].shape, found[r.name].dtype) == (r.shape, r.dtype) for r in result.plan.rows)
        return found

    return merged


FORMATS = [(b, t, o) for b in ("pth", "safetensors") for t in ("pth", "safetensors") for o in ("pth", "safetensors")]


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_state_overlay_and_lora_in_every_mix_of_formats(formats, run):
    base, state, tuned, lora = random_model(), random_state(), random_model(seed=5), random_lora()
    found = run(base, state, formats)
    assert all(same(found[n], (base | state)[n]) for n in base | state) and set(found) == set(base | state)
    found = run(base, tuned, formats)
    assert all(same(found[n], t) for n, t in tuned.items())
    found = run(base, lora, formats, alpha=6.0)
    whole = {n: t for n, t in lora.items() if ".lora_" not in n}
    assert whole and all(same(found[n], t) for n, t in whole.items())
    assert all(same(found[n], t) for n, t in base.items() if n not in whole and not adapted(n, lora))


def adapted(name, lora) -> bool:
    return name.removesuffix(".weight") + ".lora_A" in lora


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2", "6.0", "7.0"])
def test_a_state_goes_into_every_generation_that_has_one(version, run):
    layout = LAYOUTS[version]
    base, state = random_model(layout), random_state(layout, torch.bfloat16)
    found = run(base, state)
    assert all(same(found[n], (base | state)[n]) for n in base | state)
    with_state = run(found, random_state(layout, seed=9))  # replaces the one that is there
    assert all(same(with_state[n], t) for n, t in random_state(layout, seed=9).items())


def test_a_share_of_a_state(run):
    base, state = random_model(), random_state()
    found = run(base, state, alpha=0.25)
    assert all(same(found[n], t * 0.25) for n, t in state.items())  # there was none: zeros are the base
    older = random_state(seed=4)
    found = run(base | older, state, alpha=0.25)
    for n, t in state.items():
        assert torch.allclose(found[n], older[n] + 0.25 * (t - older[n]), rtol=1e-6, atol=1e-7)


def test_only_the_state_is_taken_of_a_whole_checkpoint(run):
    base, state = random_model(), random_state()
    found = run(base, random_model(seed=7) | state, method="state")
    assert all(same(found[n], (base | state)[n]) for n in base | state)
    assert same(run(base, random_model(seed=7) | state)["emb.weight"], random_model(seed=7)["emb.weight"])


@pytest.mark.parametrize("version", list(LAYOUTS))
def test_a_partial_fine_tune_touches_what_it_holds(version, run):
    base, tuned = random_model(LAYOUTS[version]), random_model(LAYOUTS[version], torch.float32, seed=1)
    part = {n: t for n, t in tuned.items() if n.startswith("blocks.1.ln")}
    found = run(base, part)
    assert all(same(found[n], (base | part)[n]) for n in base)


def test_squeezed_vectors_fit_and_the_base_decides_the_shape(run):
    base, tuned = random_model(), random_model(seed=1)
    found = run(base, {n: t.squeeze() for n, t in tuned.items()})
    assert all(same(found[n], tuned[n]) for n in base)
    one_layer = {n: t.reshape(1, 1, -1) if t.ndim == 1 else t for n, t in tuned.items()}
    found = run(base, one_layer, alpha=0.5)
    assert all(found[n].shape == base[n].shape for n in base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_blend_is_rounded_once(dtype, precision, run):
    base, tuned = random_model(dtype=dtype), random_model(dtype=torch.float32, seed=1)
    found = run(base, tuned, alpha=0.3, precision=precision)
    for name, b in base.items():
        exact = b.double() + 0.3 * (tuned[name].double() - b.double())
        assert found[name].dtype == dtype
        if precision == "float64":  # no neighbour is nearer
            integer = torch.int32 if dtype == torch.float32 else torch.int16
            error = (found[name].double() - exact).abs()
            for step in (-1, 1):
                neighbour = (found[name].view(integer) + step).view(dtype).double()
                assert bool((error <= (neighbour - exact).abs() + 1e-15).all())
        else:
            torch.testing.assert_close(found[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_blend_in_bfloat16_arithmetic_would_be_seen(run):
    """The mistake of the scripts in circulation: adding in the dtype of the file."""
    base, tuned = random_model(), random_model(seed=1)
    found = run(base, tuned, alpha=0.3)["emb.weight"]
    b, t = base["emb.weight"], tuned["emb.weight"]
    assert not same(found, b + 0.3 * (t - b)) and same(found, torch.lerp(b.float(), t.float(), 0.3).bfloat16())


@pytest.mark.parametrize("alpha", [8.0, 1, 0.5])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "float32"), (torch.float32, "float64")])
def test_a_lora_is_added_in_full_precision(alpha, dtype, precision, run):
    base, lora = random_model(dtype=dtype), random_lora(rank=3)
    found = run(base, lora, alpha=alpha, precision=precision)
    names = [n for n in base if adapted(n, lora)]
    assert len(names) == 10
    for name in names:
        stem = name.removesuffix(".weight")
        a, b = lora[f"{stem}.lora_A"].double(), lora[f"{stem}.lora_B"].double()
        exact = base[name].double() + alpha / 3 * (b @ a)
        assert found[name].dtype == dtype and not same(found[name], base[name])
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * (precision == "float32") + 1e-14
        assert bool(((found[name].double() - exact).abs() <= bound).all())


def test_a_lora_on_matrices_larger_than_a_block(tmp_path):
    """Rows are handed out in blocks; the product must be cut at the same places."""
    layout = Layout("4.0", 1, 640, 640, 1000, 5, 0, 0)
    base, lora = random_model(layout), random_lora(layout, full=False)
    save(tmp_path / "base.pth", base)
    save(tmp_path / "lora.pth", lora)
    result = merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "out.pth", alpha=2.0)
    assert all(c.passed for c in verify_merge(result))
    found, name = load(tmp_path / "out.pth"), "blocks.0.ffn.key"
    exact = base[f"{name}.weight"].float() + 2 / 3 * lora[f"{name}.lora_B"].float() @ lora[f"{name}.lora_A"].float()
    torch.testing.assert_close(found[f"{name}.weight"], exact.bfloat16())


def test_blends_of_unequal_dtypes_larger_than_a_block(tmp_path):
    """Blocks of two tensors hold equally many bytes, so unequally many elements."""
    for b_dtype, t_dtype in [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)]:
        base = random_model() | {"emb.weight": torch.randn(11, 16).to(b_dtype)}
        extra = {"extra.weight": torch.randn(300_001).to(b_dtype)}
        tuned = {"extra.weight": torch.randn(300_001).to(t_dtype), "emb.weight": torch.randn(11, 16).to(t_dtype)}
        save(tmp_path / "base.pth", base | extra)
        save(tmp_path / "tuned.pth", tuned)
        given = {"alpha": 0.5, "allow_extra": ["extra.*"], "overwrite": True, "precision": "float64"}
        result = merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "out.pth", **given)
        assert all(c.passed for c in verify_merge(result))
        exact = (extra["extra.weight"].double() + tuned["extra.weight"].double()) / 2
        torch.testing.assert_close(load(tmp_path / "out.pth")["extra.weight"], exact.to(b_dtype))


@pytest.mark.parametrize("kind", ["state", "overlay", "lora"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_alpha_0_gives_the_base_bit_for_bit(kind, suffix, run):
    base = random_model()
    tuned = {"state": random_state(), "overlay": random_model(seed=1), "lora": random_lora()}[kind]
    found = run(base, tuned, (suffix,) * 3, alpha=0.0)
    assert set(found) == set(base) and all(same(found[n], t) for n, t in base.items())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
def test_output_dtype(dtype, stored, run):
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    base, state = random_model(dtype=stored), random_state()
    found = run(base, state, dtype=dtype)
    assert {t.dtype for t in found.values()} == {wanted}
    if stored != torch.float64:
        assert all(same(found[n], t.to(wanted)) for n, t in (base | state).items())
    assert same(run(base, state, dtype=wanted)["emb.weight"], found["emb.weight"])


def test_float64_is_cast_once(run):
    """torch's own cast from float64 rounds twice, and would give 1.0 here."""
    base = random_model(dtype=torch.float64)
    base["emb.weight"][0, 0] = 1 + 2**-8 + 2**-40
    assert float(run(base, random_state(), dtype="bf16")["emb.weight"][0, 0]) == 1 + 2**-7


def test_method_auto_reads_the_method_off_the_file(tmp_path):
    save(tmp_path / "base.pth", random_model())
    for tuned, method in [
        (random_state(), "state"),
        (random_lora(), "lora"),
        (random_model(seed=1), "overlay"),
        ({"head.weight": torch.ones(11, 16)}, "overlay"),
        ({"blocks.0.att.key.bone": torch.ones(2, 16)}, "miss"),
    ]:
        save(tmp_path / "tuned.pth", tuned)
        given = {"alpha": None if method == "miss" else 1.0, "dry_run": True}
        plan = merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "out.pth", **given).plan
        assert plan.method == method and plan.changed
    save(tmp_path / "tuned.pth", {"other.weight": torch.ones(2)})
    with pytest.raises(LayoutError, match="is of kind"):
        merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "out.pth")
    for method in ("state", "lora"):
        with pytest.raises(LayoutError, match="has no tensor named"):
            merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "out.pth", method=method, alpha=1.0)


def test_include_and_exclude(run, tmp_path):
    base, tuned = random_model(), random_model(seed=1)
    found = run(base, tuned, include=["blocks.*.att.*", "head.weight"], exclude=["*.key.weight"])
    for name in base:
        taken = (".att." in name or name == "head.weight") and not name.endswith(".key.weight")
        assert same(found[name], tuned[name] if taken else base[name]), name
    found = run(base, random_lora(), alpha=4.0, include=["*.att.key.weight"])
    assert {n for n in base if not same(found[n], base[n])} == {f"blocks.{i}.att.key.weight" for i in range(2)}
    result = merge(
        tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "o.pth", alpha=4.0, exclude=["*ln1*"], dry_run=True
    )
    assert result.plan.skipped == tuple(f"blocks.{i}.ln1.weight" for i in range(2))


@pytest.mark.parametrize(
    "given", [{"include": "head.weight"}, {"exclude": "head.weight"}, {"exclude": ["haed.weight"]}]
)
def test_patterns_that_cannot_be_meant(given, run):
    with pytest.raises(ParameterError, match="must be a list|Did you mean head.weight"):
        run(random_model(), random_model(seed=1), **given)


NAMES = [*random_model(), *random_state()]
globs = st.lists(st.sampled_from(["*", "*weight", "blocks.0.*", "blocks.[01].att.*", "?mb.*", "*.x_[rw]"]), max_size=3)


@given(st.one_of(st.none(), globs), st.one_of(st.none(), globs), st.randoms(use_true_random=False))
def test_selection_is_inclusion_without_exclusion(include, exclude, rng):
    names = rng.sample(NAMES, len(NAMES))
    wide = set().union(*(selected_names(names, [p], None) for p in include)) if include else set(names)
    left = wide - set().union(*(selected_names(names, [p], None) for p in exclude or []))
    if left:
        assert selected_names(names, include, exclude) == left
    else:
        with pytest.raises(ParameterError, match="keep out all"):
            selected_names(names, include, exclude)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
def test_any_merge_passes_its_proof(data, run):
    """Random kinds, dtypes, shares, patterns and formats: the independent recomputation agrees."""
    version = data.draw(st.sampled_from(["5.2", "6.0", "7.0"]))
    dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
    make = data.draw(st.sampled_from([random_state, random_model, random_lora]))
    base, tuned = (
        random_model(LAYOUTS[version], data.draw(dtypes)),
        make(LAYOUTS[version], dtype=data.draw(dtypes), seed=3),
    )
    keep = data.draw(st.sampled_from([1.0, 0.4]))
    names = sorted(tuned)
    if make is random_model:
        tuned = {n: tuned[n] for n in random.Random(1).sample(names, max(1, int(len(names) * keep)))}
    alpha = data.draw(st.floats(0, 1)) if make is not random_lora else data.draw(st.floats(0, 64))
    run(
        base,
        tuned,
        data.draw(st.sampled_from(FORMATS)),
        method={random_state: "state", random_model: "overlay", random_lora: "lora"}[make],
        alpha=alpha,
        dtype=data.draw(st.sampled_from([None, "bf16", "fp32"])),
        precision=data.draw(st.sampled_from(["float32", "float64"])),
        exclude=data.draw(st.sampled_from([None, ["blocks.1.*"]])) if make is not random_model else None,
    )


def test_a_folder_as_the_base_and_as_the_fine_tune(tmp_path):
    base, tuned = random_model(), random_model(seed=1)
    write_checkpoint(tmp_path / "base", base, max_shard_size=3000)
    write_checkpoint(tmp_path / "tuned", tuned, max_shard_size=5000)
    (tmp_path / "base" / "stray.safetensors").write_bytes(b"not a part of it")
    result = merge(tmp_path / "base", tmp_path / "tuned", tmp_path / "out.pth", alpha=0.5)
    assert all(c.passed for c in verify_merge(result))
    with open_checkpoint(tmp_path / "out.pth") as ck:
        assert ck.kind == "model" and str(ck.layout) == str(SEVEN).replace("v 2 g 5", "g 5 v 2")
