"""Two modes, one model: the same answers, states that can be handed over, and nothing changed behind one's back."""

import numpy as np
import pytest
import torch
from random_rwkv7 import add_random_time_state, make_model, make_tokens, relative_rms

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual, RWKVMode, init_state_with_past

SAME = 1e-12  # float64: the modes only sum in another order


def state_error(found, expected) -> float:
    return max(relative_rms(getattr(found, n), getattr(expected, n)) for n in ("wkv", "att_shift", "ffn_shift"))


@pytest.mark.parametrize("B, T", [(1, 1), (3, 1), (1, 63), (3, 70)])
@pytest.mark.parametrize("n_embd, head_size", [(32, 32), (64, 64), (64, 16)])
def test_both_modes_give_the_same(B, T, n_embd, head_size):
    model = make_model(n_embd, head_size=head_size, dtype=torch.float64)
    tokens = make_tokens(B, T)
    logits, state = model(tokens)
    model.set_mode(RWKVMode.RNN)
    logits_rnn, state_rnn = model(tokens)
    assert logits.shape == (B, T, 257) and state.wkv.shape == (B, 2, n_embd // head_size, head_size, head_size)
    assert relative_rms(logits_rnn, logits) < SAME
    assert state_error(state_rnn, state) < SAME


def test_float32_modes_agree_to_float32():
    model, tokens = make_model(), make_tokens(2, 100)
    logits, _ = model(tokens)
    model.set_mode("rnn")
    assert relative_rms(model(tokens)[0], logits) < 1e-5


@pytest.mark.parametrize("cut", [1, 32, 69])
def test_prefill_hands_over_to_decoding_without_feeding_a_token_twice(cut):
    model, tokens = make_model(dtype=torch.float64), make_tokens(2, 70)
    expected, final = model(tokens)
    state = init_state_with_past(model, tokens[:, :cut])
    last, _ = model.prefill(tokens[:, :cut])
    assert relative_rms(last, expected[:, cut - 1]) < SAME
    model.set_mode(RWKVMode.RNN)
    for t in range(cut, 70):
        logits, state = model(tokens[:, t : t + 1], state=state)
        assert relative_rms(logits[:, 0], expected[:, t]) < SAME
    assert state_error(state, final) < SAME


@pytest.mark.parametrize("mode", list(RWKVMode))
def test_the_state_given_is_never_changed(mode):
    model = make_model()
    model.set_mode(mode)
    _, state = model(make_tokens(2, 5))
    copy = state.clone()
    model(make_tokens(2, 7), state=state)
    assert all(torch.equal(getattr(copy, n), getattr(state, n)) for n in ("wkv", "att_shift", "ffn_shift"))
    assert copy.wkv.data_ptr() != state.wkv.data_ptr()


@pytest.mark.parametrize("mode", list(RWKVMode))
def test_time_state_is_where_every_sequence_starts(mode):
    model, tokens = make_model(), make_tokens(2, 9)
    model.set_mode(mode)
    plain, _ = model(tokens)
    add_random_time_state(model)
    tuned, _ = model(tokens)
    assert relative_rms(tuned, plain) > 0.01
    assert torch.equal(tuned, model(tokens, state=model.create_state(2))[0])
    assert torch.equal(model.create_state(2).wkv[1, 1], model.blocks[1].att.time_state)
    assert model.create_state().wkv.dtype == torch.float32


def test_gradients_reach_time_state_alike_in_both_modes():
    model, tokens = make_model(dtype=torch.float64), make_tokens(2, 20)
    add_random_time_state(model)
    found = []
    for mode in RWKVMode:
        model.set_mode(mode)
        states = [block.att.time_state.requires_grad_() for block in model.blocks]
        found.append(torch.cat(torch.autograd.grad(model(tokens)[0].square().sum(), states)))
    assert found[0].abs().max() > 0
    assert relative_rms(found[1], found[0]) < 1e-10


def test_v_first_is_layer_0s_value():
    model, tokens = make_model(), make_tokens(2, 6)
    caught = []
    model.blocks[0].att.value.register_forward_hook(lambda module, given, out: caught.append(out))
    _, v_first = model(tokens, return_v_first=True)
    assert v_first.shape == (2, 6, 64) and torch.equal(v_first, caught[0])
    model.set_mode(RWKVMode.RNN)
    assert relative_rms(model(tokens, return_v_first=True)[1], v_first) < 1e-5


def test_detached_state_carries_no_graph():
    model = make_model().requires_grad_(True)
    _, state = model(make_tokens(1, 3))
    assert state.wkv.requires_grad and not state.detach().wkv.requires_grad


def test_bfloat16_keeps_its_state_in_float32():
    model, tokens = make_model(), make_tokens(1, 40)
    expected, _ = model(tokens)
    logits, state = model.to(torch.bfloat16)(tokens)
    assert state.wkv.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert relative_rms(logits, expected) < 0.05  # bfloat16 keeps 8 bits, through two layers


def test_every_parameter_of_a_fresh_model_is_set(monkeypatch):
    """With memory that comes back full of NaN, what initialisation forgets would show."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, allocate=allocate, **k: allocate(*a, **k).fill_(float("nan")))
    model = RWKV_Dual(n_embd=64, n_layer=2, vocab_size=300, head_size=32)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(make_tokens(1, 5))[0].isfinite().all()


def test_fresh_models_are_the_same_for_the_same_seed():
    torch.manual_seed(3)
    one = RWKV_Dual(64, 2, 257)
    torch.manual_seed(3)
    two = RWKV_Dual(64, 2, 257)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.layout.ranks == {"w": 32, "a": 32, "v": 32, "g": 32} and one.layout.n_head == 1


def test_refusals():
    model = make_model()
    for tokens in (torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 3)):
        with pytest.raises(ParameterError, match=r"\[B,T\]"):
            model(tokens)
    with pytest.raises(ParameterError, match="0 to 256"):
        model(torch.tensor([[257]]))
    with pytest.raises(ParameterError, match="of 2 sequences"):
        model(make_tokens(1, 1), state=model.create_state(2))
    with pytest.raises(ParameterError, match="RWKVMode"):
        model.set_mode("lstm")
    with pytest.raises(ParameterError, match="multiple of head_size"):
        RWKV_Dual(n_embd=100, n_layer=1, vocab_size=256)


IDS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
FORMS = {
    **{f"{d}".removeprefix("torch."): lambda d=d: torch.tensor(IDS, dtype=d) for d in (torch.uint8, torch.int16)},
    **{f"NumPy's {d}": lambda d=d: np.array(IDS, d) for d in ("u2", ">i8", "u8", "b")},
    "reversed": lambda: np.array(IDS)[:, ::-1][:, ::-1],
    "columns first": lambda: np.asfortranarray(IDS),
    "a negative view": lambda: torch._neg_view(-torch.tensor(IDS)),
    "tuples": lambda: tuple(map(tuple, IDS)),
}


@pytest.mark.parametrize("mode", RWKVMode)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_integers_of_any_kind_are_tokens(form, mode):
    model = make_model().requires_grad_(False)
    model.set_mode(mode)
    assert torch.equal(model(form())[0], model(torch.tensor(IDS))[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (lambda: torch.nested.nested_tensor([torch.tensor(IDS[0])]), "a nested tensor"),
        (lambda: torch.tensor(IDS).to_sparse(), "a sparse_coo tensor"),
        (lambda: torch.tensor(IDS, device="meta"), "on the meta device and have no values"),
        (lambda: torch.tensor(IDS) > 3, "given torch.bool"),
        (lambda: np.array(IDS, np.float32), "given torch.float32"),
        (lambda: np.array([["a"]]), r"integers of shape \[B,T\]"),
        (lambda: [[1], [2, 3]], "pad rows of unequal length"),
    ],
)
def test_what_cannot_be_tokens_is_said(tokens, said):
    with pytest.raises(ParameterError, match=said):
        make_model()(tokens())


@pytest.mark.parametrize("mode", RWKVMode)
def test_a_model_on_the_meta_device_gives_shapes(mode):
    model = make_model().to("meta")
    model.set_mode(mode)
    logits, state = model(torch.tensor(IDS))
    assert logits.is_meta and logits.shape[:2] == (2, 5) and state.wkv.is_meta
    assert model(torch.tensor([[1], [2]]), state)[0].shape[:2] == (2, 1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for its derivatives
@pytest.mark.parametrize("mode", RWKVMode)
def test_transforms_of_torch_func_go_through_a_model(mode):
    model = make_model().requires_grad_(False)
    model.set_mode(mode)
    parameters, ids = dict(model.named_parameters()), torch.tensor(IDS)

    def logits(parameters, tokens):
        return torch.func.functional_call(model, parameters, (tokens,))[0]

    each = torch.func.vmap(lambda row: logits(parameters, row[None])[0])(ids)
    torch.testing.assert_close(each, model(ids)[0], rtol=1e-4, atol=1e-5)
    found = torch.func.grad(lambda p: logits(p, ids).square().sum())(parameters)
    model.requires_grad_(True)
    model(ids)[0].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-3)
