"""The parallel pass over many tokens, on a CPU and without gradients: `Block.forward` in few compiled passes.

PyTorch's form in rwkv4.py to rwkv7.py of `rwkv_lab/model` is the definition; files of those names here have the layers'
compiled form. Everything between two matrix products is float32, the residual stream too, so that float16 needs no
rescaling; what products read is rounded to bfloat16 where the model is bfloat16 and pairs of it are multiplied, as
the loader of kernels decides. Products take the weights as they are stored, in 8 or 4 bits too: no copy is kept.
These are made in integers where `PackedLinear` rounds what it reads.
"""

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_lab.model.cpu import abi
from rwkv_lab.model.cpu.eligibility import Eligibility, Permit
from rwkv_lab.model.registry import compiled_form
from rwkv_lab.model.state import RWKVState, maker
from rwkv_lab.model.weight_only import PackedEmbedding, PackedLinear
from rwkv_lab.wkv.pointers import NOTHING, Span, check, new, span, span_of_new, strided_span

_BLOCK = 512  # rows (batch times tokens) at once: enough to pay for reading a layer's weights, few enough for the cache


@torch.no_grad()
def run(model: Any, permit: Permit, tokens: Tensor, state: RWKVState) -> tuple[Tensor, RWKVState]:
    """tokens `[B,T]` through an eligible model -> x `[B,T,C]` float32 before ln_out, and the new state."""
    B, T = tokens.shape
    prefill = Pass(model, permit.found, T)  # the permit itself holds the weights' memory until this returns
    per_pass = max(1, _BLOCK // B)
    x = new((B, T, model.layout.n_embd), torch.float32)
    # [L][B,...] each: what goes from one run of tokens to the next
    att, ffn, wkv = (list(part.unbind(1)) for part in (state.att_shift, state.ffn_shift, state.wkv))
    for start in range(0, T, per_pass):
        piece, rows = tokens[:, start : start + per_pass].long(), x[:, start : start + per_pass]
        if rows.is_contiguous():
            prefill.over(piece.contiguous(), prefill.made(rows.flatten(0, 1)), att, ffn, wkv)
        else:
            own = prefill.scratch("x", piece.numel(), x.shape[2])
            prefill.over(piece.contiguous(), own, att, ffn, wkv)
            rows.copy_(own.view(rows.shape))
    layout, (S, a, f) = model.layout, (torch.stack(part, 1) for part in (wkv, att, ffn))
    return x, RWKVState(S, a, f, layout.version, layout.vocab_size, maker(model))


@torch.no_grad()
def logits(model: Any, permit: Permit, x: Tensor) -> Tensor:
    """x `[...,C]` before ln_out -> logits `[...,V]` in the model's dtype."""
    C, V = x.shape[-1], model.layout.vocab_size
    flat, out = x.reshape(-1, C), new((*x.shape[:-1], V), model.emb.weight.dtype)
    prefill = Pass(model, permit.found, x.shape[1] if x.ndim == 3 else 1)
    for rows, y in zip(flat.split(_BLOCK), out.view(-1, V).split(_BLOCK), strict=True):
        rows = rows.float().contiguous()
        packed = prefill.packed("head", len(rows), C)
        prefill.call(
            *("norm_out", prefill.floats(rows, len(rows), C), *prefill.norm(model.ln_out), len(rows), C),
            *(prefill.floats(packed), prefill.pairs),
        )
        prefill.multiply(len(rows), (packed, model.head, y))
    return out


def integer_path(library: ctypes.CDLL) -> int:
    """The fastest way to multiply bytes that the processor has; one of `abi.PATHS`."""
    return library.integer_path()


@dataclass
class Transposed:
    """A matrix `[k,n]`, k being what is multiplied: RWKV's low-rank pairs are stored so, a Linear's as `[n,k]`."""

    weight: Tensor


class Pass:
    """What the layers of one call share: library, threads, and scratch buffers, used by one layer after the other."""

    def __init__(self, model: Any, found: Eligibility, tokens: int):
        self.model, self.found, self.tokens = model, found, tokens
        self.library, self.threads = abi.prefill_library(), torch.get_num_threads()
        self.torch_dtype, self.dtype = model.emb.weight.dtype, abi.DTYPES[model.emb.weight.dtype]
        self.pairs = int(model.emb.weight.dtype == torch.bfloat16 and self.library.has_pairs())
        self._scratch: dict[tuple, Tensor] = {}
        self._made: dict[int, tuple[Tensor, Span]] = {}  # by id; kept alive, so that no other comes to have it

    # ------------------------------------------------------------------ calling

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the library; its last argument is the number of threads."""
        check(getattr(self.library, name)(*arguments, self.threads), name)

    def floats(self, x: Tensor | None, *shape: int) -> Span:
        """The memory of float32 of that shape, or of whatever shape it has; nothing for None."""
        if x is None:
            return NOTHING
        made = self._made.get(id(x))
        return made[1] if made else span(x, shape or x.shape, torch.float32)

    def made(self, x: Tensor) -> Tensor:
        """A float32 tensor that `new` has made for this pass alone: where it lies is looked up once. How much of it a
        function uses, the function compares itself."""
        self._made[id(x)] = x, span_of_new(x)
        return x

    def weights(self, x: Tensor | None) -> Span:
        """The memory of a parameter, which this call has compared, or of a part of one; nothing for None."""
        if x is None:
            return NOTHING
        known = self.found.known_span(x)
        return span(x, x.shape, self.torch_dtype) if known is None else known

    def norm(self, norm: nn.LayerNorm | nn.GroupNorm) -> tuple:
        """What a function takes of a norm."""
        return self.weights(norm.weight), self.weights(norm.bias), norm.eps, self.dtype

    def scratch(self, name: str, *shape: int) -> Tensor:
        """float32 of that shape, without values; the same memory for the same name and shape."""
        if (name, shape) not in self._scratch:
            self._scratch[name, shape] = self.made(new(shape, torch.float32))
        return self._scratch[name, shape]

    def packed(self, name: str, rows: int, k: int) -> Tensor:
        """A scratch buffer for rows of k, packed for a product."""
        return self.scratch(f"packed {name}", self.packed_size(rows, k))

    def packed_size(self, rows: int, k: int) -> int:
        """Floats that rows of k take, packed."""
        return self.library.packed_floats(rows, k, self.pairs)

    def multiply(self, rows: int, *products: tuple, add: bool = False) -> None:
        """y = x W, or y += x W, for each (x packed, a Linear or a `Transposed`, y `[rows,n]`); all at once."""
        wanted = (abi.Product * len(products))()
        for p, (x, layer, y) in zip(wanted, products, strict=True):
            transposed = isinstance(layer, Transposed)
            k, n = layer.weight.shape if transposed else layer.weight.shape[::-1]
            if isinstance(layer, PackedLinear):
                matrix, scales, *zeros = (self.weights(part) for part in layer.buffers_of_parts())
                p.w_dtype, p.scales, p.scales_bytes = abi.QUANTISED[layer.kind], scales.data, scales.bytes
                if zeros:
                    p.zeros, p.zeros_bytes = zeros[0].data, zeros[0].bytes
                p.integers = integer_path(self.library) if layer.rounds_activations(self.tokens) else 0
            else:
                matrix, p.w_dtype = self.weights(layer.weight), abi.DTYPES[layer.weight.dtype]
            packed = self.floats(x)
            out = self._strided(y, (rows, n), (torch.float32, self.torch_dtype))
            p.x, p.w, p.y = packed.data, matrix.data, out.data
            p.x_bytes, p.w_bytes, p.y_bytes = packed.bytes, matrix.bytes, out.bytes
            p.rows, p.k, p.n = rows, k, n
            p.w_stride_n, p.w_stride_k = (1, n) if transposed else (k, 1)
            p.y_dtype, p.y_stride, p.add = abi.DTYPES[y.dtype], y.stride(0), add
        self.call("multiply_all", _of_array(wanted), len(products), self.pairs)

    def activate(self, rows: int, *inputs: tuple[str, Tensor, int]) -> list[Tensor]:
        """activation(y) packed, for each (name, y `[rows,k]`, activation)."""
        wanted, found = (abi.Packing * len(inputs))(), []
        for one, (name, y, activation) in zip(wanted, inputs, strict=True):
            found.append(self.packed(name, rows, y.shape[1]))
            given, packed = self._strided(y, (rows, y.shape[1]), torch.float32), self.floats(found[-1])
            one.y, one.y_bytes, one.packed, one.packed_bytes = given.data, given.bytes, packed.data, packed.bytes
            one.stride, one.k, one.activation = y.stride(0), y.shape[1], activation
        self.call("activate", _of_array(wanted), len(inputs), rows, self.pairs)
        return found

    def _strided(self, x: Tensor, shape: tuple[int, int], dtypes: torch.dtype | Collection[torch.dtype]) -> Span:
        """The memory of rows that may lie apart."""
        made = self._made.get(id(x))
        return made[1] if made else strided_span(x, shape, dtypes)

    # ------------------------------------------------------------------ parts of layers

    def mix_in(
        self,
        ln: nn.LayerNorm,
        x: Tensor,
        shape: torch.Size,
        shift: Tensor,
        mu: Sequence[Tensor],
        names: str,
        of_present: bool = False,
        extra: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The mixtures of a token and the one before, packed, and the new shift."""
        (B, T), (rows, C) = shape, x.shape
        shift, after = shift.contiguous(), new((B, C), self.torch_dtype)
        packed = [self.packed(name, rows, C) for name in names]
        shares = (Span * len(mu))(*(self.weights(one) for one in mu))
        outputs = (Span * len(packed))(*(self.floats(one) for one in packed))
        self.call(
            *("mix_in", self.floats(x, rows, C), *self.norm(ln), rows, T, C),
            *(span(shift, (B, C), self.torch_dtype), span_of_new(after)),
            *(len(mu), _of_array(shares), int(of_present)),
            *(self.floats(extra, len(mu), rows, C), _of_array(outputs), self.pairs),
        )
        return packed, after

    def heads_out(
        self,
        att: Any,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        silu: bool,
        bonus: Sequence[Tensor | None] = (None,) * 4,
    ) -> None:
        """The norm over the heads of y, the bonus and the gate, through the output matrix into x."""
        rows, A, y = len(x), att.n_head * att.head_size, y.contiguous()
        packed = self.packed("out", rows, A)
        weight, bias, eps, dtype = self.norm(att.ln_x)
        r, k, v, r_k = bonus
        self.call(
            *("heads_out", self.floats(y.view(rows, A), rows, A), weight, bias, eps),
            *(*(self.floats(z, rows, A) for z in (r, k, v)), self.weights(r_k), self.floats(gate, rows, A)),
            *(int(silu), dtype, rows, att.n_head, att.head_size, self.floats(packed), self.pairs),
        )
        self.multiply(rows, (packed, att.output, x), add=True)

    # ------------------------------------------------------------------ the model

    def over(self, tokens: Tensor, x: Tensor, att: list[Tensor], ffn: list[Tensor], wkv: list[Tensor]) -> None:
        """Fill x `[B*T,C]` from tokens `[B,T]`; the lists of states, one entry per layer, are brought up to date."""
        model, form, v_first = self.model, compiled_form(self.model.layout), None
        (rows, C), shape, emb = x.shape, tokens.shape, model.emb.weight
        if isinstance(model.emb, PackedEmbedding):  # the rows that are read, once each
            emb, tokens = model.emb(tokens).reshape(rows, C).contiguous(), torch.arange(rows, device=tokens.device)
        self.call(
            *("embed", span(tokens, tokens.shape, torch.int64), self.weights(emb)),
            *(*self.norm(model.blocks[0].ln0), rows, len(emb), C, self.floats(x, rows, C)),
        )
        for layer, block in enumerate(model.blocks):
            att[layer], wkv[layer], v_first = form.time_mix(self, block, x, shape, att[layer], wkv[layer], v_first)
            ffn[layer] = form.channel_mix(self, block, x, shape, ffn[layer])


def _of_array(array: ctypes.Array) -> Span:
    """The memory of an array made here, which has to be kept until the call is over."""
    return Span(ctypes.addressof(array), ctypes.sizeof(array))
