"""Weights in 8 or 4 bits with a scale per group: a model that needs a half or a quarter of the memory to decode.

They are of the kinds of `rwkv_lab.checkpoint.packed`: those made here, and those that exported files have.

Everything else keeps the model's dtype. The compiled step unpacks weights in registers, the compiled prefill block by
block; the torch modules, the reference, unpack one matrix at a time into float32. All compute with the same rounded
weights, but for the levels of nf4 in products of integers, and where the prefill of a bfloat16 model multiplies pairs.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint.four_bits import from_4_bits
from rwkv_lab.checkpoint.grouped import GROUPS
from rwkv_lab.checkpoint.packed import GROUPED, PARTS, part_shapes, shown, values_of
from rwkv_lab.checkpoint.rounding import NF4_BLOCK, NF4_LEVELS
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.model.cpu.packing import packed_codes, packed_nf4
from rwkv_lab.model.standard_modules import replaced_module, watched
from rwkv_lab.torch_private import hooks_of

SCHEMES = {"int8": "int8-grouped", "int4": "int4-grouped", "nf4": "nf4"}  # -> kind
ACTIVATIONS = ("int8", "float32")  # what products of many tokens read; the first is the default
Activations = Literal["int8", "float32"]
# Kind -> inputs that share a scale where activations are rounded.
ACTIVATION_GROUPS = {"int8": GROUPS[8], "int4": GROUPS[4], "nf4": NF4_BLOCK}
ACTIVATION_GROUPS |= {kind: GROUPS[bits] for kind, bits in GROUPED.items()}
NF4_CODES = tuple(float(round(127 * level)) for level in NF4_LEVELS)  # as kernels/cpu/integer.h has them
_RUN = 16  # tokens read at once from which activations are rounded: fewer are as fast without


class _Packed(nn.Module):
    """A matrix `[rows,columns]` as the parts of a kind of `rwkv_lab.checkpoint.packed`, in memory or mapped from a
    file; all are integers to torch, so that a change of the model's dtype leaves them alone.

    codes: as in the file; `scales`: the bits of bfloat16 or float32; `zeros`: of "int4", else there is none.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    _like: torch.Tensor  # a NaN in the dtype of the matrix that this stands for
    activations: str

    def __init__(self, weight: torch.Tensor, kind: str, activations: str = ACTIVATIONS[0]):
        super().__init__()
        self._hold(kind, packed_parts(weight, kind), weight.shape[1])
        self.activations = activations

    @classmethod
    def of_parts(cls, kind: str, parts: Sequence[torch.Tensor], columns: int) -> Self:
        """Of codes, scales and what else a kind has, which it keeps where they lie."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._hold(kind, parts, columns)
        return new

    def _hold(self, kind: str, parts: Sequence[torch.Tensor], columns: int) -> None:
        codes, scales, *zeros = parts
        self.kind, self.rows, self.columns = kind, len(codes), columns
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.view(_SAME_SIZE[scales.dtype]))
        if zeros:
            self.register_buffer("zeros", zeros[0])
        self.register_buffer("_like", torch.tensor(torch.nan, dtype=torch.float32, device="cpu"))
        self.activations = ACTIVATIONS[0]

    @property
    def weight(self) -> torch.Tensor:
        """Shape, dtype and device of the matrix that this stands for, for those who ask a model for them: all NaN, and
        no memory. `dequantised` has the numbers."""
        return self._like.expand(self.rows, self.columns)

    def buffers_of_parts(self) -> list[torch.Tensor]:
        """Codes, scales and what else the kind has, as this keeps them."""
        return [self.codes, self.scales, *([self.zeros] if len(PARTS[self.kind]) > 2 else [])]

    def parts(self) -> list[torch.Tensor]:
        """Codes, scales and what else the kind has, as `of_parts` takes them."""
        codes, scales, *zeros = self.buffers_of_parts()
        return [codes, scales.view(torch.bfloat16 if self.kind in GROUPED else torch.float32), *zeros]

    def dequantised(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The matrix as it is computed with `[rows,columns]`, or some of its rows: float32, exactly code times scale;
        float64 in a float64 model."""
        parts, dtype = self.parts(), torch.promote_types(self._like.dtype, torch.float32)
        if rows is None:
            return values_of(self.kind, parts, self.columns, dtype)
        if self.kind == "nf4" and self.columns % NF4_BLOCK:  # a row begins inside a block
            return values_of(self.kind, parts, self.columns, dtype)[rows]
        some = [part.view(self.rows, -1)[rows.flatten()] for part in parts]
        if self.kind == "int8":
            some[1] = some[1].flatten()
        elif self.kind == "int4":
            some[0] = some[0].unflatten(1, parts[0].shape[1:])
        return values_of(self.kind, some, self.columns, dtype).view(*rows.shape, self.columns)

    def is_whole(self) -> bool:
        """Whether codes and scales are those of a `[rows,columns]` of its kind."""
        if self.kind not in PARTS:
            return False
        expected = part_shapes(self.kind, (self.rows, self.columns)).values()
        parts = self.buffers_of_parts()
        sizes = [(tuple(part.shape), part.dtype) for part in parts]
        return sizes == [(shape, _as_kept(getattr(torch, dtype))) for shape, dtype in expected]

    def has_compiled_form(self) -> bool:
        """Whether compiled code takes it: where nothing is padded, rows are to be whole groups."""
        return self.kind in GROUPED or self.columns % NF4_BLOCK == 0

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {shown(self.kind)}"


_SAME_SIZE = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def _as_kept(dtype: torch.dtype) -> torch.dtype:
    return _SAME_SIZE.get(dtype, dtype)


def packed_parts(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    """The parts of a matrix `[rows,columns]` of a kind in `SCHEMES`.

    Raises:
        NumericsError: NaN or infinity, which "nf4" has no code for.
        ParameterError: an odd number of columns, of "nf4".
    """
    if kind in GROUPED:
        return packed_codes(weight, GROUPED[kind])
    if weight.shape[1] % 2:
        raise ParameterError(f"nf4 stores two numbers to a byte; a matrix has rows of {weight.shape[1]}.")
    return packed_nf4(weight)


@watched
class PackedLinear(_Packed):
    """In place of an `nn.Linear` without bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[...,columns]` -> `[...,rows]`; x `[B,T,columns]` of many tokens is rounded first."""
        rounds = x.ndim == 3 and self.rounds_activations(x.shape[1])
        weight = self.of_integers() if rounds else self.dequantised()
        given = x.to(weight.dtype)
        if rounds:
            given = rounded_activations(given, ACTIVATION_GROUPS[self.kind])
        return F.linear(given, weight).to(x.dtype)

    def of_integers(self) -> torch.Tensor:
        """As `dequantised`, each number an integer times its scale: the levels of "nf4" are 127ths of its largest."""
        if self.kind != "nf4":
            return self.dequantised()
        (codes, absmax), n = self.parts(), self.rows * self.columns
        found = from_4_bits(codes, absmax / 127, n, torch.float32, NF4_BLOCK, NF4_CODES).view(-1, self.columns)
        return found.to(torch.promote_types(self._like.dtype, torch.float32))

    def rounds_activations(self, tokens: int) -> bool:
        """Whether it rounds what it reads, of so many tokens at once."""
        return self.activations == "int8" and tokens >= _RUN


@watched
class PackedEmbedding(_Packed):
    """In place of an `nn.Embedding`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens `[...]` -> `[...,columns]`."""
        return self.dequantised(tokens).to(self._like.dtype)


@checked
def quantise_weights(
    model: Any, scheme: str = "int8", in_place: bool = False, activations: Activations = "int8"
) -> Any:
    """A model whose large matrices (embedding, head, and every Linear of the layers) are rounded to 8 or 4 bits.

    `RWKV_Dual.from_pretrained(path, weights=scheme)` does the same without the whole model in memory.

    It is an RWKV_Dual like the one given, in its dtype: it decodes, reads prompts and generates. What the rounding
    costs is for `agreement_of_logits` to say. The low-rank pairs and all vectors stay as they are. It cannot be
    trained; `save_pretrained` writes it as it is, and `from_pretrained` opens that without the original.

    Args:
        model: on the CPU, float32, bfloat16 or float16.
        scheme: "int8" (8.25 bits per weight), "int4" (4.5) or "nf4" (4.5), the numbers of bitsandbytes.
        in_place: change the model given, matrix by matrix, so that its own weights are freed on the way.
        activations: what the matrices read of 16 tokens and more at once: "int8", in groups as the weights, so that
            prompts are multiplied in integers, or "float32", as the tokens one by one always are. With "int8", levels
            of "nf4" are rounded for these to 127ths of the largest.

    Raises:
        NumericsError: NaN or infinity in a matrix, with "nf4".
        ParameterError: no such scheme or activations; no RWKV_Dual; a model on another device, with adapters or hooks
            in it, or rounded already.
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
    while found:
        name, module = found.pop(0)  # nothing else holds it once it is replaced
        owner, _, last = name.rpartition(".")
        kind = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
        with naming(name):
            packed = kind(module.weight, SCHEMES[scheme], activations)
        setattr(model.get_submodule(owner), last, packed.to(module.weight.dtype))
        del module
    return model.requires_grad_(False)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of packing inside the block say of which module they are."""
    try:
        yield
    except (NumericsError, ParameterError) as e:
        raise type(e)(f"{name}: {e}") from e


def rounded_activations(x: torch.Tensor, group: int) -> torch.Tensor:
    """x `[...,columns]` as products in integers read it: multiples, -127 to 127, of a scale per row and group.

    A group with NaN or infinity in it is NaN as a whole.
    """
    columns = x.shape[-1]
    groups = F.pad(x, (0, -columns % group)).unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    tiny = torch.finfo(torch.float32).tiny
    inverse = torch.where(scales >= tiny, 1 / scales, 0)
    lost = scales.isinf() | scales.isnan()
    found = (groups * inverse).round().masked_fill(lost, torch.nan) * scales
    return found.flatten(-2)[..., :columns]


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
