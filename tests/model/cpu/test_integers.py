"""Prompts in integer dot products: every path that the processor has, against exact sums of integers in torch."""

import ctypes

import pytest
import torch
from random_models import load_model, make_tokens

from rwkv_lab.checkpoint.grouped import padded
from rwkv_lab.checkpoint.packed import part_shapes
from rwkv_lab.model import quantise_weights
from rwkv_lab.model.cpu import abi, prefill
from rwkv_lab.model.weight_only import ACTIVATION_GROUPS, PackedLinear, rounded_activations
from rwkv_lab.wkv.pointers import Span

# Columns that end inside a group and a line, and go over more than one block of them; rows that fill no panel or tile.
SIZES = [(17, 70, 40), (37, 300, 150), (130, 3300, 33), (1, 64, 1)]  # rows of x, columns, rows of the matrix
KINDS = sorted(ACTIVATION_GROUPS)


@pytest.fixture(scope="module", params=abi.PATHS)
def path(request):
    if not abi.prefill_library().has_integer_path(abi.PATHS[request.param]):
        pytest.skip(f"this processor has no {request.param}")
    return abi.PATHS[request.param]


def packed(x: torch.Tensor) -> torch.Tensor:
    """x `[rows,k]` as `pack_tile` lays it out."""
    library, (rows, k) = abi.prefill_library(), x.shape
    tile = library.packed_floats(1, k, 0) // k
    out = torch.zeros(-(-rows // tile) * tile, k)
    out[:rows] = x
    return out.view(-1, tile, k).transpose(1, 2).contiguous()


def multiplied(x: torch.Tensor, layer: PackedLinear, path: int, add: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.full((len(x), layer.rows), torch.nan) if add is None else add.clone()
    given, p = packed(x), (abi.Product * 1)()
    p[0].x, p[0].x_bytes, p[0].y, p[0].y_bytes = given.data_ptr(), given.nbytes, y.data_ptr(), y.nbytes
    p[0].w, p[0].w_bytes = layer.codes.data_ptr(), layer.codes.nbytes
    p[0].scales, p[0].scales_bytes = layer.scales.data_ptr(), layer.scales.nbytes
    if layer.kind == "int4":
        p[0].zeros, p[0].zeros_bytes = layer.zeros.data_ptr(), layer.zeros.nbytes
    p[0].rows, p[0].k, p[0].n, p[0].w_dtype = len(x), layer.columns, layer.rows, abi.QUANTISED[layer.kind]
    p[0].w_stride_n, p[0].w_stride_k, p[0].y_stride, p[0].add = layer.columns, 1, layer.rows, add is not None
    p[0].integers = path
    assert abi.prefill_library().multiply_all(Span(ctypes.addressof(p), ctypes.sizeof(p)), 1, 0, 2) == 0
    return y


def any_layer(kind: str, n: int, columns: int, generator: torch.Generator) -> PackedLinear:
    """A matrix `[n,columns]`; of kinds of exported files any codes, scales and zero points."""
    if kind.endswith("grouped"):
        return PackedLinear(torch.randn(n, columns, generator=generator), kind)
    parts = []
    for shape, dtype in part_shapes(kind, (n, columns)).values():
        if dtype == "float32":
            parts.append(torch.rand(shape, generator=generator) + 0.5)
        else:
            least, most = (-127, 128) if dtype == "int8" else (0, 256)
            parts.append(torch.randint(least, most, shape, generator=generator).to(getattr(torch, dtype)))
    return PackedLinear.of_parts(kind, parts, columns)


def ones(layer: PackedLinear) -> PackedLinear:
    """The same codes, all scales 1; of nf4 127, so that levels are their 127ths."""
    codes, scales, *zeros = layer.parts()
    same = torch.full_like(scales, 127 if layer.kind == "nf4" else 1)
    return PackedLinear.of_parts(layer.kind, (codes, same, *zeros), layer.columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "n"), SIZES)
def test_sums_are_those_of_integers(path, kind, rows, columns, n):
    generator = torch.Generator().manual_seed(columns)
    if not kind.endswith("grouped"):
        columns = padded(columns, 8)  # others are computed with by PyTorch
    layer = ones(any_layer(kind, n, columns, generator))
    x = torch.randint(-127, 128, (rows, columns), generator=generator).float()
    x[:, :: ACTIVATION_GROUPS[kind]] = 127.0  # so that a group's scale is 1 and its codes are its numbers
    expected = x.long() @ layer.of_integers().long().T
    assert expected.abs().max() < 2**24  # float32 holds every sum on the way
    assert torch.equal(multiplied(x, layer, path).long(), expected)
    before = torch.randint(-9, 9, expected.shape).float()
    assert torch.equal(multiplied(x, layer, path, before).long(), expected + before.long())


def test_the_largest_bytes_do_not_overflow(path):
    codes, scales = torch.full((16, 256), -127, dtype=torch.int8), torch.ones(16, 4).bfloat16()
    layer = PackedLinear.of_parts("int8-grouped", (codes, scales), 256)
    for sign in (1, -1):
        assert (multiplied(torch.full((15, 256), 127.0 * sign), layer, path) == -127 * 127 * 256 * sign).all()
    layer = PackedLinear.of_parts(
        "int4-grouped", (torch.zeros(16, 64, dtype=torch.int16), torch.ones(16, 8).bfloat16()), 256
    )
    assert (multiplied(torch.full((15, 256), 127.0), layer, path) == -8 * 127 * 256).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_what_is_no_number(path, kind):
    generator, columns = torch.Generator().manual_seed(0), 300 if kind.endswith("grouped") else 320
    layer = any_layer(kind, 40, columns, generator)
    x = torch.randn(37, columns, generator=generator) * torch.logspace(-20, 20, 37)[:, None]
    x[2], x[5, 7], x[9, 299] = 0.0, torch.nan, torch.inf
    found = multiplied(x, layer, path)
    expected = rounded_activations(x.double(), ACTIVATION_GROUPS[kind]) @ layer.of_integers().double().T
    assert found[5].isnan().all() and found[9].isnan().all() and not found[2].any()
    finite = [i for i in range(37) if i not in (5, 9)]
    apart = (found.double() - expected)[finite].norm(dim=1)
    assert (apart <= 2e-6 * expected[finite].norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_go_the_way_that_was_chosen(tmp_path, monkeypatch, path, dtype):
    model = load_model(tmp_path, "7.0", head_size=32, dtype=dtype)
    wide, rounded = (quantise_weights(model, "int8", activations=which) for which in ("float32", "int8"))
    taken = []
    monkeypatch.setattr(prefill, "integer_path", lambda library: taken.append(1) or path)
    few, many = make_tokens(1, 15), make_tokens(1, 16)
    assert torch.equal(rounded(few)[0], wide(few)[0]) and not taken  # too few to be worth it
    found, expected = rounded(many)[0].float(), wide(many)[0].float()
    apart = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()  # at some places a model is unstable
    assert taken and 0 < apart < 0.05
    taken.clear()
    rounded.set_mode("rnn")
    assert rounded(many)[0].isfinite().all() and not taken  # one by one
