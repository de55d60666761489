"""Models mixed with models, against formulas written out here in numpy and float64."""

import hashlib
import json
import math
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import LAYOUTS, SEVEN, random_model, random_state, same
from pairwise import each

from rwkv_lab import merge
from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.merge import MERGE_METHODS, verify_merge
from rwkv_lab.merge.mixing import MIXING
from rwkv_lab.merge.mixing.ties import smallest_kept
from rwkv_lab.merge.random_numbers import draws

NAMES = tuple(MIXING)


def tune(base: dict, seed: int, size: float = 0.1, dtype=None) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        n: (t.double() + size * torch.randn(t.shape, generator=g, dtype=torch.float64)).to(dtype or t.dtype)
        for n, t in base.items()
    }


@pytest.fixture
def run(tmp_path):
    """Mixes tensors in memory; gives the output's, after every check passed.

    `effect`: whether the checks of the effect pass; None where that depends on what was drawn.
    """

    def mixed(base, *tuned, effect=True, **more):
        paths = [tmp_path / f"{i}.pth" for i in range(len(tuned) + 1)]
        for path, tensors in zip(paths, (base, *tuned), strict=True):
            torch.save(tensors, path)
        result = merge(paths[0], paths[1:], tmp_path / "out.pth", overwrite=True, **more)
        checks = [*result.checks, *verify_merge(result)]
        of_effect = [c for c in checks if c.name.startswith(("the merge has an effect", "share of the asked-for"))]
        assert all(c.passed for c in checks if c not in of_effect), [str(c) for c in checks if not c.passed]
        # With alpha 0 nothing is to change, which the plan's notes say; there is no effect to check then.
        assert effect is None or all(c.passed for c in of_effect) is effect, [str(c) for c in of_effect]
        return torch.load(tmp_path / "out.pth", weights_only=True)

    return mixed


def flat(tensor) -> np.ndarray:
    return tensor.double().numpy().reshape(-1)


def by_hand(method: str, name: str, base, tuned, alpha=1.0, weights=None, density=None, seed=0) -> np.ndarray:
    """One tensor, from the definition of the method; every parameter that is not here at its default."""
    b, ts = flat(base), [flat(t) for t in tuned]
    if method == "linear":
        return np.average([b, *ts], axis=0, weights=weights)
    if method == "slerp":
        cos = b @ ts[0] / np.linalg.norm(b) / np.linalg.norm(ts[0])
        omega = np.arccos(cos)
        if abs(cos) > 0.9995:
            return (1 - alpha) * b + alpha * ts[0]
        return (np.sin((1 - alpha) * omega) * b + np.sin(alpha * omega) * ts[0]) / np.sin(omega)
    deltas = [t - b for t in ts]
    if method == "model_stock":
        n = len(ts)
        unit = [d / np.linalg.norm(d) for d in deltas]
        c = np.mean([unit[i] @ unit[j] for i in range(n) for j in range(i)])
        t = np.clip(n * c / (1 + (n - 1) * c), 0, 1)
        return t * np.mean(ts, axis=0) + (1 - t) * b
    weights = np.array(weights or [1.0] * len(ts))[:, None]
    if method == "ties":
        for d in deltas:  # values are distinct here
            d[np.argsort(-np.abs(d.astype(np.float32)), kind="stable")[max(int(density * len(d)), 1) :]] = 0
    if method.startswith("dare"):
        for m, d in enumerate(deltas):
            d *= (draws(seed, m, name, 0, len(d)).numpy() < density) / density
    weighted = weights * np.array(deltas)
    if method in ("task_arithmetic", "dare_linear"):
        return b + alpha * weighted.sum(0)
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    below = (weights * agree).sum(0)
    return b + alpha * (weighted * agree).sum(0) / np.where(below == 0, 1, below)


DTYPES = [torch.bfloat16, torch.float16, torch.float64]
CASES = [
    ("linear", 1, {"weights": [0.25, 0.75]}),
    ("linear", 3, {"weights": [1.0, -0.5, 2.0, 0.3]}),
    ("slerp", 1, {"alpha": 0.3}),
    ("task_arithmetic", 1, {"alpha": -0.7}),
    ("task_arithmetic", 2, {"alpha": 0.5, "weights": [1.0, 2.5]}),
    ("ties", 1, {"density": 0.3}),
    ("ties", 3, {"density": 0.2, "weights": [1.0, 0.5, 2.0], "alpha": 1.5}),
    ("dare_linear", 2, {"density": 0.6, "seed": 7}),
    ("dare_ties", 3, {"density": 0.4, "weights": [1.0, 0.5, 0.7]}),
    ("model_stock", 2, {}),
    ("model_stock", 3, {}),
]


@pytest.mark.parametrize(("case", "dtype"), each(CASES, [torch.float32]) + each(CASES, DTYPES), ids=str)
def test_against_the_formula(case, dtype, run):
    """Every dtype of the base; the tuned models are float32, so that no two deltas are equal."""
    method, count, given = case
    base = random_model(dtype=dtype)
    tuned = [tune(base, s, dtype=torch.float32) for s in range(1, count + 1)]
    arguments = {k: v for k, v in given.items() if k in ("alpha", "weights")}
    parameters = {k: v for k, v in given.items() if k not in arguments}
    found = run(base, *tuned, method=method, parameters=parameters, **arguments)
    for name, b in base.items():
        exact = by_hand(method, name, b, [t[name] for t in tuned], **given)
        size = np.abs(exact).max() + max(np.abs(flat(t[name])).max() for t in tuned)
        # Half a unit of the output's dtype, and float32 arithmetic on values of that size.
        np.testing.assert_allclose(flat(found[name]), exact, rtol=torch.finfo(dtype).eps, atol=3e-6 * size)
        assert found[name].dtype == dtype and found[name].shape == b.shape


@pytest.mark.parametrize(("method", "version"), [*each(NAMES, LAYOUTS), *each(NAMES, list(LAYOUTS)[::-1])])
def test_every_method_on_every_generation(method, version, run):
    base = random_model(LAYOUTS[version])
    tuned = [tune(base, s) for s in ((1,) if method == "slerp" else (1, 2))]
    found = run(base, *tuned, method=method, **({"weights": [1, 2, 3]} if method == "linear" else {}))
    assert list(found) == list(base) and any(not same(found[n], base[n]) for n in base)


def test_what_gives_the_base_or_a_model_back(run):
    base = random_model(dtype=torch.float32)
    base["emb.weight"][0, :3] = torch.tensor([-0.0, 1e-40, 0.0])
    one, two = tune(base, 1), tune(base, 2)
    for method, more in [
        ("linear", {"weights": [1, 0, 0]}),
        ("task_arithmetic", {"alpha": 0}),
        ("ties", {"alpha": 0}),
        ("dare_linear", {"alpha": 0.0}),
    ]:
        found = run(base, one, two, method=method, effect=method != "linear", **more)
        assert all(same(found[n], t) for n, t in base.items()), method
    found = run(base, one, method="slerp", alpha=0)
    assert all(same(found[n], t) for n, t in base.items())

    def near(found, wanted):  # two float32 roundings of values of size 1 to 4
        for n, t in wanted.items():
            torch.testing.assert_close(found[n], t, rtol=3e-7, atol=1e-6)

    near(run(base, one, method="slerp", alpha=1), one)
    near(run(base, one, method="linear", weights=[0, 3]), one)
    near(run(base, one, method="task_arithmetic"), one)
    near(run(base, one, method="ties", parameters={"density": 1}), one)
    arithmetic = run(base, one, two, method="task_arithmetic", weights=[0.3, 2])
    found = run(base, one, two, method="dare_linear", weights=[0.3, 2], parameters={"density": 1})
    assert all(same(found[n], t) for n, t in arithmetic.items())
    ties = run(base, one, two, method="ties", weights=[0.3, 2], parameters={"density": 1})
    found = run(base, one, two, method="dare_ties", weights=[0.3, 2], parameters={"density": 1})
    assert all(same(found[n], t) for n, t in ties.items())
    same_twice = run(base, one, {n: t.clone() for n, t in one.items()}, method="model_stock")
    near(same_twice, one)  # full agreement: the mean


def test_slerp_where_there_is_no_arc(run):
    base = random_model(dtype=torch.float32)
    zeros, parallel, opposite = "blocks.0.ln1.bias", "blocks.1.ln1.bias", "ln_out.bias"
    base[zeros].zero_()
    tuned = tune(base, 1) | {parallel: base[parallel] * 3, opposite: -base[opposite] * 2}
    found = run(base, tuned, method="slerp", alpha=0.25)
    for name in (zeros, parallel, opposite):
        torch.testing.assert_close(found[name], torch.lerp(base[name], tuned[name], 0.25))
    length = torch.linalg.vector_norm
    unit = {n: t / length(t) for n, t in base.items()}
    other = {n: t / length(t) for n, t in tune(base, 5, size=1.0).items()}
    unit[zeros] = other[zeros]
    assert all(abs(float(length(t)) - 1) < 1e-5 for t in run(unit, other, method="slerp", alpha=0.4).values())


def test_equal_magnitudes_are_all_kept(run):
    """bfloat16 deltas are often equal: which stands first in the file must not decide."""
    base = random_model(dtype=torch.float32)
    tuned = {n: t + 0.5 * torch.sign(torch.arange(t.numel()).reshape(t.shape) % 3 - 1.0) for n, t in base.items()}
    tuned = {n: base[n] + (t - base[n]).round(decimals=1) for n, t in tuned.items()}
    found = run({n: torch.zeros_like(t) for n, t in base.items()}, {n: (t - base[n]).round(decimals=1) for n, t in
        tuned.items()}, method="ties", parameters={"density": 0.01})  # fmt: skip
    for n, t in found.items():
        wanted = (tuned[n] - base[n]).round(decimals=1)
        assert torch.equal(t, wanted), n


def test_models_that_cancel_in_model_stock_leave_the_base(run):
    base = random_model(dtype=torch.float64)
    up = tune(base, 1)
    down = {n: 2 * base[n] - t for n, t in up.items()}
    found = run(base, up, down, method="model_stock", precision="float64", effect=False)
    assert all(torch.allclose(found[n], t, atol=1e-12) for n, t in base.items())


@settings(max_examples=60)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
    st.floats(0.001, 1),
    st.integers(1, 50),
)
def test_the_threshold_is_the_kth_largest(values, density, step):
    tensor = torch.tensor(values, dtype=torch.float32)

    def blocks():
        return ((torch.zeros_like(piece), [piece]) for piece in tensor.split(step))

    (found,) = smallest_kept(blocks, [density])
    k = max(int(density * len(values)), 1)
    wanted = sorted(abs(v) for v in tensor.tolist())[-k]
    assert found == wanted or density == 1 and found == 0


@settings(max_examples=40)
@given(st.integers(0, 5000), st.integers(0, 300), st.integers(0, 2**63 - 1))
def test_a_draw_belongs_to_its_place(start, count, seed):
    whole = draws(seed, 1, "emb.weight", 0, start + count)
    assert torch.equal(draws(seed, 1, "emb.weight", start, count), whole[start:])
    assert bool(((whole >= 0) & (whole < 1)).all())


def test_draws_are_the_words_of_philox():
    """The counter-based generator, ten rounds, written out with Python's integers."""
    key = int.from_bytes(hashlib.sha256(b"3/0/head.weight").digest()[:16], "little")
    mask, words = 2**64 - 1, []
    for counter in range(1, 4):  # numpy counts before it draws
        c, k = [counter, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [b >> 64 ^ c[1] ^ k[0], b & mask, a >> 64 ^ c[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += [w for x in c for w in (x & 0xFFFFFFFF, x >> 32)]
    assert draws(3, 0, "head.weight", 0, 24).tolist() == [w / 2**32 for w in words]
    many = draws(3, 0, "head.weight", 0, 100_000)
    assert abs(float((many < 0.3).double().mean()) - 0.3) < 5 * math.sqrt(0.21 / 100_000)
    assert not torch.equal(draws(3, 1, "head.weight", 0, 24), draws(3, 0, "head.weight", 0, 24))


@pytest.mark.parametrize("method", NAMES)
def test_blocks_threads_and_order_decide_nothing(method, tmp_path, monkeypatch):
    base = random_model() | {"extra.weight": torch.randn(1_200_003).bfloat16()}
    for i, tensors in enumerate((base, tune(base, 1, dtype=torch.float32), tune(base, 2))):
        write_checkpoint(tmp_path / f"{i}.safetensors", tensors)
    tuned = [tmp_path / f"{i}.safetensors" for i in ((1,) if method == "slerp" else (1, 2))]
    given = {"method": method, "allow_extra": ["extra.*"]} | ({"weights": [1, 2, 3]} if method == "linear" else {})
    result = merge(tmp_path / "0.safetensors", tuned, tmp_path / "o.pth", **given)
    checks = verify_merge(result)
    assert all(c.passed for c in checks), [str(c) for c in checks]
    first = (tmp_path / "o.pth").read_bytes()
    monkeypatch.setattr("rwkv_lab.checkpoint.stream.WORKERS", 1)
    write_checkpoint(tmp_path / "0.safetensors", dict(reversed(list(base.items()))), overwrite=True)
    merge(tmp_path / "0.safetensors", tuned, tmp_path / "p.pth", **given)
    again = torch.load(tmp_path / "p.pth", weights_only=True)
    assert all(same(again[n], t) for n, t in torch.load(tmp_path / "o.pth", weights_only=True).items())
    monkeypatch.setattr("rwkv_lab.checkpoint.source.BLOCK", 1 << 18)
    merge(tmp_path / "0.safetensors", tuned, tmp_path / "p.pth", overwrite=True, **given)
    again = torch.load(tmp_path / "p.pth", weights_only=True)
    for n, t in torch.load(tmp_path / "o.pth", weights_only=True).items():
        # Sums over a whole tensor may be added up in another order: one rounding of the ratio made from them.
        if method in ("slerp", "model_stock"):
            torch.testing.assert_close(again[n], t)
        else:
            assert same(again[n], t)
    assert first == (tmp_path / "o.pth").read_bytes()


def test_values_by_pattern_and_along_the_layers(run, tmp_path):
    layout = Layout("7.0", 3, 16, 16, 64, 11, 4, 4, SEVEN.ranks)
    base = random_model(layout, torch.float32)
    tuned = tune(base, 1)
    parameters = {"alpha": {"blocks.*.att": 0.3, "*.ffn.key.weight": {"gradient": [0, 1]}, "head": 0}}
    found = run(base, tuned, method="task_arithmetic", alpha=0.6, parameters=parameters)
    for n, b in base.items():
        alpha = 0.3 if ".att." in n else 0 if n == "head.weight" else 0.6
        if n.endswith("ffn.key.weight"):
            alpha = int(n.split(".")[1]) / 2
        torch.testing.assert_close(found[n], b + alpha * (tuned[n] - b))
    assert same(found["head.weight"], base["head.weight"])
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        recipe = json.loads(archive.read("archive/rwkv_lab.json"))["recipe"]
    assert list(recipe["alpha"]) == [*parameters["alpha"], "*"]  # in order: the first that fits decides
    merge(tmp_path / "0.pth", tmp_path / "1.pth", tmp_path / "again.pth",
          **{k: recipe[k] for k in ("method", "alpha", "weights", "parameters")})  # fmt: skip
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "out.pth").read_bytes()
    found = run(base, tuned, tune(base, 2), method="ties", weights=[{"emb": 0.0, "*": 1}, 2.0])
    assert not same(found["emb.weight"], base["emb.weight"])
    found = run(base, tuned, method="linear", parameters={"weights": {"blocks.*.att": 0.3, "*": [1, 0]}})
    torch.testing.assert_close(
        found["blocks.1.att.key.weight"],
        torch.lerp(base["blocks.1.att.key.weight"], tuned["blocks.1.att.key.weight"], 0.3),
    )
    assert same(found["emb.weight"], base["emb.weight"])


def test_include_and_exclude_keep_the_base(run):
    base = random_model()
    found = run(base, tune(base, 1), method="slerp", include=["blocks.0.*"], exclude=["*.ln1.*"])
    for n, b in base.items():
        assert same(found[n], b) == (not n.startswith("blocks.0.") or ".ln1." in n)


def test_parts_states_and_unused_tensors(run):
    base = random_model(dtype=torch.float32)
    part = {n: t for n, t in tune(base, 1).items() if "head" in n or n == "blocks.0.ln1.weight"}
    whole = tune(base, 2) | random_state() | {n: t for n, t in random_model(unused=True).items() if n not in base}
    found = run(base, part, whole, method="task_arithmetic", weights=[1, 0.5])
    name = "blocks.0.att.key.weight"
    torch.testing.assert_close(found[name], base[name] + 0.5 * (whole[name] - base[name]))
    state = "blocks.1.att.time_state"
    assert torch.equal(found[state], 0.5 * whole[state])  # no state is a state of zeros
    assert "blocks.0.att.v0" not in found
    with_unused = base | {f"blocks.0.att.v{i}": whole[f"blocks.0.att.v{i}"] + 1 for i in range(3)}
    assert "blocks.0.att.v0" in run(with_unused, whole, method="slerp")


REFUSED = [
    ({"method": "linear"}, ParameterError, "needs weights: .*one per model"),
    ({"method": "linear", "weights": [1, 2]}, ParameterError, "has 2 numbers.*; 3 are needed"),
    ({"method": "linear", "weights": [1, -2, 1]}, ParameterError, "add up to 0"),
    ({"method": "linear", "weights": [1, float("nan"), 1]}, ParameterError, "must be finite"),
    ({"method": "linear", "weights": 0.5}, ParameterError, "a list of 3 numbers"),
    ({"method": "linear", "weights": [1, 1, 1], "alpha": 0.5}, ParameterError, "takes no parameter 'alpha'"),
    ({"method": "slerp"}, ParameterError, "takes 1 tuned models beside the base; 2 are given"),
    ({"method": "task_arithmetic", "weights": [1, 2, 3]}, ParameterError, "one for each tuned model"),
    ({"method": "task_arithmetic", "weights": [1, -1], "parameters": {"normalize": True}}, ParameterError, "add up"),
    ({"method": "ties", "parameters": {"density": 1.5}}, ParameterError, "density=1.5.*0 to 1"),
    ({"method": "ties", "parameters": {"densty": 0.5}}, ParameterError, "did you mean density"),
    ({"method": "ties", "parameters": {"normalize": 1}}, ParameterError, "True or False"),
    ({"method": "ties", "parameters": {"seed": 1}}, ParameterError, "takes no parameter 'seed'"),
    ({"method": "ties", "parameters": [1]}, ParameterError, "mapping of names"),
    ({"method": "ties", "parameters": {"density": {1, 2}}}, ParameterError, "mappings are needed"),
    ({"method": "dare_ties", "parameters": {"seed": 0.5}}, ParameterError, "whole number"),
    ({"method": "dare_ties", "parameters": {"seed": -1}}, ParameterError, "seed"),
    ({"method": "ties", "parameters": {"alpha": {"blocks.*.atn": 1}}}, ParameterError, "none.*\n.*mean blocks.0.att"),
    ({"method": "ties", "parameters": {"alpha": {"gradient": []}}}, ParameterError, "list of numbers"),
    ({"method": "ties", "alpha": 1, "parameters": {"alpha": 1}}, ParameterError, "given twice"),
    ({"method": "linear", "parameters": {"weights": {"emb": [1, 1, 1]}}}, ParameterError, "no pattern matches"),
    ({"method": "tees"}, ParameterError, "did you mean ties"),
    ({"method": "auto"}, ParameterError, "names 2 files"),
    ({"method": "overlay"}, ParameterError, "names 2 files"),
]


@pytest.mark.parametrize(("given", "error", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_what_is_refused_by_the_plan(given, error, said, run):
    base = random_model()
    with pytest.raises(error, match=said) as caught:
        run(base, tune(base, 1), tune(base, 2), dry_run=True, **given)
    assert str(caught.value).count("\n") < 3


def test_models_that_do_not_belong_together(tmp_path):
    base = random_model()
    torch.save(base, tmp_path / "base.pth")
    torch.save(tune(base, 1), tmp_path / "tuned.pth")
    others = {
        "is RWKV-6.0": random_model(LAYOUTS["6.0"]),
        "n_layer differs": random_model(Layout("7.0", 3, 16, 16, 64, 11, 4, 4, SEVEN.ranks)),
        "vocab_size differs": random_model(Layout("7.0", 2, 16, 16, 64, 12, 4, 4, SEVEN.ranks)),
        "has shape": random_model(Layout("7.0", 2, 16, 16, 64, 11, 4, 4, SEVEN.ranks | {"g": 7})),
        "of kind 'state'": random_state(),
        "not in the base": tune(base, 1) | {"more": torch.ones(2)},
    }
    for said, tensors in others.items():
        torch.save(tensors, tmp_path / "other.pth")
        with pytest.raises(LayoutError, match=said):
            merge(tmp_path / "base.pth", [tmp_path / "tuned.pth", tmp_path / "other.pth"], tmp_path / "o.pth",
                  method="task_arithmetic")  # fmt: skip
    (tmp_path / "link.pth").hardlink_to(tmp_path / "tuned.pth")
    for pair in (("tuned.pth", "link.pth"), ("base.pth", "tuned.pth")):
        with pytest.raises(ParameterError, match="same file"):
            merge(tmp_path / "base.pth", [tmp_path / n for n in pair], tmp_path / "o.pth", method="model_stock")


@pytest.mark.parametrize("method", NAMES)
def test_a_nan_in_a_model_comes_out_and_is_refused(method, run):
    """Also where the method would drop the value: what is not a number has no size and no sign."""
    base = random_model()
    tuned = [tune(base, s) for s in ((1,) if method == "slerp" else (1, 2))]
    tuned[0]["emb.weight"][3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"emb.weight \(\d+ NaN\)"):
        run(base, *tuned, method=method, **({"weights": [1, 2, 3]} if method == "linear" else {}))


def test_memory_does_not_grow_with_the_models(warm, tmp_path):
    """Peaks of processes that mix three models of 25 and of 100 MB, by the system's own count."""
    if sys.platform != "linux":
        pytest.skip("the system does not tell a process its peak of memory (/proc/self/status)")
    code = (
        "import os, sys; from rwkv_lab import merge; os.chdir(sys.argv[1])\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "before = peak()\n"
        "for method in ('ties', 'dare_ties', 'model_stock'):\n"
        "    plan = merge('0.pth', ['1.pth', '2.pth'], 'o.pth', method=method, overwrite=True).plan\n"
        "print(peak() - before, plan.memory_needed)"
    )
    grown, planned = [], []
    for words in (50_000, 200_000):
        for i in range(3):
            layout = Layout("4.0", 1, 64, 64, 64, words, 0, 0)
            write_checkpoint(tmp_path / f"{i}.pth", random_model(layout, torch.float32, i), overwrite=True)
        words_of_it = [warm.python, "-c", code, tmp_path]
        done = subprocess.run(words_of_it, env=warm.environment, capture_output=True, text=True, check=True)
        peak, plan = map(int, done.stdout.split())
        grown.append(peak)
        planned.append(plan)
    assert planned[0] == planned[1] and max(grown) < planned[0], (grown, planned)


def test_a_delta_that_float32_rounds_passes_the_proof(run):
    """The cosine of deltas decides model_stock's shares; that of a small delta is what the precision lets it be."""
    base = random_model(LAYOUTS["4.0"], torch.bfloat16)
    tuned = tune(base, 0, 0.001, torch.float64), tune(base, 1, 2.0, torch.bfloat16)
    run(base, *tuned, method="model_stock", precision="float32")


def test_methods_say_what_they_do_and_take():
    for method in MERGE_METHODS.values():
        assert len(method.help) > 20 and "\n" not in method.help and method.title and callable(method.proof)
        assert all(p.takes.help for p in method.parameters)
    assert MERGE_METHODS["linear"].help.startswith("the weighted mean")
    assert [p.name for p in MERGE_METHODS["ties"].parameters] == ["alpha", "weights", "density", "normalize"]


def test_the_plan_says_what_it_means_for_an_rwkv(tmp_path):
    for version, words in {"7.0": "w0 .*logit of the decay", "6.0": "time_decay .*log of the decay rate"}.items():
        base = random_model(LAYOUTS[version])
        torch.save(base, tmp_path / "base.pth")
        torch.save(tune(base, 1), tmp_path / "tuned.pth")
        paths = (tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "o.pth")
        notes = merge(*paths, method="slerp", dry_run=True).plan.notes
        assert any(re.search(words, note) for note in notes)
        assert merge(*paths, dry_run=True).plan.notes == ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data())
def test_any_mix_passes_its_proof(data, run):
    version = data.draw(st.sampled_from(["4.0", "6.0", "7.0"]))
    dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
    method = data.draw(st.sampled_from(NAMES))
    count = 1 if method == "slerp" else data.draw(st.integers(2, 3))
    base = random_model(LAYOUTS[version], data.draw(dtypes))
    tuned = [tune(base, s, data.draw(st.sampled_from([0.001, 0.1, 2.0])), data.draw(dtypes)) for s in range(count)]
    given, parameters = {}, {}
    if method not in ("linear", "model_stock"):
        given["alpha"] = data.draw(st.floats(0, 1))
    if method == "linear":
        given["weights"] = data.draw(st.lists(st.floats(0.1, 2), min_size=count + 1, max_size=count + 1))
    if "ties" in method or "dare" in method:
        parameters["density"] = data.draw(st.lists(st.floats(0.05, 1), min_size=count, max_size=count))
        # Not so small that float32 loses their products with the deltas.
        weights = st.sampled_from([-1.0, -0.3, 0.01, 0.7, 1.0, 2.0])
        given["weights"] = data.draw(st.lists(weights, min_size=count, max_size=count))
    given["precision"] = data.draw(st.sampled_from(["float32", "float64"]))
    dtype = data.draw(st.sampled_from([None, "bf16"]))
    run(base, *tuned, method=method, parameters=parameters, dtype=dtype, effect=None, **given)
