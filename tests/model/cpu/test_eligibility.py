"""Whatever changes what a model computes is computed: the compiled paths fall back to PyTorch, or follow."""

import contextlib
import dataclasses
import logging
import types

import pytest
import torch
from random_models import load_model, make_tokens, relative_rms
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual, RWKVMode, RWKVState, capture, quantise_weights, rwkv7
from rwkv_lab.model.cpu import eligibility
from rwkv_lab.model.cpu.eligibility import fallback_reason
from rwkv_lab.peft import LoraConfig, apply_peft
from rwkv_lab.wkv import use_backend

APART = 2e-5  # float32, summed in another order


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _own_forward(model):
    key = model.blocks[1].ffn.key
    key.forward = types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight), key)


def _other_class(model):
    model.blocks[1].ffn.key.__class__ = Doubled


def _other_module(model):
    model.blocks[1].ffn.key = Doubled(32, 52, bias=False)


def _bias(model):
    model.head.bias = nn.Parameter(torch.full((70,), 3.0), requires_grad=False)


def _other_eps(model):
    model.blocks[1].ln2.eps = 0.5


def _other_eps_of_heads(model):
    model.blocks[1].att.ln_x.eps = 0.5


def _max_norm(model):
    model.emb.max_norm = 0.1


def _transposed_in_place(model):
    with torch.no_grad():
        model.blocks[1].att.output.weight.as_strided_((32, 32), (1, 32))


def _other_layer(model):
    model.blocks[1].att.layer = 0


def _values_at_another_place(model):
    model.blocks[1].att.key.weight.data = model.blocks[1].att.key.weight.data.t().contiguous()


def _values_transposed_at_their_place(model):
    model.blocks[1].att.key.weight.data = model.blocks[1].att.key.weight.data.t()


def _memory_of_the_system(model):
    model.share_memory()
    with torch.no_grad():
        model.head.weight.mul_(2)


def _another_method(model):
    model._logits = lambda x: 2 * type(model)._logits(model, x)


def _hook(model):
    model.blocks[0].att.output.register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = [
    _own_forward,
    _other_class,
    _other_module,
    _bias,
    _other_eps,
    _other_eps_of_heads,
    _max_norm,
    _transposed_in_place,
    _other_layer,
    _values_at_another_place,
    _values_transposed_at_their_place,
    _memory_of_the_system,
    _another_method,
    _hook,
]


@pytest.mark.parametrize("large", [1 << 24, -1], ids=["compared before", "compared meanwhile"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_counts(tmp_path, monkeypatch, change, large):
    monkeypatch.setattr(eligibility, "_LARGE", large)
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 9)
    modes = [mode for mode in RWKVMode for _ in range(2)]
    for mode in modes:  # all is ready and in use
        model.set_mode(mode)
        before = model(tokens)[0]
    change(model)
    for mode in modes:
        model.set_mode(mode)
        found = model(tokens)[0]
        with use_backend("reference"):
            expected = model(tokens)[0]
        assert relative_rms(found, expected) < APART < 1e-3 < relative_rms(found, before)


def test_hooks_of_all_modules_are_called(tmp_path):
    model, tokens, seen = load_model(tmp_path, "7.0"), make_tokens(1, 5), []
    for mode in RWKVMode:
        model.set_mode(mode)
        model(tokens)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        model(tokens)
        handle.remove()
        assert nn.GroupNorm not in seen and {nn.Linear, nn.LayerNorm, nn.Embedding, RWKV_Dual} <= set(seen)
        seen.clear()


def test_operators_are_counted(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 5)
    for mode in RWKVMode:
        model.set_mode(mode)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
        # two per product of the square matrices alone: 4 of C² and 2 of C·F per layer, and the head
        assert counter.get_total_flops() > 2 * 5 * (2 * (4 * 32**2 + 2 * 32 * 52) + 32 * 70)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for its derivatives
@pytest.mark.parametrize("mode", RWKVMode)
def test_forward_derivatives_are_those_of_differences(tmp_path, mode):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 5)
    model.set_mode(mode)
    weight = model.blocks[0].att.key.weight.clone()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with forward_ad.dual_level():
        del model.blocks[0].att.key.weight
        model.blocks[0].att.key.weight = forward_ad.make_dual(weight, direction)
        found = forward_ad.unpack_dual(model(tokens)[0]).tangent
    double = load_model(tmp_path, "7.0").double()
    double.set_mode(mode)
    there = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            double.blocks[0].att.key.weight.copy_(weight.double() + step * direction.double())
        there.append(double(tokens)[0])
    assert relative_rms(found, (there[0] - there[1]) / 2e-5) < 1e-4  # the difference's own error is below 1e-6


def test_gradients_begin_between_two_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(eligibility, "_LARGE", -1)
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)
    model.set_mode(RWKVMode.RNN)
    for _ in range(2):
        model(tokens)
    model.head.weight = nn.Parameter(model.head.weight.clone())
    assert model(tokens)[0].requires_grad


def test_a_subclass_is_asked(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)

    class Louder(RWKV_Dual):
        def _logits(self, x):
            return 2 * super()._logits(x)

    expected = 2 * model(tokens)[0]
    model.__class__ = Louder
    for mode in RWKVMode:
        model.set_mode(mode)
        assert relative_rms(model(tokens)[0], expected) < APART


def test_what_no_checkpoint_holds_is_not_saved_or_rounded(tmp_path):
    model = load_model(tmp_path, "7.0")
    apply_peft(model, LoraConfig(lora_r=2, lora_target_modules=["head"]))
    with pytest.raises(ParameterError, match="head, a LoraLinear, which no checkpoint holds"):
        model.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ParameterError, match="has head, a LoraLinear.*after adapters are merged"):
        quantise_weights(model)
    assert not (tmp_path / "adapted").exists()


def test_rounding_does_not_drop_a_hook(tmp_path):
    model = load_model(tmp_path, "7.0")
    _hook(model)
    with pytest.raises(ParameterError, match="blocks.0.att.output has a hook"):
        quantise_weights(model)
    with pytest.raises(ParameterError, match="not of a NoneType"):
        quantise_weights(None)


PATHS = {RWKVMode.TRANSFORMER: "prefill", RWKVMode.RNN: "step"}


def test_a_model_is_examined_when_it_has_changed_and_not_per_token(tmp_path, monkeypatch):
    model, token, examined = load_model(tmp_path, "7.0"), make_tokens(1, 1), []
    examine = eligibility._examine
    monkeypatch.setattr(eligibility, "_examine", lambda model: examined.append(1) or examine(model))
    state = None
    for mode in (RWKVMode.RNN, RWKVMode.TRANSFORMER) * 2:
        model.set_mode(mode)
        for _ in range(5):
            _, state = model(token, state)
    assert len(examined) == 1
    with capture(model):
        model(token)
    model.head.weight.requires_grad_(True)
    model(token)
    model.head.weight.requires_grad_(False)
    assert len(examined) == 2  # capture has given modules an attribute
    model.head.weight.data = model.head.weight.data.clone()
    for _ in range(3):
        model(token)
    assert len(examined) == 3
    quantise_weights(model, in_place=True)
    for _ in range(3):
        model(token)
    assert len(examined) == 4


def test_why_it_is_pytorch_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(eligibility, "_told", set())
    caplog.set_level(logging.INFO, "rwkv_lab")
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)
    apply_peft(model, LoraConfig(lora_r=2, lora_target_modules=["ffn.key"]))
    with torch.no_grad():
        for mode in (*RWKVMode, *RWKVMode):
            model.set_mode(mode)
            model(tokens)
    why = "blocks.0.ffn.key is a LoraLinear"
    assert all(fallback_reason(model, path) == why for path in PATHS.values())
    assert caplog.messages == [f"Prefill runs through PyTorch: {why}.", f"Decoding runs through PyTorch: {why}."]


def test_the_defaults_of_torch_change_nothing(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(2, 7)
    for mode in RWKVMode:
        model.set_mode(mode)
        logits, state = model(tokens)
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                found, after = model(tokens)
            finally:
                torch.set_default_dtype(torch.float32)
            assert torch.equal(found, logits) and torch.equal(after.wkv, state.wkv)
        with torch.device("meta"):
            assert not fallback_reason(model, PATHS[mode])
            found, after = model(tokens)
        assert torch.equal(found, logits) and torch.equal(after.wkv, state.wkv)


def test_modes_and_transforms_of_torch_see_operators(tmp_path):
    model, tokens, seen = load_model(tmp_path, "7.0"), make_tokens(1, 3), []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    def asked(x):
        seen.append([bool(fallback_reason(model, path)) for path in PATHS.values()])
        return x.sum()

    for mode in RWKVMode:
        model.set_mode(mode)
        with Seen():
            model(tokens)
        assert "layer_norm" in seen
        seen.clear()
    torch.func.grad(asked)(torch.ones(2))
    torch.func.vmap(asked)(torch.ones(2, 2))
    assert seen == [[True, True]] * 2
    assert not any(fallback_reason(model, path) for path in PATHS.values())


def test_a_patched_class_counts(tmp_path, monkeypatch):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 5)
    before = model(tokens)[0]
    original = rwkv7.ChannelMix.forward
    monkeypatch.setattr(rwkv7.ChannelMix, "forward", lambda self, x, shift: 2 * original(self, x, shift))
    for mode in RWKVMode:
        model.set_mode(mode)
        with use_backend("reference"):
            expected = model(tokens)[0]
        assert relative_rms(model(tokens)[0], expected) < APART < 1e-3 < relative_rms(expected, before)


def _fewer_layers(model):
    del model.blocks[1]


def _wider_matrix(model):
    model.blocks[1].att.key = nn.Linear(32, 64, bias=False).requires_grad_(False)


def _shorter_vector(model):
    model.blocks[1].att.x_r.data = model.blocks[1].att.x_r.data[..., :8]


def _fewer_rows(model):
    model.head.weight.data = model.head.weight.data[:5]


def _low_rank_transposed(model):
    model.blocks[1].att.w1.data = model.blocks[1].att.w1.data.t().contiguous()


def _more_heads(model):
    model.blocks[1].att.n_head = 64


def _no_norm(model):
    model.ln_out = nn.Identity()


MISFITS = [
    *((_fewer_layers, "blocks.1.ln1.weight"), (_wider_matrix, "blocks.1.att.key.weight")),
    *((_shorter_vector, "blocks.1.att.x_r"), (_fewer_rows, "head.weight"), (_low_rank_transposed, "blocks.1.att.w1")),
    *((_more_heads, "blocks.1 has n_head=64"), (_no_norm, "ln_out is a Identity")),
]


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize(("change", "what"), MISFITS)
def test_compiled_code_never_reads_what_does_not_fit(tmp_path, change, what, used_before):
    """Sizes in kernels come from the layout: with tensors of other sizes they would read and write beyond them."""
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)
    if used_before:
        for mode in RWKVMode:
            model.set_mode(mode)
            model(tokens)
    change(model)
    assert all(what in fallback_reason(model, path) for path in PATHS.values())


def test_a_state_that_was_changed_is_looked_at_again(tmp_path):
    model, token = load_model(tmp_path, "7.0"), make_tokens(2, 1)
    model.set_mode(RWKVMode.RNN)
    state = model(token)[1]
    state.wkv.data = state.wkv.data[:, :1]
    with pytest.raises(ParameterError, match="its wkv has shape"):
        model(token, state)


def test_states_of_other_kinds_of_tensors(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)

    class Own(torch.Tensor):
        pass

    state = model(tokens)[1]
    imaginary = torch.complex(torch.zeros_like(state.wkv), -state.wkv).conj().imag
    assert imaginary.is_neg() and torch.equal(imaginary, state.wkv)
    for mode in RWKVMode:
        model.set_mode(mode)
        expected = model(tokens, state)[0]
        for wkv in (imaginary, state.wkv.as_subclass(Own), nn.Parameter(state.wkv, requires_grad=False)):
            other = RWKVState(wkv, state.att_shift, state.ffn_shift, "7.0")
            assert relative_rms(model(tokens, other)[0], expected) < APART
    assert "negative" in fallback_reason(model, "step", tokens, dataclasses.replace(state, wkv=imaginary))
    assert "Own" in fallback_reason(model, "step", tokens.as_subclass(Own))


def lose_memory(x):
    x.untyped_storage().resize_(max(x.nbytes - x.itemsize, 0))


@pytest.mark.filterwarnings("ignore")  # torch's own, of inner tensors without memory
@pytest.mark.parametrize("mode", list(RWKVMode))
@pytest.mark.parametrize(
    "how",
    ["nothing", "gradients", "counting", "a module of another class", "return_v_first", "packed"],
)
def test_weights_without_all_their_memory_are_refused_before_torch_reads_them(tmp_path, mode, how):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)
    model.set_mode(mode)
    for _ in range(3):
        model(tokens)
    if how == "packed":
        quantise_weights(model, "int8", in_place=True)
    if how == "a module of another class":
        model.blocks[0].ffn.key.__class__ = type("Own", (nn.Linear,), {})
    lose_memory(model.blocks[1].ffn.value.codes if how == "packed" else model.blocks[1].ffn.value.weight.data)
    model.emb.weight.requires_grad_(how == "gradients")
    options = {"return_v_first": True} if how == "return_v_first" else {}
    with FlopCounterMode(display=False) if how == "counting" else contextlib.nullcontext():
        with pytest.raises(ParameterError, match=r"blocks.1.ffn.value.\w+ needs \d+ bytes, its memory has \d+"):
            model(tokens, **options)
    model.blocks[1].ffn.value.register_forward_pre_hook(lambda module, given: 1 / 0)  # may fill it
    with pytest.raises(ZeroDivisionError):
        model(tokens, **options)


@pytest.mark.parametrize("mode", list(RWKVMode))
@pytest.mark.parametrize("grad", [False, True])
def test_states_and_tokens_without_all_their_memory_are_refused(tmp_path, mode, grad):
    model, tokens = load_model(tmp_path, "7.0").requires_grad_(grad), make_tokens(1, 3)
    model.set_mode(mode)
    for name in ("wkv", "att_shift", "ffn_shift"):
        state = model(tokens)[1].detach().clone()
        lose_memory(getattr(state, name))
        with pytest.raises(ParameterError, match=f"The state's {name} needs"):
            model(tokens, state)
    lose_memory(tokens)
    with pytest.raises(ParameterError, match="The tensor of tokens needs"):
        model(tokens)
