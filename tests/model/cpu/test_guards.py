"""Guards around every buffer given to compiled code: nothing is written into them, and none of their NaN is read."""

import copy

import pytest
import torch
from pairwise import each
from random_models import VERSIONS, load_model, make_tokens

from rwkv_lab.model import RWKVMode, quantise_weights
from rwkv_lab.model.cpu import buffer_pool, eligibility, prefill, step
from rwkv_lab.wkv import cpu, pointers

WIDE = 64  # elements on either side


def inside(x: torch.Tensor, guards: list) -> torch.Tensor:
    """The same values between two guards."""
    filled = torch.nan if x.is_floating_point() else 111
    block = torch.full((x.numel() + 2 * WIDE,), filled, dtype=x.dtype)
    block[WIDE:-WIDE] = x.reshape(-1)
    guards += [block[:WIDE], block[-WIDE:]]
    return block[WIDE:-WIDE].view(x.shape)


def untouched(guards: list) -> bool:
    return all(bool((g.isnan() if g.is_floating_point() else g == 111).all()) for g in guards)


@pytest.fixture
def guards(monkeypatch) -> list:
    """Grows with every buffer that is made for compiled code, whose values are NaN at first."""
    found, new = [], pointers.new

    def guarded(shape, dtype):
        return inside(new(shape, dtype).fill_(torch.nan), found)

    class Guarded(buffer_pool.Memory):
        def __init__(self, *parts):
            beside = ((WIDE,), torch.float32)
            super().__init__(beside, *(x for part in parts for x in (part, beside)))
            every = self.tensors()
            for x in every:
                x.fill_(torch.nan)
            found.extend(every[::2])
            self._parts, self.offsets, self.sizes = parts, self.offsets[1::2], self.sizes[1::2]

    for module in (prefill, cpu):
        monkeypatch.setattr(module, "new", guarded)
    monkeypatch.setattr(step, "Memory", Guarded)
    return found


def surrounded(model, guards):
    """The model, each of its tensors between two guards."""
    for x in (*model.parameters(), *model.buffers()):
        x.data = inside(x.data, guards)
    return model


@pytest.mark.parametrize(("version", "bits"), [*each(VERSIONS, [0]), *each(VERSIONS, [8, 4])])
def test_models_and_states(tmp_path, guards, monkeypatch, version, bits):
    for dtype, sizes in (
        (torch.float32, dict(n_head=3, head_size=10, dim_ffn=51, vocab_size=37)),
        (torch.bfloat16, dict(n_head=1, head_size=32, dim_ffn=77)),
        (torch.float16, dict(n_layer=1, n_head=2, head_size=8)),
    ):
        model = load_model(tmp_path, version, dtype=dtype, **sizes)
        if bits:
            quantise_weights(model, f"int{bits}", in_place=True)
        around: list = []
        plain, model = copy.deepcopy(model), surrounded(model, around)
        for mode in RWKVMode:
            plain.set_mode(mode)
            model.set_mode(mode)
            for B, T in ((1, 1), (2, 7), (13, 2)):
                tokens = make_tokens(B, T, model.layout.vocab_size)
                state = plain(tokens)[1].clone()
                for name, part in state.tensors().items():
                    object.__setattr__(state, name, inside(part, around))
                logits, after = model(tokens, state)
                expected, right = plain(tokens, state)
                assert torch.equal(logits, expected) and torch.equal(after.wkv, right.wkv)
                assert not logits.isnan().any() and not after.ffn_shift.isnan().any()
                assert eligibility.fallback_reason(model, "step") == ""
        assert len(guards) > 20 and untouched(around) and untouched(guards)
        guards.clear()


def test_a_number_in_a_guard_is_found():
    around: list = []
    x = inside(torch.zeros(3), around)
    assert untouched(around)
    x.as_strided((1,), (1,), x.storage_offset() + 3).fill_(1)
    assert not untouched(around)
