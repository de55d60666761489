"""Modes beside float64, and the state hand-off: what agrees passes, what was broken on purpose does not."""

import copy
from dataclasses import replace

import pytest
import torch
from random_models import VERSIONS, load_model
from random_rwkv7 import add_random_time_state, make_model, make_tokens

from rwkv_lab import wkv
from rwkv_lab.analysis import agreement
from rwkv_lab.analysis.agreement import (
    GROWTH,
    LIMITS,
    ModeRow,
    agreement_checks,
    check_hand_off,
    check_memory,
    compare_modes,
    growth_checks,
    in_dtype,
)
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import DeviceError, KernelError, ParameterError
from rwkv_lab.model import RWKVMode

TOKENS = make_tokens(2, 70)


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
def test_every_generation_agrees_and_hands_off_its_state(version, tmp_path):
    """Heads of an odd number, channels no power of two, decays from very slow to very fast."""
    model = load_model(tmp_path, version, torch.float64, n_head=3, n_embd=40, time_state=version != "4.0")
    tokens = make_tokens(2, 70, vocab_size=70)
    rows = compare_modes(model, tokens)
    assert {row.verdict for row in rows} == {"PASS"} and {row.backend for row in rows} == set(wkv.backends())
    assert all(row.growth <= GROWTH for row in rows)
    assert all(check.passed for check in check_hand_off(model, tokens))


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


def test_nan_does_not_pass():
    bad = make_model()
    bad.blocks[1].att.a0.data[..., 3] = float("nan")
    rows = compare_modes(bad, TOKENS[:, :3], dtypes=[torch.float32])
    assert all(row.verdict == "FAIL" for row in rows) and not any(check.passed for check in agreement_checks(rows))


def test_tuned_states_are_not_rounded_with_the_weights():
    model = make_model()
    add_random_time_state(model)
    copied = in_dtype(model, torch.bfloat16)
    assert copied.emb.weight.dtype == torch.bfloat16
    assert torch.equal(copied.create_state().wkv, model.create_state().wkv)


def test_hand_off():
    model = in_dtype(make_model(), torch.float64)
    checks = check_hand_off(model, TOKENS)
    assert len(checks) == 6 and all(check.passed and check.limit == LIMITS[torch.float64] for check in checks)
    assert check_hand_off(model, TOKENS, splits=[41])[0].passed  # behind the model's ctx_len of 40
    with pytest.raises(ParameterError, match="after 70"):
        check_hand_off(model, TOKENS, splits=[70])


def test_hand_off_that_feeds_the_last_token_twice_fails(monkeypatch):
    model = in_dtype(make_model(), torch.float64)
    right = type(model).prefill

    def twice(self, tokens, state=None):
        _, state = right(self, tokens, state)
        return right(self, tokens[:, -1:], state)

    monkeypatch.setattr(type(model), "prefill", twice)
    assert not any(check.passed for check in check_hand_off(model, TOKENS))


def test_a_backend_that_cannot_run_is_a_row_and_not_the_end(monkeypatch):
    def none(*_):
        raise KernelError("there is no compiler")

    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", none)
    rows = compare_modes(make_model(), TOKENS[:, :5], dtypes=[torch.float32], backends=["reference", "chunked"])
    assert [row.verdict for row in rows] == ["PASS", "not run: there is no compiler"] * 2


def test_checks_of_rows():
    one = ModeRow(RWKVMode.RNN, "reference", torch.float32, 1e-3, 1e-2, 0.5e-2, 0.9e-2, 0.5e-3, 1.5e-3, torch.ones(64))
    short = replace(one, curve=torch.ones(63), state_apart=0.0)
    absent = ModeRow(RWKVMode.RNN, "cpu", torch.float32, 1e-3, 1e-2, problem="there is no compiler")
    assert [str(check) for check in agreement_checks([one, short, absent])] == [
        "PASS  float32, rnn, reference: logits and state beside float64: 0.009 (limit 0.01)",
        "FAIL  float32, rnn, reference: logits and state beside the first mode: 0.0015 (limit 0.001)",
        "PASS  float32, rnn, reference: logits and state beside float64: 0.009 (limit 0.01)",
        "PASS  float32, rnn, reference: logits and state beside the first mode: 0.0005 (limit 0.001)",
        "n/a   float32, rnn, cpu: there is no compiler",
    ]
    (grows, unknown) = growth_checks([one, short, absent])
    assert grows.passed and grows.value == 1 and unknown.reason == "63 tokens are too few to tell growth"


def test_a_model_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m.pth", make_model().state_dict())
    with open_checkpoint(tmp_path / "m.pth") as ck:
        assert check_memory(ck) == 3 * 8 * sum(t.numel for t in ck.info.values())
        monkeypatch.setattr(agreement, "memory_free", lambda: 1000)
        with pytest.raises(DeviceError, match="m.pth needs .* of memory, 1 kB are free"):
            check_memory(ck)


def test_a_dtype_without_a_limit_is_refused():
    with pytest.raises(ParameterError, match="int8"):
        compare_modes(make_model(), TOKENS, dtypes=[torch.int8])
