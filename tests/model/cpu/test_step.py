"""The compiled token step against PyTorch's modules, which are its reference."""

import copy
import dataclasses
import os
import threading

import pytest
import torch
from pairwise import each
from random_models import VERSIONS, load_model, make_tokens, relative_rms

from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.model import RWKVMode, RWKVState, capture, generate, init_state_with_past
from rwkv_lab.model.cpu import abi, buffer_pool, eligibility, step
from rwkv_lab.model.cpu.lazy_state import is_lazy
from rwkv_lab.wkv import use_backend

# float32: rounding in another order, through two layers. 16 bits: the step rounds at fewer places than the modules, so
# both are laid beside float64. Most errors are half of the modules'; the factor is for the few heads of almost equal
# values, which their norm blows up with whatever rounding there was.
APART = 2e-5
WORSE = 2.0

SIZES = [
    dict(),
    dict(n_layer=1, n_head=1, head_size=32),
    dict(n_head=1, head_size=64, n_embd=50, dim_ffn=77),
    dict(n_head=3, head_size=24, n_embd=200, vocab_size=301),
]


def rnn(model):
    model.set_mode(RWKVMode.RNN)
    return model


def by_torch(model, tokens, state=None):
    with use_backend("reference"):
        return model(tokens, state)


def error(found, expected) -> float:
    (logits, state), (right, right_state) = found, expected
    right_state = right_state.tensors()
    return max(relative_rms(logits, right), *(relative_rms(x, right_state[n]) for n, x in state.tensors().items()))


def as_good(model, tokens, found, expected, state=None) -> bool:
    """In float32 the same; in 16 bits about as near to float64, with the same weights, as the modules are."""
    if model.emb.weight.dtype == torch.float32:
        return error(found, expected) < APART
    exact = copy.deepcopy(model).double()
    right = exact(tokens, None if state is None else state.to(dtype=torch.float64))
    return error(found, right) < WORSE * error(expected, right) + 1e-3


@pytest.fixture
def steps(monkeypatch) -> list:
    """Grows with every compiled call, so that a test can say whether there was one."""
    calls = []
    before = step.run
    monkeypatch.setattr(step, "run", lambda *args: calls.append(1) or before(*args))
    return calls


@pytest.fixture(params=["before", "meanwhile"])
def compared(request, monkeypatch):
    """Small models, and large ones: those are compared with what was examined by a second thread, during the step."""
    if request.param == "meanwhile":
        monkeypatch.setattr(eligibility, "_LARGE", -1)


@pytest.fixture
def poison(monkeypatch):
    """Memory for results is full of NaN before it is written."""

    class FullOfNaN(buffer_pool.Memory):
        def __init__(self, *parts):
            super().__init__(*parts)
            for part in self.tensors():
                part.fill_(torch.nan)

    monkeypatch.setattr(step, "Memory", FullOfNaN)


@pytest.mark.parametrize(
    ("version", "dtype"), [*each(VERSIONS, [torch.float32]), *each(VERSIONS, [torch.bfloat16, torch.float16])]
)
def test_it_gives_what_the_modules_give(tmp_path, version, dtype, poison, steps):
    for sizes in SIZES:
        model = rnn(load_model(tmp_path, version, dtype=dtype, **sizes))
        for B in (1, 3, 8):
            tokens = make_tokens(B, 5)
            found, expected = model(tokens), by_torch(model, tokens)
            assert found[0].shape == expected[0].shape and found[0].dtype == dtype
            assert found[1].wkv.dtype == torch.float32 and found[1].ffn_shift.dtype == dtype
            assert as_good(model, tokens, found, expected), (sizes, B)
            token = make_tokens(B, 1, seed=3)
            going_on = model(token, found[1]), by_torch(model, token, found[1])
            assert as_good(model, token, *going_on, found[1]), (sizes, B)
    assert len(steps) == 6 * len(SIZES)


@pytest.mark.parametrize("version", VERSIONS)
def test_large_batches_and_several_threads_change_nothing(tmp_path, version):
    model, tokens = rnn(load_model(tmp_path, version, head_size=32, dim_ffn=150)), make_tokens(33, 3)
    alone = model(tokens[:1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = model(tokens)
    finally:
        torch.set_num_threads(threads)
    assert error(found, by_torch(model, tokens)) < 2e-5
    assert relative_rms(found[0][:1], alone[0]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", ["5.2", "7.0"])
def test_batches_whose_lanes_are_tokens(tmp_path, version, dtype, poison, steps):
    """From some ten sequences on another kernel computes: whole vectors of them, and what is left; odd sizes."""
    for sizes in SIZES[2:]:
        model = rnn(load_model(tmp_path, version, dtype=dtype, **sizes))
        for B in (12, 16, 37, 49):
            tokens = make_tokens(B, 2, seed=B)
            found, expected = model(tokens), by_torch(model, tokens)
            assert as_good(model, tokens, found, expected), (sizes, B)
    assert len(steps) == 4 * len(SIZES[2:])


def test_a_nan_stays_in_its_sequence_and_is_not_read_beyond_a_row(tmp_path):
    """An odd number of columns ends in half a pair; what lies behind it is the next row's."""
    model = rnn(load_model(tmp_path, "7.0", dtype=torch.bfloat16, n_head=1, head_size=64, n_embd=51, dim_ffn=77))
    model.emb.weight[5] = torch.nan
    tokens = torch.full((20, 1), 6)
    tokens[3] = 5
    logits = model(tokens)[0]
    assert logits[3].isnan().all() and logits[[*range(3), *range(4, 20)]].isfinite().all()
    model.head.weight[8] = torch.nan
    logits = model(tokens)[0][0, 0]
    assert logits[8].isnan() and logits[:8].isfinite().all() and logits[9:].isfinite().all()


@pytest.mark.parametrize("version", ["4.0", "6.0", "7.0"])
def test_4096_tokens_one_by_one_are_4096_at_once(tmp_path, version):
    model, tokens = load_model(tmp_path, version, n_head=1, head_size=32), make_tokens(1, 4096)
    with use_backend("reference" if version == "6.0" else "chunked"):
        expected = model(tokens)
    assert error(rnn(model)(tokens), expected) < 2e-5  # what the modes of one model may be apart


def test_16_bits_are_as_near_to_float64_as_the_modules_are(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model, tokens = rnn(load_model(tmp_path, "7.0", dtype=dtype, n_layer=4, head_size=64)), make_tokens(2, 60)
        right = copy.deepcopy(model).double()(tokens)[0]
        assert relative_rms(model(tokens)[0], right) < 1.1 * relative_rms(by_torch(model, tokens)[0], right)


@pytest.mark.parametrize("version", VERSIONS)
def test_states_of_any_making_are_taken_and_left_alone(tmp_path, version, steps):
    model, token = rnn(load_model(tmp_path, version, time_state=version != "4.0")), make_tokens(3, 1)
    kept = {
        "tuned": model.create_state(3),
        "of a parallel pass": init_state_with_past(model, make_tokens(3, 9)),
        "of the step": model(make_tokens(3, 2))[1],
        "rows": model(make_tokens(5, 2))[1].rows([4, 0, 2]),
        "copied": model(make_tokens(3, 2))[1].clone(),
    }
    calls = len(steps)
    for which, state in kept.items():
        before = state.clone()
        found = model(token, state)
        assert error(found, by_torch(model, token, state)) < 2e-5, which
        assert all(torch.equal(x, before.tensors()[n]) for n, x in state.tensors().items()), which
    assert len(steps) == calls + len(kept)
    assert error(model(token), by_torch(model, token)) < 2e-5  # starts from time_state by itself


def test_weights_may_change_and_move(tmp_path, compared):
    model, tokens = rnn(load_model(tmp_path, "7.0")), make_tokens(1, 3)
    first = model(tokens)[0]

    def follows(what):
        found = model(tokens)
        assert relative_rms(found[0], first) > 1e-3, what
        assert as_good(model, tokens, found, by_torch(model, tokens)), what

    model.blocks[1].att.key.weight.mul_(2)
    follows("in place")
    model.blocks[1].ffn.value.weight.data = model.blocks[1].ffn.value.weight.data.clone().mul_(3)
    follows("data of a parameter")
    model.blocks[0].att.x_r = torch.nn.Parameter(model.blocks[0].att.x_r.detach().clone() * 0.5, requires_grad=False)
    follows("another parameter")
    model.head = copy.deepcopy(model.head).requires_grad_(False)
    model.head.weight.mul_(-1)
    follows("another module")
    model.to(torch.bfloat16)
    follows("another dtype")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model.requires_grad_(False)
    follows("assigned parameters")


def test_copies_and_models_in_turn_do_not_meet(tmp_path, compared):
    one = rnn(load_model(tmp_path, "7.0", seed=1))
    other, twin, tokens = rnn(load_model(tmp_path, "7.0", seed=2)), copy.deepcopy(one), make_tokens(1, 4)
    expected = by_torch(one, tokens)[0], by_torch(other, tokens)[0]
    one(tokens)
    twin.head.weight.zero_()
    for _ in range(2):
        assert relative_rms(one(tokens)[0], expected[0]) < 2e-5
        assert relative_rms(other(tokens)[0], expected[1]) < 2e-5
        assert not twin(tokens)[0].any()


def test_python_threads_work_side_by_side(tmp_path, compared):
    model, tokens = rnn(load_model(tmp_path, "7.0", head_size=32)), make_tokens(4, 40)
    expected, found = [model(row[None])[0] for row in tokens], {}

    def work(i):
        found[i] = model(tokens[i : i + 1])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes_too(tmp_path, compared):
    model, tokens = rnn(load_model(tmp_path, "7.0")), make_tokens(1, 3)
    torch.set_num_threads(2)
    try:
        expected = model(tokens)[0]
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(model(tokens)[0], expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


def test_it_falls_back_to_pytorch_for_hooks_captures_gradients_autocast_and_float64(tmp_path, steps):
    model, tokens = rnn(load_model(tmp_path, "7.0")), make_tokens(1, 2)
    with capture(model, names=["w"]) as seen:
        model(tokens)
    assert seen["blocks.0.att.w"].shape[1] == 2
    handle = model.blocks[1].ffn.key.register_forward_hook(lambda *_: None)
    model(tokens)
    handle.remove()
    for backend in ("reference", "chunked"):
        with use_backend(backend):
            model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    state = model.create_state()
    state.wkv.requires_grad_(True)
    assert model(tokens, state)[0].requires_grad
    model.head.requires_grad_(True)
    assert model(tokens)[0].requires_grad
    assert model(tokens, return_v_first=True)[1].shape == (1, 2, 32)
    model.double()
    model(tokens)
    assert not steps
    model.float()
    with torch.no_grad():
        model(tokens)
    assert len(steps) == 1


def test_a_capture_or_hook_between_two_tokens_counts(tmp_path, compared):
    model, tokens = rnn(load_model(tmp_path, "7.0")), make_tokens(1, 2)
    expected = by_torch(model, tokens)
    assert relative_rms(model(tokens)[0], expected[0]) < 2e-5
    for _ in range(2):
        with capture(model, names=["w"]) as seen:
            found = model(tokens)
        assert seen["blocks.0.att.w"].shape[1] == 2 and relative_rms(found[0], expected[0]) < 2e-5
        assert relative_rms(model(tokens)[0], expected[0]) < 2e-5
    asked = []
    model.blocks[1].ffn.key.register_forward_hook(lambda *_: asked.append(1))
    state = model(tokens)[1]
    assert len(asked) == 2 and relative_rms(state.wkv, expected[1].wkv) < 2e-5


def test_a_states_tensors_come_when_asked_for(tmp_path, steps):
    model, tokens = rnn(load_model(tmp_path, "7.0")), make_tokens(2, 6)
    whole = model(tokens)[1]
    state = None
    for t in range(6):
        state = model(tokens[:, t : t + 1], state)[1]
        assert isinstance(state, RWKVState) and is_lazy(state)
        if t == 2:
            state = copy.copy(copy.deepcopy(state))
            assert type(state) is RWKVState and state.wkv.shape == (2, 2, 2, 16, 16)
        if t == 3:
            state = dataclasses.replace(state, version=state.version)
    assert (
        state.version == "7.0" and torch.equal(state.wkv, whole.wkv) and torch.equal(state.ffn_shift, whole.ffn_shift)
    )
    with pytest.raises(AttributeError):
        _ = state.nothing
    with pytest.raises(ParameterError, match="of 2 sequences, the tokens are of 1"):
        model(tokens[:1], model(tokens)[1])


def test_text_grows_by_it(tmp_path, steps):
    model = load_model(tmp_path, "7.0", vocab_size=256)
    texts = generate(model, ["ab", "cde"], max_new_tokens=6, temperature=0)
    assert len(steps) >= 5
    with use_backend("reference"):
        assert generate(model, ["ab", "cde"], max_new_tokens=6, temperature=0) == texts


def test_without_a_compiler_it_says_so_once_or_refuses(tmp_path, monkeypatch, caplog):
    model, tokens = rnn(load_model(tmp_path, "7.0")), make_tokens(1, 2)
    expected = model(tokens)[0]

    def broken(name):
        raise KernelError("no compiler here")

    monkeypatch.setattr(abi, "cpu_library", broken)
    monkeypatch.setattr(eligibility, "_told", set())
    for _ in range(2):
        assert relative_rms(model(tokens)[0], expected) < 2e-5
    assert [r.message for r in caplog.records] == ["Decoding runs through PyTorch: no compiler here."]
    with use_backend("cpu"), pytest.raises(KernelError, match="no compiler here"):
        model(tokens)


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    def take():
        return buffer_pool.Memory(((300, 301), torch.float32), ((7,), torch.bfloat16)).tensors()

    one, small = take()
    assert one.shape == (300, 301) and small.shape == (7,) and small.dtype == torch.bfloat16
    one.fill_(1)
    view, address = small.fill_(1)[5:], one.data_ptr()
    del one, small
    other, _ = take()
    assert other.fill_(2).data_ptr() != address and (view == 1).all()
    del view
    assert take()[0].data_ptr() == address
