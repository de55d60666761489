"""The compiled parallel pass beside the plain torch form, its slow twin, at odd sizes and in every generation."""

import pytest
import torch
from random_models import VERSIONS, load_model, make_tokens, relative_rms

from rwkv_lab.analysis.agreement import in_dtype
from rwkv_lab.errors import KernelError
from rwkv_lab.model import RWKVMode, capture, init_state_with_past
from rwkv_lab.model.cpu import prefill
from rwkv_lab.model.cpu.eligibility import fallback_reason
from rwkv_lab.wkv import cpu, pointers, use_backend
from rwkv_lab.wkv.loader import cpu_library


@pytest.fixture(autouse=True)
def compiled():
    try:
        cpu_library("mix")
    except KernelError as e:
        pytest.skip(str(e))


@pytest.fixture
def poisoned(monkeypatch):
    """All memory that the pass takes for itself is full of NaN at first, and counted."""
    taken, new = [], pointers.new

    def nan(shape, dtype):
        taken.append(shape)
        return new(shape, dtype).fill_(torch.nan)

    monkeypatch.setattr(prefill, "new", nan)
    monkeypatch.setattr(cpu, "new", nan)
    return taken


def slow(model, tokens, state=None):
    with use_backend("reference"):
        return model.parallel(tokens, state)


def check(found, expected, limit):
    (logits, state), (right_logits, right_state) = found, expected
    assert logits.dtype == right_logits.dtype and logits.shape == right_logits.shape
    assert relative_rms(logits, right_logits) <= limit
    for name, part in state.tensors().items():
        right = right_state.tensors()[name]
        assert part.dtype == right.dtype and part.shape == right.shape
        assert relative_rms(part, right) <= limit, name


# float32 rounds at 6e-8; some thousand roundings of either form, in another order, stay far below this.
FLOAT32 = 2e-5

SIZES = [
    dict(n_head=1, head_size=64),
    dict(n_head=3, head_size=32, n_embd=72),
    dict(n_head=5, head_size=8, n_embd=37, dim_ffn=51, vocab_size=131),
    dict(n_head=2, head_size=10, n_embd=130, n_layer=1),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("B,T,sizes", [(1, 2, 0), (3, 63, 1), (1, 1000, 2), (3, 15, 3)])
def test_float32_gives_what_torch_gives(version, B, T, sizes, tmp_path, poisoned):
    sizes = dict(SIZES[sizes])
    if version == "4.0":
        sizes["n_embd"] = sizes["n_head"] * sizes["head_size"]
    model = load_model(tmp_path, version, **sizes)
    tokens, before = make_tokens(B, T), make_tokens(B, 5, seed=1)
    expected = slow(model, tokens, slow(model, before)[1])
    start = slow(model, before)[1]
    kept = start.clone()
    poisoned.clear()
    check(model.parallel(tokens, start), expected, FLOAT32)
    assert poisoned  # the compiled form was at work
    assert all(torch.equal(part, kept.tensors()[name]) for name, part in start.tensors().items())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_no_worse_than_torch(version, dtype, tmp_path):
    # Eight layers: RWKV-4 to 6 in float16 have halved their residual stream by then, and ours has not.
    model = load_model(tmp_path, version, dtype=dtype, n_layer=8, n_head=2, head_size=32)
    tokens = make_tokens(2, 100)
    exact, exact_state = slow(in_dtype(model, torch.float64), tokens)
    with use_backend("chunked"):
        plain, plain_state = model.parallel(tokens)
    logits, state = model.parallel(tokens)
    assert logits.dtype == dtype
    # Both errors are random; ours comes from a part of the roundings, and a tenth is left for chance.
    assert relative_rms(logits, exact) <= 1.1 * relative_rms(plain, exact)
    for name, part in state.tensors().items():
        right, torchs = exact_state.tensors()[name], plain_state.tensors()[name]
        assert part.dtype == torchs.dtype
        assert relative_rms(part, right) <= 1.1 * relative_rms(torchs, right), name


def test_float16_where_the_residual_stream_leaves_its_range(tmp_path):
    model = load_model(tmp_path, "5.2", dtype=torch.float16, n_layer=7)
    for block in model.blocks:
        block.att.output.weight *= 2000
        block.ffn.value.weight *= 2000
    exact, _ = slow(in_dtype(model, torch.float64), make_tokens(1, 40))
    # 2^-11 is float16's rounding; the state's shifts and the logits see it some times.
    assert relative_rms(model.parallel(make_tokens(1, 40))[0], exact) < 5e-3


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_may_be_cut_anywhere(version, dtype, tmp_path):
    model, tokens = load_model(tmp_path, version, dtype=dtype), make_tokens(2, 61)
    whole, state = model.parallel(tokens)
    cut, between = model.parallel(tokens[:, :29])
    rest, last = model.parallel(tokens[:, 29:], between)
    # Nothing but the order of sums inside the WKV operator may depend on where a piece begins.
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative_rms(torch.cat([cut, rest], 1), whole) <= limit
    assert relative_rms(last.wkv, state.wkv) <= limit


def test_many_tokens_run_in_pieces(tmp_path, monkeypatch):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(3, 50)
    expected = model.parallel(tokens)
    monkeypatch.setattr(prefill, "_BLOCK", 20)
    check(model.parallel(tokens), expected, 1e-6)  # sums inside WKV in another order
    monkeypatch.setattr(prefill, "_BLOCK", 2)  # fewer than sequences
    check(model.parallel(tokens), expected, 1e-6)


@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_prefill_with_lengths_and_going_on_one_by_one(version, tmp_path):
    model, tokens = load_model(tmp_path, version), make_tokens(3, 40)
    logits, state = model.prefill(tokens, lengths=[40, 1, 17])
    for row, n in enumerate([40, 1, 17]):
        right, right_state = slow(model, tokens[row : row + 1, :n])
        check((logits[row : row + 1], state.rows([row])), (right[:, -1], right_state), FLOAT32)
    model.set_mode(RWKVMode.RNN)
    after, _ = model(tokens[:1, :3], state=init_state_with_past(model, tokens[:1]))
    expected, _ = slow(model, torch.cat([tokens[:1], tokens[:1, :3]], 1))
    assert relative_rms(after, expected[:, -3:]) <= FLOAT32


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads, tmp_path):
    model, tokens = load_model(tmp_path, "6.0", n_head=4), make_tokens(1, 90)
    before, expected = torch.get_num_threads(), model.parallel(tokens)
    torch.set_num_threads(threads)
    try:
        check(model.parallel(tokens), expected, 1e-6)
    finally:
        torch.set_num_threads(before)


def test_nan_stays_where_it_is(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(2, 20)
    model.emb.weight[tokens[1, 7]] = torch.nan
    tokens[0] = (tokens[1, 7] + 1) % 70
    logits, _ = model.parallel(tokens)
    assert logits[0].isfinite().all() and logits[1, :7].isfinite().all() == (tokens[1, :7] != tokens[1, 7]).all()
    assert logits[1, 7:].isnan().all()


def test_where_it_falls_back_to_pytorch(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 9)

    def why():
        return fallback_reason(model, "prefill")

    assert not why()
    with capture(model):
        assert "captured" in why()
    with use_backend("chunked"):
        assert "chunked" in why()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in why()
    hook = model.blocks[1].att.register_forward_hook(lambda *args: None)
    assert "hook" in why()
    hook.remove()
    assert "float64" in fallback_reason(in_dtype(model, torch.float64), "prefill")
    model.blocks[0].att.r_k.requires_grad_(True)
    assert "gradients" in why()
    logits, _ = model.parallel(tokens)
    assert logits.requires_grad
    with torch.no_grad():
        assert not why()
        assert relative_rms(model.parallel(tokens)[0], logits) <= FLOAT32
