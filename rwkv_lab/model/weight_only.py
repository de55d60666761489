"""Weights in 8 or 4 bits with a scale per group: a model that needs a half or a quarter of the memory to decode.

Everything else keeps the model's dtype. The compiled step unpacks weights in registers, the compiled prefill block by
block; the torch modules, the reference, unpack one matrix at a time into float32. All compute with the same rounded
weights; in a bfloat16 model the prefill rounds them to that.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.standard_modules import replaced_module, watched
from rwkv_lab.torch_private import hooks_of

SCHEMES = {"int8": 8, "int4": 4}

# Numbers per scale, and what rows are padded to; kernels/cpu/products.h reads the same layout.
GROUPS = {8: 64, 4: 32}
_PADDING = {8: 64, 4: 128}
_AT_ONCE = 1 << 20  # weights that are rounded or restored at a time

# The largest number of a group of 4 bits becomes this code, and the others what fits: the best of them is kept.
_LARGEST = (-8.0, -7.4, -6.8)


class _Packed(nn.Module):
    """A matrix `[rows,columns]` as integer codes and bfloat16 scales; both are integers to torch, so that a change of
    the model's dtype leaves them alone.

    codes: int8 `[rows, columns padded to 64]`, or int16 `[rows, columns padded to 128, / 4]`: nibble j of word i of a
        line of 128 numbers is number 32 j + i, and 8 stands for zero.
    scales: the bits of a bfloat16 `[rows, groups]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    _like: torch.Tensor  # a NaN in the dtype of the matrix that this stands for

    def __init__(self, weight: torch.Tensor, bits: int):
        super().__init__()
        self.bits, (self.rows, self.columns) = bits, weight.shape
        padded = -(-self.columns // _PADDING[bits]) * _PADDING[bits]
        codes = torch.empty(
            *(self.rows, padded if bits == 8 else padded // 4),
            **{"dtype": torch.int8 if bits == 8 else torch.int16, "device": "cpu"},
        )
        scales = torch.empty(self.rows, padded // GROUPS[bits], dtype=torch.bfloat16, device="cpu")
        step = max(_AT_ONCE // padded, 1)
        for at in range(0, self.rows, step):
            part = F.pad(weight.detach()[at : at + step].float(), (0, padded - self.columns))
            numbers, scales[at : at + step] = _rounded(part.unflatten(1, (-1, GROUPS[bits])), bits)
            codes[at : at + step] = numbers.to(torch.int8) if bits == 8 else _into_nibbles(numbers)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.view(torch.int16))
        self.register_buffer("_like", torch.tensor(torch.nan, dtype=torch.float32, device="cpu"))

    @property
    def weight(self) -> torch.Tensor:
        """Shape, dtype and device of the matrix that this stands for, for those who ask a model for them: all NaN, and
        no memory. `dequantised` has the numbers."""
        return self._like.expand(self.rows, self.columns)

    def dequantised(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The matrix as it is computed with `[rows,columns]`, or some of its rows: float32, exactly code times scale;
        float64 in a float64 model."""
        codes, scales = (x if rows is None else x[rows] for x in (self.codes, self.scales))
        wide = torch.promote_types(self._like.dtype, torch.float32)
        numbers = codes if self.bits == 8 else _from_nibbles(codes)
        numbers = numbers.unflatten(-1, (-1, GROUPS[self.bits])).to(wide)
        numbers = numbers * scales.view(torch.bfloat16).to(wide).unsqueeze(-1)
        return numbers.flatten(-2)[..., : self.columns]

    def is_whole(self) -> bool:
        """Whether codes and scales are those of a `[rows,columns]` in `bits` bits."""
        if self.bits not in GROUPS:
            return False
        padded = -(-self.columns // _PADDING[self.bits]) * _PADDING[self.bits]
        codes = (torch.int8, (self.rows, padded)) if self.bits == 8 else (torch.int16, (self.rows, padded // 4))
        scales = torch.int16, (self.rows, padded // GROUPS[self.bits])
        return all((x.dtype, x.shape) == y for x, y in ((self.codes, codes), (self.scales, scales)))

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}"


@watched
class PackedLinear(_Packed):
    """In place of an `nn.Linear` without bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[...,columns]` -> `[...,rows]`."""
        weight = self.dequantised()
        return F.linear(x.to(weight.dtype), weight).to(x.dtype)


@watched
class PackedEmbedding(_Packed):
    """In place of an `nn.Embedding`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens `[...]` -> `[...,columns]`."""
        return self.dequantised(tokens).to(self._like.dtype)


@checked
def quantise_weights(model: Any, scheme: str = "int8", in_place: bool = False) -> Any:
    """A model whose large matrices (embedding, head, and every Linear of the layers) are rounded to 8 or 4 bits.

    It is an RWKV_Dual like the one given, in its dtype: it decodes, reads prompts and generates. What the rounding
    costs is for `agreement_of_logits` to say. The low-rank pairs and all vectors stay as they are. It cannot be
    trained, or saved as a checkpoint.

    Args:
        model: on the CPU, float32, bfloat16 or float16.
        scheme: "int8" (8.25 bits per weight) or "int4" (4.5).
        in_place: change the model given, matrix by matrix, so that its own weights are freed on the way.

    Raises:
        ParameterError: no such scheme; no RWKV_Dual; a model on another device, with adapters or hooks in it, or
            rounded already.
    """
    if not isinstance(getattr(model, "emb", None), nn.Module):
        raise ParameterError(f"Weights of an RWKV_Dual can be rounded, not of a {type(model).__name__}.")
    if scheme not in SCHEMES:
        raise ParameterError(f"There is no scheme {scheme!r} for weights: {', '.join(SCHEMES)}.")
    if model.get_device().type != "cpu":
        raise ParameterError(f"Weights are rounded on the CPU, this model is on {model.get_device()}: model.to('cpu').")
    if found := replaced_module(model):
        raise ParameterError(
            f"This model has {found}. Weights are rounded once, and after adapters are merged into them."
        )
    for name, module in model.named_modules():
        if name and (any(hooks_of(module)) or getattr(module, "receivers", ()) or "forward" in vars(module)):
            raise ParameterError(
                f"{name} has a hook, is captured, or has a forward of its own,\nwhich would be lost: remove it first."
            )
    found = [(name, m) for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)]
    if not in_place:
        model = copy.deepcopy(
            model, {id(m.weight): nn.Parameter(torch.empty(0, dtype=torch.float32)) for _, m in found}
        )
    for name, module in found:
        kind = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
        packed = kind(module.weight, SCHEMES[scheme])
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, packed.to(module.weight.dtype))
    return model.requires_grad_(False)


def _rounded(groups, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """groups `[rows,n,group]` -> integers `[rows,n*group]` as floats, bfloat16 scales `[rows,n]`."""
    if bits == 8:
        scales = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
        return _codes(groups, scales, -127, 127).flatten(1), scales.squeeze(-1).bfloat16()
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))

    def rounded_with(code: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared error, codes and scales where the largest number of a group becomes this code."""
        scales = (largest / code).bfloat16().float()
        codes = _codes(groups, scales, -8, 7)
        return (codes * scales - groups).square_().sum(-1, keepdim=True), codes, scales

    best, best_codes, best_scales = rounded_with(_LARGEST[0])
    for code in _LARGEST[1:]:
        error, codes, scales = rounded_with(code)
        better = error < best
        best = torch.where(better, error, best)
        best_codes, best_scales = torch.where(better, codes, best_codes), torch.where(better, scales, best_scales)
    return best_codes.flatten(1), best_scales.squeeze(-1).bfloat16()


def _codes(groups, scales, low: int, high: int):
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (groups * inverse).round_().clamp_(low, high)


def _into_nibbles(numbers):
    """Integers -8 .. 7 as floats `[rows,128 n]` -> int16 `[rows,32 n]`."""
    lines = (numbers.to(torch.int32) + 8).unflatten(1, (-1, 4, 32))
    words = torch.stack([lines[:, :, j] << (4 * j) for j in range(4)]).sum(0)
    return words.to(torch.int16).flatten(1)


def _from_nibbles(words):
    """int16 `[...,32 n]` -> int16 `[...,128 n]`."""
    lines = words.unflatten(-1, (-1, 32))
    numbers = torch.stack([(lines >> (4 * j) & 15) - 8 for j in range(4)], -2)  # [...,n,4,32]
    return numbers.flatten(-3)


# ---------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class LogitsAgreement:
    """How far predictions moved, over all positions."""

    kl: float  # mean Kullback-Leibler divergence from the original's distribution, in nats per token
    kl_worst: float  # of a single position
    top1: float  # share of positions whose likeliest token stayed the same
    error: float  # RMS of the difference, relative to the RMS of the original logits
    positions: int

    def __str__(self) -> str:
        return f"KL {self.kl:.2e} (worst {self.kl_worst:.1e}), top-1 {self.top1:.1%}, logits {self.error:.1e} apart"


@checked
@torch.no_grad()
def agreement_of_logits(found: torch.Tensor, expected: torch.Tensor) -> LogitsAgreement:
    """Compare logits `[...,V]` with those of the original model on the same tokens.

    Raises:
        ParameterError: shapes that differ.
    """
    if found.shape != expected.shape:
        raise ParameterError(f"Logits of shapes {list(found.shape)} and {list(expected.shape)} cannot be compared.")
    kl, same, difference, size = [], 0, 0.0, 0.0
    rows, right_rows = (x.reshape(-1, x.shape[-1]) for x in (found, expected))
    for at in range(0, len(rows), 64):  # a few at a time: the whole in float64 would be large
        one, right = rows[at : at + 64].double(), right_rows[at : at + 64].double()
        p = right.log_softmax(-1)
        kl.append((p.exp() * (p - one.log_softmax(-1))).sum(-1))
        same += int((one.argmax(-1) == right.argmax(-1)).sum())
        difference += float((one - right).square().sum())
        size += float(right.square().sum())
    kl = torch.cat(kl)
    error = (difference / size) ** 0.5 if size else 0.0
    return LogitsAgreement(float(kl.mean()), float(kl.max()), same / len(rows), error, len(rows))
