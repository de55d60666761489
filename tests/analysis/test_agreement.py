"""Modes beside float64, the hand-over, and where two runs part: shown on copies that were broken on purpose."""

import copy

import pytest
import torch
from random_models import VERSIONS, load_model
from random_rwkv7 import add_random_time_state, make_model, make_tokens

from rwkv_lab import wkv
from rwkv_lab.analysis.agreement import (
    GROWTH,
    LIMITS,
    ModeRow,
    Run,
    check_hand_over,
    compare_modes,
    first_mismatch,
    in_dtype,
)
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.model import RWKVMode

TOKENS = make_tokens(2, 70)


def break_the_chunked_decay(monkeypatch, factor=1.01):
    right = wkv._FORMS["wkv7"]["chunked"]
    broken = lambda r, w, *rest: right(r, w * factor, *rest)  # noqa: E731
    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", broken)


def test_every_mode_backend_and_dtype_agrees(tmp_path):
    model = make_model()
    add_random_time_state(model)
    model.set_mode(RWKVMode.RNN)
    write_checkpoint(tmp_path / "m.pth", model.state_dict())
    before = copy.deepcopy(model.state_dict())
    for source in (model, tmp_path / "m.pth"):
        rows = compare_modes(source, TOKENS)
        assert [row.verdict for row in rows] == ["PASS"] * 2 * sum(
            len(wkv.backends(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)
        )
        assert {row.dtype for row in rows} == {torch.float64, torch.float32, torch.bfloat16}
        assert all(row.curve.shape == (70,) and row.curve.max() < 10 * row.accuracy for row in rows)
        double, single = rows[:2], [row for row in rows if row.dtype == torch.float32]
        assert single[0].logits_error > double[1].logits_error > 0
        assert single[0].logits_apart == 0 < single[len(single) // 2].logits_apart
        assert rows[-1].logits_error > 1e-4  # bfloat16 cannot be that good: it was really run
    assert model.mode is RWKVMode.RNN and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_generation_agrees_and_hands_over(version, tmp_path):
    """Heads of an odd number, channels no power of two, decays from very slow to very fast."""
    model = load_model(tmp_path, version, torch.float64, n_head=3, n_embd=40, time_state=version != "4.0")
    tokens = make_tokens(2, 70, vocab_size=70)
    rows = compare_modes(model, tokens)
    assert {row.verdict for row in rows} == {"PASS"} and {row.backend for row in rows} == set(wkv.backends())
    assert all(row.growth <= GROWTH for row in rows)
    assert all(check.passed for check in check_hand_over(model, tokens))


@pytest.mark.parametrize(
    "version, weight, name",
    [
        ("4.0", "blocks.1.att.time_decay", "blocks.1.att.w"),
        ("4.0", "blocks.1.att.time_first", "blocks.1.att.y"),
        ("4.0", "blocks.0.ffn.receptance.weight", "blocks.0.ffn.r"),
        ("5.0", "blocks.1.att.key.weight", "blocks.1.att.k"),
        ("5.1", "blocks.0.att.gate.weight", "blocks.0.att.g"),
        ("5.2", "blocks.1.att.value.weight", "blocks.1.att.v"),
        ("5.2", "blocks.1.att.ln_x.weight", "blocks.1.att.out"),
        ("6.0", "blocks.1.att.time_decay_w2", "blocks.1.att.w"),
        ("6.0", "blocks.0.att.time_faaaa", "blocks.0.att.y"),
        ("6.0", "blocks.1.ffn.key.weight", "blocks.1.ffn.k"),
    ],
)
def test_a_changed_weight_of_every_generation_is_traced_to_its_operator(version, weight, name, tmp_path):
    good = load_model(tmp_path, version)
    bad = copy.deepcopy(good)
    parameter = bad.get_parameter(weight)
    parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    tokens = make_tokens(2, 30, vocab_size=70)
    found = first_mismatch(Run(good), Run(bad), tokens)
    assert found.name == name and found.token <= 1 and f"in layer {name[7]}," in str(found)


def test_growth_tells_errors_that_settle_from_errors_that_pile_up():
    def row(curve):
        return ModeRow(RWKVMode.RNN, "reference", torch.float32, 1.0, 1.0, curve=curve)

    tokens = torch.arange(1.0, 401)
    assert row(torch.ones(400)).growth == 1 and row(torch.zeros(400)).growth == 1
    assert row(tokens / (tokens + 20)).growth < 1.2 < GROWTH < 2.3 < row(tokens).growth
    assert row(1.1**tokens).growth > 1e6
    spike = torch.ones(400)
    spike[390] = 1e6
    assert row(spike).growth == 1  # one hard token is no growth
    assert not row(torch.full((400,), float("nan"))).growth <= GROWTH


def test_a_wrong_decay_in_one_form_is_found_and_placed(monkeypatch):
    model = make_model(n_layer=3)
    break_the_chunked_decay(monkeypatch)
    both = ["reference", "chunked"]
    rows = compare_modes(model, TOKENS, dtypes=[torch.float32], modes=[RWKVMode.TRANSFORMER], backends=both)
    assert [(row.backend, row.verdict) for row in rows] == [("reference", "PASS"), ("chunked", "FAIL")]
    found = first_mismatch(Run(model, backend="reference"), Run(model, backend="chunked"), TOKENS)
    # The first token reads a state of zeros, so its decay cannot matter.
    assert (found.name, found.layer, found.token) == ("blocks.0.att.y", 0, 1)
    assert "layer 0" in str(found) and "WKV operator" in str(found) and "token 1 " in str(found)


def test_modes_that_part_late_are_caught_at_that_token(monkeypatch):
    model = make_model(dtype=torch.float64)
    model.set_mode(RWKVMode.RNN)
    right = wkv._FORMS["wkv7"]["chunked"]

    def forgets_at_40(r, w, k, v, a, b, state):
        w = w.clone()
        w[:, 40:41] -= 0.5
        return right(r, w, k, v, a, b, state)

    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", forgets_at_40)
    found = first_mismatch(Run(model, RWKVMode.RNN), Run(model, RWKVMode.TRANSFORMER), TOKENS)
    assert (found.name, found.token) == ("blocks.0.att.y", 40)
    assert model.mode is RWKVMode.RNN


@pytest.mark.parametrize(
    "weight, name",
    [
        ("emb.weight", "blocks.0.x"),
        ("blocks.1.ln1.weight", "blocks.1.att.x"),
        ("blocks.2.att.receptance.weight", "blocks.2.att.r"),
        ("blocks.1.att.w2", "blocks.1.att.w"),
        ("blocks.1.att.v0", "blocks.1.att.v"),
        ("blocks.1.att.key.weight", "blocks.1.att.kk"),
        ("blocks.0.att.k_a", "blocks.0.att.k"),
        ("blocks.1.att.g1", "blocks.1.att.g"),
        ("blocks.1.att.output.weight", "blocks.1.att.out"),
        ("blocks.1.att.r_k", "blocks.1.att.out"),
        ("blocks.1.ln2.bias", "blocks.1.ffn.x"),
        ("blocks.0.ffn.x_k", "blocks.0.ffn.k"),
        ("blocks.2.ffn.value.weight", "blocks.2.ffn.out"),
        ("head.weight", "logits"),
    ],
)
def test_a_changed_weight_is_traced_to_its_operator(weight, name):
    good = make_model(n_layer=3)
    bad = copy.deepcopy(good)
    parameter = bad.get_parameter(weight)  # noise, not a factor: norms take factors out again
    parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    found = first_mismatch(Run(good), Run(bad), TOKENS)
    assert found.name == name and found.token <= 1  # a token shift acts from the second token on
    assert first_mismatch(Run(good), Run(copy.deepcopy(good)), TOKENS) is None


def test_one_bad_row_of_the_embedding_is_placed_at_the_token_that_uses_it():
    good = make_model()
    bad = copy.deepcopy(good)
    bad.emb.weight.data[TOKENS[0, 33]] = torch.linspace(-1, 1, 64)
    first_use = int((TOKENS == TOKENS[0, 33]).any(0).nonzero()[0])
    found = first_mismatch(Run(good), Run(bad), TOKENS)
    assert (found.name, found.token) == ("blocks.0.x", first_use)


def test_nan_is_a_mismatch_and_no_pass():
    good = make_model()
    bad = copy.deepcopy(good)
    bad.blocks[1].att.a0.data[..., 3] = float("nan")
    assert first_mismatch(Run(good), Run(bad), TOKENS).name == "blocks.1.att.a"
    assert all(row.verdict == "FAIL" for row in compare_modes(bad, TOKENS[:, :3], dtypes=[torch.float32]))


def test_tuned_states_are_not_rounded_with_the_weights():
    model = make_model()
    add_random_time_state(model)
    copied = in_dtype(model, torch.bfloat16)
    assert copied.emb.weight.dtype == torch.bfloat16
    assert torch.equal(copied.create_state().wkv, model.create_state().wkv)


def test_hand_over():
    model = in_dtype(make_model(), torch.float64)
    checks = check_hand_over(model, TOKENS)
    assert len(checks) == 6 and all(check.passed and check.limit == LIMITS[torch.float64] for check in checks)
    assert check_hand_over(model, TOKENS, splits=[41])[0].passed  # behind the model's ctx_len of 40
    with pytest.raises(ParameterError, match="after 70"):
        check_hand_over(model, TOKENS, splits=[70])


def test_hand_over_that_feeds_the_last_token_twice_fails(monkeypatch):
    model = in_dtype(make_model(), torch.float64)
    right = type(model).prefill

    def twice(self, tokens, state=None):
        _, state = right(self, tokens, state)
        return right(self, tokens[:, -1:], state)

    monkeypatch.setattr(type(model), "prefill", twice)
    assert not any(check.passed for check in check_hand_over(model, TOKENS))


def test_a_backend_that_cannot_run_is_a_row_and_not_the_end(monkeypatch):
    def none(*_):
        raise KernelError("there is no compiler")

    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", none)
    rows = compare_modes(make_model(), TOKENS[:, :5], dtypes=[torch.float32], backends=["reference", "chunked"])
    assert [row.verdict for row in rows] == ["PASS", "not run: there is no compiler"] * 2


def test_refusals():
    with pytest.raises(ParameterError, match="int8"):
        compare_modes(make_model(), TOKENS, dtypes=[torch.int8])
    with pytest.raises(ParameterError, match="2 layers"):
        first_mismatch(Run(make_model()), Run(make_model(n_layer=3)), TOKENS)
