"""Tuned states mixed with each other: into a state file, and into a model."""

import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state, same

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.merge.mixing import MIXING

STATE = "blocks.1.att.time_state"


@pytest.fixture
def files(tmp_path):
    """Three states and two models by name."""
    for i in range(3):
        torch.save(random_state(seed=i), tmp_path / f"s{i}.pth")
    torch.save(random_model(), tmp_path / "model.pth")
    torch.save(random_model() | random_state(seed=9), tmp_path / "with_state.pth")
    return {p.stem: p for p in tmp_path.glob("*.pth")}


def merged(*given, **more):
    result = merge(*given, **more)
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks), "\n".join(map(str, checks))
    return torch.load(result.out, weights_only=True), result


def mean(*shares):
    states = [random_state(seed=i) for i in range(len(shares))]
    return {n: sum(w * s[n] for w, s in zip(shares, states, strict=True)) / sum(shares) for n in states[0]}


@pytest.mark.parametrize("weights", [[1, 1], [0.25, 0.75], [1, 2, 3]])
def test_states_become_a_state_file(files, tmp_path, weights):
    tuned = [files[f"s{i}"] for i in range(1, len(weights))]
    found, result = merged(files["s0"], tuned, tmp_path / "o.pth", "linear", weights=weights)
    wanted = mean(*weights)
    assert set(found) == set(wanted)
    for n, t in wanted.items():
        torch.testing.assert_close(found[n], t)
    assert "states of RWKV" in str(result.plan)
    with open_checkpoint(tmp_path / "o.pth") as ck:
        assert ck.kind == "state"
    into, _ = merged(files["model"], tmp_path / "o.pth", tmp_path / "m.pth")
    assert same(into[STATE], found[STATE])


@pytest.mark.parametrize("method", list(MIXING))
def test_every_mixing_method_takes_states(files, tmp_path, method):
    given = {"weights": [1, 1]} if method == "linear" else {}
    tuned = [files["s1"]] if method != "model_stock" else [files["s1"], files["s2"]]
    found, _ = merged(files["s0"], tuned, tmp_path / "o.pth", method, **given)
    assert set(found) == set(random_state()) and not same(found[STATE], random_state(seed=0)[STATE])


@pytest.mark.parametrize("weights", [[1, 1], [0, 1, 1], [0.5, 1.5], [{"blocks.0": 3.0, "*": 1.0}, 1]])
def test_states_mixed_into_a_model(files, tmp_path, weights):
    """With a weight for each state the model's own counts nothing."""
    found, result = merged(files["model"], [files["s0"], files["s1"]], tmp_path / "o.pth", "linear", weights=weights)
    shares = weights[-2:] if not isinstance(weights[0], dict) else [1, 1]
    torch.testing.assert_close(found[STATE], mean(*shares)[STATE])
    if isinstance(weights[0], dict):
        torch.testing.assert_close(found["blocks.0.att.time_state"], mean(3, 1)["blocks.0.att.time_state"])
    assert all(same(found[n], t) for n, t in random_model().items()) and len(result.recipe["weights"]) == 3


def test_a_model_s_own_state_counts_only_with_a_weight(files, tmp_path):
    own = random_state(seed=9)[STATE]
    states = [files["s0"], files["s1"]]
    found, _ = merged(files["with_state"], states, tmp_path / "a.pth", "linear", weights=[1, 1])
    torch.testing.assert_close(found[STATE], mean(1, 1)[STATE])
    found, _ = merged(files["with_state"], states, tmp_path / "b.pth", "linear", weights=[2, 1, 1])
    torch.testing.assert_close(found[STATE], (own + mean(1, 1)[STATE]) / 2)


def test_states_that_do_not_go_together(files, tmp_path):
    torch.save(random_state(LAYOUTS["5.2"]) | {"blocks.2.att.time_state": torch.ones(4, 4, 4)}, tmp_path / "more.pth")
    torch.save({n: t[:2] for n, t in random_state().items()}, tmp_path / "fewer.pth")
    for name in ("more", "fewer"):
        with pytest.raises(LayoutError, match="states of other models"):
            merge(files["s0"], tmp_path / f"{name}.pth", tmp_path / "o.pth", "linear", weights=[1, 1])
    with pytest.raises(ParameterError, match="method='auto' puts one into a model(.|\n)*method='linear'"):
        merge(files["s0"], files["s1"], tmp_path / "o.pth")
    with pytest.raises(ParameterError, match="3 are needed|2 are needed"):
        merge(files["s0"], files["s1"], tmp_path / "o.pth", "linear", weights=[1, 1, 1])
    with pytest.raises(LayoutError, match="Give the model as base, the state as tuned"):
        merge(files["s0"], files["model"], tmp_path / "o.pth")
    torch.save(random_lora(), tmp_path / "l.pth")
    with pytest.raises(LayoutError, match="kind 'state'"):
        merge(files["s0"], tmp_path / "l.pth", tmp_path / "o.pth", alpha=2.0)
    assert not (tmp_path / "o.pth").exists()


@pytest.mark.parametrize("lacks", ["base", "tuned"])
def test_a_state_for_some_layers_is_mixed_and_said(files, tmp_path, lacks):
    some = {n: t for n, t in random_state(seed=1).items() if n == STATE}
    torch.save(some, tmp_path / "some.pth")
    given = (tmp_path / "some.pth", files["s0"]) if lacks == "base" else (files["s0"], tmp_path / "some.pth")
    found, result = merged(*given, tmp_path / "o.pth", "linear", weights=[1, 3])
    whole, first = random_state(seed=0), "blocks.0.att.time_state"
    share = 0.25 if lacks == "tuned" else 0.75
    torch.testing.assert_close(found[STATE], share * whole[STATE] + (1 - share) * some[STATE])
    torch.testing.assert_close(found[first], whole[first] if lacks == "tuned" else 0.75 * whole[first])
    counts = "the base's" if lacks == "tuned" else "zeros"
    said = f"some.pth has no state for 1 of 2 layers (first {first}): there it counts as {counts}."
    assert said in result.plan.notes
