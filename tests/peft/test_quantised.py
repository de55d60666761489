import pytest
import torch

from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.peft import (
    NF4Linear,
    dequantize_bnb_int8,
    dequantize_fp4,
    dequantize_int8,
    dequantize_nf4,
    quantised_and_back,
    quantize_bnb_int8,
    quantize_fp4,
    quantize_int8,
    quantize_nf4,
)
from rwkv_lab.peft.bitsandbytes_tensors import nf4_from_bitsandbytes, nf4_to_bitsandbytes
from rwkv_lab.peft.quantised import NF4_LEVELS

SHAPES = [(64, 128), (52, 32), (7, 30), (5, 13), (1, 1), (3, 64), (70, 15_001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weight_of(shape, dtype, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight.view(-1)[: min(70, weight.numel() // 2)] = 0  # a block of zeros has no scale
    return weight


def nf4_by_definition(weight, block_size=64):
    """(numbers of the levels, scales, values) by distances to all levels, in float64."""
    flat = weight.flatten().double()
    pad = torch.cat([flat, flat.new_zeros(-len(flat) % block_size)]).view(-1, block_size)
    scale = pad.abs().amax(1)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32).double()
    shares = torch.where(scale[:, None] > 0, pad / scale.clamp_min(1e-300)[:, None], 0.0)
    numbers = (shares[..., None] - levels).abs().argmin(-1)
    values = (levels[numbers] * scale[:, None]).flatten()[: len(flat)].view(weight.shape)
    return numbers.flatten()[: len(flat)], scale, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_level(shape, dtype):
    weight = weight_of(shape, dtype)
    codes, absmax = quantize_nf4(weight)
    assert codes.dtype == torch.uint8 and len(codes) == (weight.numel() + 1) // 2
    numbers, scale, values = nf4_by_definition(weight)
    unpacked = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[
        : weight.numel()
    ]  # the first one is the high half
    assert torch.equal(unpacked.long(), numbers)
    torch.testing.assert_close(absmax.double(), scale, rtol=1e-7, atol=0)
    back = dequantize_nf4(codes, absmax, shape, dtype)
    assert back.dtype == dtype and back.shape == shape
    torch.testing.assert_close(back.double(), values.to(dtype).double(), rtol=torch.finfo(dtype).eps + 1e-7, atol=0)


def test_nf4_as_published():
    """64 even steps from -1 to 1: what bitsandbytes 0.50.2 makes of them."""
    codes, absmax = quantize_nf4((torch.arange(64) - 31.5) / 32)
    assert bytes(codes.tolist()).hex() == "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"
    assert absmax.tolist() == [0.984375]
    assert torch.equal(
        dequantize_nf4(torch.arange(256).to(torch.uint8)[:1], torch.ones(1), (2,)), torch.tensor([-1.0] * 2)
    )
    assert bytes(quantize_nf4(torch.zeros(8))[0].tolist()).hex() == "77777777"


@pytest.mark.parametrize("block_size", [2, 32, 128])
def test_nf4_in_other_blocks(block_size):
    weight = weight_of((9, 50), torch.float32)
    codes, absmax = quantize_nf4(weight, block_size)
    assert len(absmax) == -(-450 // block_size)
    _, _, values = nf4_by_definition(weight, block_size)
    torch.testing.assert_close(dequantize_nf4(codes, absmax, (9, 50), block_size=block_size).double(), values)


def test_nf4_is_settled_after_once():
    """What was dequantised is quantised to the same codes: merging twice from the same base cannot drift."""
    weight = weight_of((64, 65), torch.float32)
    once = quantised_and_back(weight, "nf4")
    assert torch.equal(quantised_and_back(once, "nf4"), once)
    assert torch.equal(quantised_and_back(weight, "none"), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape, dtype):
    weight = weight_of(shape, dtype)
    codes, absmax = quantize_int8(weight)
    assert codes.dtype == torch.int8 and codes.shape == shape and codes.abs().max() <= 127
    back = dequantize_int8(codes, absmax, torch.float64)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert bool(((back - weight.double()).abs() <= 0.5001 * step).all())
    assert dequantize_int8(codes, absmax, dtype).dtype == dtype


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_rows_quantise_alone(quant):
    weight = weight_of((12, 128), torch.bfloat16)
    pieces = [quantised_and_back(weight[i : i + 3], quant) for i in range(0, 12, 3)]
    assert torch.equal(torch.cat(pieces), quantised_and_back(weight, quant))


def test_rows_of_one_scale_need_the_matrix_s():
    weight = weight_of((12, 128), torch.bfloat16)
    absmax = weight.float().abs().max()
    pieces = [quantised_and_back(weight[i : i + 5], "bnb-int8", absmax) for i in range(0, 12, 5)]
    assert torch.equal(torch.cat(pieces), quantised_and_back(weight, "bnb-int8"))


FP4 = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], dtype=torch.float64)  # by code


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_is_the_nearest_level(shape, dtype):
    weight = weight_of(shape, dtype)
    back = quantised_and_back(weight, "fp4")
    flat = weight.flatten().double()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-300)
    nearest = (blocks.abs()[..., None] / scale[..., None] - FP4).abs().amin(-1) * scale
    error = (torch.nn.functional.pad(back.flatten().double(), (0, -len(flat) % 64)).view(-1, 64) - blocks).abs()
    assert bool((error <= nearest + (1e-6 + torch.finfo(dtype).eps) * scale).all())
    assert back.dtype == dtype
    once = quantised_and_back(weight.float(), "fp4")
    assert torch.equal(quantised_and_back(once, "fp4"), once)


def test_fp4_as_published():
    """64 even steps from -1 to 1: what bitsandbytes 0.50.2 makes of them."""
    codes, absmax = quantize_fp4(torch.linspace(-1, 1, 64))
    assert codes.tolist() == [
        *(187, 187, 187, 170, 170, 170, 170, 221, 221, 220, 204, 207, 254, 238, 233, 153),
        *(17, 22, 102, 103, 116, 68, 69, 85, 85, 34, 34, 34, 34, 51, 51, 51),
    ]
    assert absmax.tolist() == [1]


def test_bnb_int8_as_published():
    """Its 256 values are denser near 0, symmetric but for 0 and 1; one scale for the whole matrix."""
    codes, absmax = quantize_bnb_int8(torch.tensor([[2.0, -2.0, 0.0], [1e-6, 1.0, -0.5]]))
    assert absmax == 2 and codes[0].tolist() == [255, 0, 127]
    values = dequantize_bnb_int8(torch.arange(256, dtype=torch.uint8), torch.tensor(1.0)).double()
    assert values[[0, 1, 126, 127, 128, 254, 255]].tolist() == pytest.approx(
        [-0.99296875, -0.97890625, -5.5e-7, 0, 5.5e-7, 0.99296875, 1]
    )
    assert torch.equal(values[128:255], -values[:127].flip(0)) and bool((values.diff() > 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bnb_int8_is_the_nearest_value(dtype):
    weight = weight_of((40, 33), dtype)
    values = dequantize_bnb_int8(torch.arange(256, dtype=torch.uint8), weight.float().abs().max()).double()
    nearest = (weight.double().flatten()[:, None] - values).abs().amin(1)
    error = (quantised_and_back(weight, "bnb-int8").double() - weight.double()).abs().flatten()
    assert bool((error <= nearest + 2 * torch.finfo(dtype).eps * weight.double().abs().max()).all())


def test_a_layer_of_its_own():
    torch.manual_seed(0)
    layer = NF4Linear(128, 6)
    x = torch.randn(2, 128)
    assert torch.equal(layer(x), x @ layer.weight.T) and list(layer.parameters()) == []
    assert set(layer.state_dict()) == {"packed.codes", "packed.absmax"}
    linear = torch.nn.Linear(128, 6, bias=False)
    packed = NF4Linear.from_linear(linear)
    assert torch.equal(packed.weight, quantised_and_back(linear.weight, "nf4"))
    packed.load_state_dict(layer.state_dict())
    assert torch.equal(packed(x), layer(x))
    with pytest.raises(AttributeError, match="nothing"):
        _ = packed.nothing


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_cannot_be_quantised(value):
    weight = torch.zeros(3, 64)
    weight[1, 5] = value
    for quantise in (quantize_nf4, quantize_fp4, quantize_int8, quantize_bnb_int8):
        with pytest.raises(NumericsError, match="NaN or infinity"):
            quantise(weight)
    with pytest.raises(ParameterError, match="nf4"):
        quantised_and_back(weight, "fp8")
    with pytest.raises(ParameterError, match="even"):
        quantize_nf4(weight, 63)
    with pytest.raises(ParameterError, match="96 would|96 "):
        dequantize_nf4(torch.zeros(5, dtype=torch.uint8), torch.zeros(3), (3, 64))


@pytest.mark.filterwarnings("ignore")  # bitsandbytes looks for other packages when it is imported
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (7, 30), (5, 13), (3, 3), (256, 512)])
def test_bitsandbytes(shape, dtype):
    """The same bytes both ways. Its CPU code unpacks rows of an even number of values below 64 wrongly (0.50.2), so no
    such shape is among these."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weight_of(shape, dtype)
    codes, absmax = quantize_nf4(weight)
    data, state = functional.quantize_nf4(weight)
    found, scales, block_size = nf4_from_bitsandbytes(data, state)
    assert torch.equal(found, codes) and torch.equal(scales, absmax) and block_size == 64
    theirs = functional.dequantize_nf4(data, state)
    assert torch.equal(dequantize_nf4(found, scales, shape, dtype, block_size), theirs)
    assert torch.equal(functional.dequantize_nf4(*nf4_to_bitsandbytes(codes, absmax, shape, dtype)), theirs)
    data, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    found, scales, _ = nf4_from_bitsandbytes(data, state)
    assert torch.equal(dequantize_nf4(found, scales, shape, dtype), functional.dequantize_4bit(data, state))
    with pytest.raises(LayoutError, match="fp4"):
        nf4_from_bitsandbytes(*functional.quantize_fp4(weight))
    data, state = functional.quantize_fp4(weight)
    codes, absmax = quantize_fp4(weight)
    assert torch.equal(state.absmax, absmax)
    ours, theirs = dequantize_fp4(codes, absmax, shape, dtype).double(), functional.dequantize_fp4(data, state).double()
    if dtype == torch.float32:
        assert torch.equal(ours, theirs)
    # Halves hit the middle of two levels: their CPU code takes negative ones down, their CUDA code and ours to 0.
    share = weight.double() / absmax.repeat_interleave(64)[: weight.numel()].view(shape).clamp_min(1e-30)
    middles = FP4.sort().values
    middles = (middles[1:] + middles[:-1]) / 2
    tie = (share.abs()[..., None] - middles).abs().amin(-1) < 1e-6
    assert torch.equal(ours[~tie], theirs[~tie]) and tie.double().mean() < 0.01
    whole = weight.float()  # their functional.quantize is gone since 0.44: one block as large as the matrix is the same
    code = functional.create_dynamic_map()
    if whole.numel() <= 4096:
        data, state = functional.quantize_blockwise(whole, code=code, blocksize=4096)
        assert torch.equal(quantised_and_back(whole, "bnb-int8"), functional.dequantize_blockwise(data, state))
    assert torch.equal(dequantize_bnb_int8(torch.arange(256, dtype=torch.uint8), torch.tensor(1.0)), code)
    rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
    codes, absmax = quantize_int8(weight.half())
    assert torch.equal(rows, codes) and torch.equal(scales, absmax)
