"""Weights packed by compiled code, bit for bit as the reference in torch rounds them."""

import pytest
import torch

from rwkv_lab.checkpoint import four_bits
from rwkv_lab.checkpoint.grouped import restored, rounded
from rwkv_lab.checkpoint.rounding import NF4_LEVELS
from rwkv_lab.errors import KernelError, NumericsError
from rwkv_lab.model.cpu import abi, packing
from rwkv_lab.model.weight_only import PackedLinear
from rwkv_lab.wkv import use_backend
from rwkv_lab.wkv.pointers import span


def weights(rows: int, columns: int) -> torch.Tensor:
    """Numbers of all sizes, and what is odd: zeros of both signs, ties, the smallest and the largest numbers."""
    generator = torch.Generator().manual_seed(columns)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    w[1], w[2] = 0.0, -0.0
    w[3] = torch.arange(columns) % 17 - 8
    w[4] = (torch.arange(columns) % 5 - 2) * 0.5
    w[5, 0], w[6] = 1e30, 1e-44
    w[7] *= 1e-41
    w[8] = torch.where(torch.rand(columns, generator=generator) < 0.9, 0, w[8])
    return w


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bit_for_bit_as_the_reference(bits, dtype):
    for columns in (1, 64, 130, 300, 1000):
        w = weights(41, columns)
        w = (w.clamp(-6e4, 6e4) if dtype == torch.float16 else w).to(dtype)
        found, expected = packing.packed_codes(w, bits), rounded(w, bits)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].view(torch.int16), expected[1].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_bit_for_bit_as_the_reference(dtype):
    for columns in (2, 64, 130, 1000):
        w = weights(41, columns)
        w = (w.clamp(-6e4, 6e4) if dtype == torch.float16 else w).to(dtype)
        codes, absmax = packing.packed_nf4(w)
        expected = four_bits.nf4(w)
        assert torch.equal(codes.flatten(), expected[0]) and torch.equal(absmax, expected[1])
    halves = torch.tensor(NF4_LEVELS)
    w = torch.cat([halves, (halves[1:] + halves[:-1]) / 2, torch.zeros(33)])[None]  # between two levels: the lower one
    assert torch.equal(packing.packed_nf4(w)[0].flatten(), four_bits.nf4(w)[0])
    w[0, 40] = torch.inf
    with pytest.raises(NumericsError):
        packing.packed_nf4(w)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(bits, odd):
    w = torch.randn(3, 256)
    w[1, 70] = odd
    right = packing.packed_codes(torch.randn(0x7F, 256).index_copy(0, torch.arange(3), w), bits)
    for codes, scales in (right, rounded(w, bits)):
        lost = restored(codes[:3], scales[:3], 256, bits).isnan()
        group = 64 if bits == 8 else 32
        assert lost.sum() == group and lost[1, 70 // group * group : (70 // group + 1) * group].all()


def test_other_ways_to_the_same_codes(monkeypatch):
    w = torch.randn(70, 130)
    codes, scales = packing.packed_codes(w, 4)
    for given in (w.double(), w.T.contiguous().T):  # neither is for compiled code
        assert torch.equal(packing.packed_codes(given, 4)[0], codes)
    with use_backend("reference"):
        assert torch.equal(PackedLinear(w, "int4-grouped").codes, codes)

    def no_compiler():
        raise KernelError("none")

    monkeypatch.setattr(abi, "packing_library", no_compiler)
    assert torch.equal(PackedLinear(w, "int4-grouped").codes, codes)


def test_memory_that_does_not_go_with_the_sizes_is_refused():
    library, w, codes, scales = abi.packing_library(), torch.ones(4, 128), torch.zeros(4, 128).char(), torch.zeros(16)
    x, y, z = (span(t, t.shape, t.dtype) for t in (w, codes, scales))
    right = {"dtype": 0, "rows": 4, "columns": 128, "bits": 8}
    assert library.pack(x, *right.values(), y, z, 1) == 0
    for wrong in ({"dtype": 3}, {"rows": 5}, {"rows": 0}, {"columns": 129}, {"columns": 2**40}, {"bits": 5}):
        assert library.pack(x, *(right | wrong).values(), y, z, 1) == 1
    for short in ((abi.Span(x.data, 2047), y, z), (x, abi.Span(y.data, 511), z), (x, y, abi.Span(z.data, 15))):
        assert library.pack(short[0], *right.values(), *short[1:], 1) == 1
    codes, sizes = torch.zeros(256, dtype=torch.uint8), torch.zeros(8)
    y, z = (span(t, t.shape, t.dtype) for t in (codes, sizes))
    assert library.pack_nf4(x, 0, 512, y, z, 1) == 0
    for dtype, n in ((3, 512), (0, 514), (0, 511), (0, 0), (0, 2**62)):
        assert library.pack_nf4(x, dtype, n, y, z, 1) == 1
    for short in ((abi.Span(x.data, 2047), y, z), (x, abi.Span(y.data, 255), z), (x, y, abi.Span(z.data, 31))):
        assert library.pack_nf4(short[0], 0, 512, *short[1:], 1) == 1
