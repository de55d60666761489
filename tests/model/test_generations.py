"""What holds for every generation: modes, gradients, low precision, padded batches, what is refused."""

import dataclasses

import pytest
import torch
from random_models import VERSIONS, load_model, make_tokens, relative_rms

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual, RWKVMode, init_state_with_past

PARTS = ("wkv", "att_shift", "ffn_shift")
ODD = dict(n_layer=2, n_head=3, head_size=8, n_embd=20, dim_ffn=30)
# Largest relative RMS between the modes, which sum in different orders.
BETWEEN_MODES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


def state_error(found, expected) -> float:
    return max(relative_rms(getattr(found, part), getattr(expected, part)) for part in PARTS)


@pytest.mark.parametrize("dtype", BETWEEN_MODES, ids=str)
def test_modes_agree_over_4096_tokens_and_do_not_drift_apart(tmp_path, version, dtype):
    model = load_model(tmp_path, version, dtype, n_layer=1, n_head=2, head_size=32)
    # 5.0 and 5.1 run through the same operator as 5.2; once is enough for them. In float64, which is slow, a drift that
    # anyone could measure would be there long before.
    T = 512 if version in ("5.0", "5.1") and dtype != torch.float32 else 1024 if dtype == torch.float64 else 4096
    tokens = make_tokens(1, T)
    logits, state = model(tokens)
    model.set_mode(RWKVMode.RNN)
    logits_rnn, state_rnn = model(tokens)
    assert relative_rms(logits_rnn, logits) < BETWEEN_MODES[dtype]
    assert relative_rms(logits_rnn[:, -T // 8 :], logits[:, -T // 8 :]) < BETWEEN_MODES[dtype]
    assert state_error(state_rnn, state) < BETWEEN_MODES[dtype]


@pytest.mark.parametrize("B, T", [(1, 1), (3, 1), (3, 70)])
def test_modes_agree_at_odd_shapes_and_states_pass_between_them(tmp_path, version, B, T):
    model = load_model(tmp_path, version, torch.float64, **ODD)
    tokens = make_tokens(B, T + 5)
    expected, final = model(tokens)
    state = init_state_with_past(model, tokens[:, :T])
    model.set_mode(RWKVMode.RNN)
    logits, state_rnn = model(tokens)
    assert relative_rms(logits, expected) < 1e-12 and state_error(state_rnn, final) < 1e-12
    for t in range(T, T + 5):
        before = state.clone()
        logits, after = model(tokens[:, t : t + 1], state=state)
        assert all(torch.equal(getattr(state, part), getattr(before, part)) for part in PARTS)
        state = after
        assert relative_rms(logits[:, 0], expected[:, t]) < 1e-12
    assert state_error(state, final) < 1e-12


def gradients(model, tokens, state):
    """Of all parameters and of the initial state, for a loss that sees all logits and the final state."""
    state = dataclasses.replace(state, **{part: getattr(state, part).clone().requires_grad_() for part in PARTS})
    logits, final = model(tokens, state=state)
    loss = sum((x * torch.sin(torch.arange(x.numel())).view(x.shape)).sum() for x in (logits, final.wkv))
    wanted = dict(model.named_parameters()) | {part: getattr(state, part) for part in PARTS}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if not name.endswith("time_state")}


@pytest.mark.parametrize("sizes", [ODD, dict(n_layer=1, n_head=1, head_size=32)], ids=["odd", "one head"])
def test_gradients_are_those_of_the_recurrence(tmp_path, version, sizes):
    model = load_model(tmp_path, version, torch.float64, **sizes).requires_grad_()
    start, tokens = init_state_with_past(model, make_tokens(2, 3, seed=1)), make_tokens(2, 70)
    parallel = gradients(model, tokens, start)
    model.set_mode(RWKVMode.RNN)
    recurrent = gradients(model, tokens, start)
    for name in parallel:
        assert relative_rms(parallel[name], recurrent[name]) < 1e-8, name
        assert parallel[name].abs().max() > 0, name


def test_gradient_checkpointing_changes_memory_and_nothing_else(tmp_path, version):
    model = load_model(tmp_path, version, **ODD).requires_grad_()
    start, tokens = init_state_with_past(model, make_tokens(2, 3)), make_tokens(2, 40)
    kept, found = [], []
    for model.gradient_checkpointing in (False, True):
        found.append(gradients(model, tokens, start))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes), lambda x: x):
            model(tokens, state=start)
        kept.append(sum(sizes))
    plain, saved = found
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert kept[1] < kept[0] / 4  # for the backward pass: of each layer only what went in


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_and_leaves_the_state_in_float32(tmp_path, version, dtype):
    model = load_model(tmp_path, version, **ODD).requires_grad_()
    tokens = make_tokens(2, 40)
    expected, state_expected = model(tokens)
    with torch.autocast("cpu", dtype=dtype):
        logits, state = model(tokens)
        again, _ = model(tokens, state=state)
        model.gradient_checkpointing = True
        loss = model(tokens)[0].float().logsumexp(-1).mean()
    loss.backward()
    assert logits.dtype == dtype and state.wkv.dtype == state.att_shift.dtype == torch.float32
    assert relative_rms(logits, expected) < 0.05 and relative_rms(state.wkv, state_expected.wkv) < 0.05
    assert again.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_float16_halves_its_residual_stream_where_it_would_overflow(tmp_path):
    """Deep layers that add 30,000 each: beyond float16 after three layers, were it not for the scale."""
    for version in VERSIONS[:-1]:
        model = load_model(tmp_path, version, n_layer=20, n_head=1, head_size=16)
        with torch.no_grad():
            for block in model.blocks[12:]:  # behind two halvings: four times what fits can be added
                block.ffn.value.weight *= 2.5e4
        model.save_pretrained(tmp_path / version)
        half = RWKV_Dual.from_pretrained(tmp_path / version, dtype=torch.float16)
        tokens = make_tokens(1, 9)
        expected, seen = model(tokens)[0], []
        model.blocks[-1].register_forward_hook(lambda module, given, out, seen=seen: seen.append(out[0]))
        model(tokens)
        assert seen[0].abs().max() > 65504
        for mode in RWKVMode:
            half.set_mode(mode)
            assert relative_rms(half(tokens)[0], expected) < 0.05
        stored = model.state_dict()
        assert all(torch.equal(t, stored[name].half()) for name, t in half.state_dict().items())


@pytest.mark.parametrize("lengths", [[5, 9, 1, 9], [3, 3, 3, 3], [9, 8, 7, 6]])
def test_padding_does_not_reach_the_state(tmp_path, version, lengths):
    model = load_model(tmp_path, version, torch.float64, **ODD)
    tokens, past = make_tokens(4, 9), init_state_with_past(model, make_tokens(4, 4, seed=1))
    for ctx_len in (1024, 2):
        model.ctx_len = ctx_len
        logits, state = model.prefill(tokens, past, lengths=torch.tensor(lengths))
        for row, n in enumerate(lengths):
            expected, state_expected = model.prefill(tokens[row : row + 1, :n], past.rows([row]))
            assert relative_rms(logits[row], expected[0]) < 1e-12
            assert state_error(state.rows([row]), state_expected) < 1e-12
    fresh = init_state_with_past(model, tokens, lengths)
    assert state_error(fresh, model.prefill(tokens, lengths=lengths)[1]) == 0


def test_tokens_that_cannot_be_are_named(tmp_path, version):
    model = load_model(tmp_path, version)
    for tokens, words in [
        ([[3, 70, 5]], "Token 70 .* 0 to 69"),
        ([[3, -1]], "Token -1 "),
        ([[]], r"\[1, 0\]"),
        ([3], r"\[1\]"),
        ([[0.5]], "float32"),
        ([[1, 2], [3]], "unequal length"),
    ]:
        for call in (model, model.parallel, model.prefill):
            with pytest.raises(ParameterError, match=words):
                call(tokens)
    for lengths in ([1], [0, 3], [1, 4]):
        with pytest.raises(ParameterError, match=r"lengths=\["):
            model.prefill(make_tokens(2, 3), lengths=lengths)


def test_states_of_other_models_are_refused(tmp_path, version):
    model, tokens = load_model(tmp_path, version), make_tokens(1, 2)
    _, state = model(tokens)
    with pytest.raises(ParameterError, match="2 sequences, the tokens are of 1"):
        model(tokens, state=model.create_state(2))
    others = dict(n_layer=3), dict(head_size=8), dict(n_embd=20)
    for sizes in others:
        with pytest.raises(ParameterError, match=r"this model's \[1, 2, "):
            model(tokens, state=load_model(tmp_path, version, **sizes).create_state())
    with pytest.raises(ParameterError, match="float64"):
        model(tokens, state=load_model(tmp_path, version, torch.float64).create_state())
    with pytest.raises(ParameterError, match="on meta"):
        model(tokens, state=state.to("meta"))
    other = "6.0" if version != "6.0" else "7.0"
    with pytest.raises(ParameterError, match=f"RWKV-{other}, the model is RWKV-{version}"):
        model(tokens, state=load_model(tmp_path, other).create_state())
    assert state.version == state.clone().detach().rows([0]).expand(2).version == version


def test_only_rwkv_7_has_a_v_first_and_rwkv_4_has_no_time_state(tmp_path):
    for version in VERSIONS[:-1]:
        with pytest.raises(ParameterError, match=f"RWKV-{version} has no v_first"):
            load_model(tmp_path, version)(make_tokens(1, 2), return_v_first=True)
    model = load_model(tmp_path, "4.0")
    assert not model.has_time_state
    for call in (model.add_time_state, lambda: model.load_state_file(tmp_path / "any.pth")):
        with pytest.raises(ParameterError, match="RWKV-4.0 has no time_state"):
            call()
