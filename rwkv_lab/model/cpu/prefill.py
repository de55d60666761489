"""The parallel pass over many tokens on a CPU, without gradients: as `Block.forward` says it, in few compiled passes.

The plain torch form in rwkv4.py to rwkv7.py stays the definition. Here everything between two matrix products is
float32, the residual stream too, so that float16 needs no rescaling; what products read is rounded to bfloat16 where
the model is bfloat16 and the processor multiplies pairs of it. Products take the weights as they lie: no copy is kept.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import nn

from rwkv_lab.errors import KernelError
from rwkv_lab.model.cpu import abi
from rwkv_lab.model.plain import is_plain, nobody_interferes
from rwkv_lab.model.state import RWKVState
from rwkv_lab.wkv import wkv4, wkv5, wkv6, wkv7
from rwkv_lab.wkv.choice import chosen_backend
from rwkv_lab.wkv.cpu import library_on_torch_threads

_BLOCK = 512  # rows (batch times tokens) at once: enough to pay for reading a layer's weights, few enough for the cache


def is_possible(model: nn.Module, state: RWKVState | None = None) -> bool:
    """Whether `run` (from this state) and `logits` give what the torch form gives.

    Not where gradients, or what `plain` names, are in the way.
    """
    weight = model.emb.weight
    if weight.device.type != "cpu" or chosen_backend() not in ("auto", "cpu"):
        return False
    if weight.dtype not in abi.DTYPES or not nobody_interferes():
        return False
    grad = torch.is_grad_enabled()
    if grad and state is not None and any(part.requires_grad for part in state.tensors().values()):
        return False
    if not all(_fits(module, weight.dtype, grad) for module in model.modules()):
        return False
    try:
        return _library() is not None
    except KernelError:
        return False


def _fits(module: nn.Module, dtype: torch.dtype, grad: bool) -> bool:
    return is_plain(module) and all(
        p is None
        or p.device.type == "cpu"
        and p.is_contiguous()
        and not (grad and p.requires_grad)
        and (p.dtype == dtype or name == "time_state")
        for name, p in module._parameters.items()
    )


@torch.no_grad()
def run(model: nn.Module, tokens: torch.Tensor, state: RWKVState) -> tuple[torch.Tensor, RWKVState]:
    """tokens `[B,T]` -> x `[B,T,C]` float32 before ln_out, and the new state."""
    B, T = tokens.shape
    one_pass = _Pass(model)
    per_pass = max(1, _BLOCK // B)
    x = torch.empty(B, T, model.layout.n_embd)
    # [L][B,...] each: what goes from one run of tokens to the next
    att, ffn, wkv = (list(part.unbind(1)) for part in (state.att_shift, state.ffn_shift, state.wkv))
    for start in range(0, T, per_pass):
        piece, rows = tokens[:, start : start + per_pass].long(), x[:, start : start + per_pass]
        if rows.is_contiguous():
            one_pass.over(piece.contiguous(), rows.flatten(0, 1), att, ffn, wkv)
        else:
            own = one_pass.room("x", piece.numel(), x.shape[2])
            one_pass.over(piece.contiguous(), own, att, ffn, wkv)
            rows.copy_(own.view(rows.shape))
    return x, RWKVState(*(torch.stack(parts, 1) for parts in (wkv, att, ffn)), state.version)


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x `[...,C]` before ln_out -> logits `[...,V]` in the model's dtype."""
    C, V = x.shape[-1], model.layout.vocab_size
    flat, out = x.reshape(-1, C), model.emb.weight.new_empty(*x.shape[:-1], V)
    one_pass = _Pass(model)
    for rows, y in zip(flat.split(_BLOCK), out.view(-1, V).split(_BLOCK), strict=True):
        rows = rows.float().contiguous()
        laid = one_pass.laid("head", len(rows), C)
        one_pass.call("norm_out", rows, *one_pass.norm(model.ln_out), len(rows), C, laid, one_pass.pairs)
        one_pass.multiply(len(rows), (laid, model.head.weight, y))
    return out


@dataclass
class _Into:
    """A matrix `[k,n]`, k being what is multiplied: RWKV's low-rank halves lie so, Linear's weights as `[n,k]`."""

    weight: torch.Tensor


class _Pass:
    """What the layers of one call share: library, threads, and room that is used again from layer to layer."""

    def __init__(self, model):
        self.model, self.library, self.threads = model, _library(), torch.get_num_threads()
        self.version, self.dtype = model.layout.version, abi.DTYPES[model.emb.weight.dtype]
        self.pairs = int(model.emb.weight.dtype == torch.bfloat16 and self.library.has_pairs())
        self._room: dict[tuple, torch.Tensor] = {}

    # ------------------------------------------------------------------ calling

    def call(self, name: str, *arguments) -> None:
        """A function of the library; its last argument is the number of threads."""
        getattr(self.library, name)(*(_c(a) for a in arguments), ctypes.c_int64(self.threads))

    def norm(self, norm: nn.LayerNorm | nn.GroupNorm) -> tuple:
        return norm.weight, norm.bias, norm.eps, self.dtype

    def room(self, name: str, *shape: int) -> torch.Tensor:
        """float32 of that shape, without values; the same memory for the same name and shape."""
        if (name, shape) not in self._room:
            self._room[name, shape] = torch.empty(shape)
        return self._room[name, shape]

    def laid(self, name: str, rows: int, k: int) -> torch.Tensor:
        """Room for rows of k laid out for a product."""
        size = (ctypes.c_int64(z) for z in (rows, k, self.pairs))
        return self.room(f"laid {name}", self.library.laid_floats(*size))

    def multiply(self, rows: int, *products, add: bool = False) -> None:
        """y = x W, or y += x W, for each (x laid out, W, y `[rows,n]`); all at once."""
        wanted = (abi.Product * len(products))()
        for p, (x, weight, y) in zip(wanted, products, strict=True):
            into = isinstance(weight, _Into)
            weight = weight.weight if into else weight
            k, n = weight.shape if into else weight.shape[::-1]
            p.x, p.w, p.y = x.data_ptr(), weight.data_ptr(), y.data_ptr()
            p.rows, p.k, p.n, p.w_dtype = rows, k, n, abi.DTYPES[weight.dtype]
            p.w_along_n, p.w_along_k = (1, n) if into else (k, 1)
            p.y_dtype, p.y_apart, p.add = abi.DTYPES[y.dtype], y.stride(0), add
        self.call("multiply_all", wanted, len(products), self.pairs)

    def activate(self, rows: int, *layings) -> list[torch.Tensor]:
        """activation(y) laid out, for each (name, y `[rows,k]`, activation)."""
        wanted, found = (abi.Laying * len(layings))(), []
        for one, (name, y, activation) in zip(wanted, layings, strict=True):
            found.append(self.laid(name, rows, y.shape[1]))
            one.y, one.laid = y.data_ptr(), found[-1].data_ptr()
            one.apart, one.k, one.activation = y.stride(0), y.shape[1], activation
        self.call("activate", wanted, len(layings), rows, self.pairs)
        return found

    # ------------------------------------------------------------------ the layers

    def over(self, tokens, x, att, ffn, wkv) -> None:
        """Fill x `[B*T,C]` from tokens `[B,T]`; the lists of states, one entry per layer, are brought up to date."""
        model, v_first = self.model, None
        self.call("embed", tokens, model.emb.weight, *self.norm(model.blocks[0].ln0), *x.shape, x)
        time_mix = {"4": self._time_mix4, "5": self._time_mix5, "6": self._time_mix6, "7": self._time_mix7}[
            self.version[0]
        ]
        for layer, block in enumerate(model.blocks):
            att[layer], wkv[layer], v_first = time_mix(block, x, tokens.shape, att[layer], wkv[layer], v_first)
            ffn[layer] = self._channel_mix(block, x, tokens.shape, ffn[layer])

    def _mix_in(self, ln, x, shape, shift, mu, names, of_present=False, extra=None):
        """The mixtures of a token and the one before, laid out, and the new shift."""
        (B, T), (rows, C) = shape, x.shape
        shift, new = shift.contiguous(), shift.new_empty(B, C)
        laid = [self.laid(name, rows, C) for name in names]
        self.call(
            *("mix_in", x, *self.norm(ln), rows, T, C, shift, new, len(mu), _pointers(mu)),
            *(int(of_present), extra, _pointers(laid), self.pairs),
        )
        return laid, new

    def _time_mix7(self, block, x, shape, shift, S, v_first):
        att, rows = block.att, len(x)
        H, N = att.n_head, att.head_size
        A, heads = H * N, (*shape, H, N)
        mu = (att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g)
        (xr, xw, xk, xv, xa, xg), shift = self._mix_in(block.ln1, x, shape, shift, mu, "rwkvag")
        # Layer 0's values are read by all others, so they stay where no other layer's go.
        r, k, w, a, g, read = (self.room(z, rows, A) for z in ("r", "k", "w", "a", "g", "read"))
        first = v_first is None
        v = self.room("v_first" if first else "v", rows, A)
        low = {z: getattr(att, f"{z}1") for z in ("wag" if first else "wagv")}
        hidden = {z: self.room(f"hidden {z}", rows, weight.shape[1]) for z, weight in low.items()}
        inputs = {"w": xw, "a": xa, "g": xg, "v": xv}
        self.multiply(
            *(rows, (xr, att.receptance.weight, r), (xk, att.key.weight, k), (xv, att.value.weight, v)),
            *((inputs[z], _Into(weight), hidden[z]) for z, weight in low.items()),
        )
        activation = {"w": abi.TANH, "a": abi.NONE, "g": abi.SIGMOID, "v": abi.NONE}
        laid = self.activate(rows, *((f"hidden {z}", hidden[z], activation[z]) for z in low))
        vx = None if first else self.room("vx", rows, A)
        outputs = {"w": w, "a": a, "g": g, "v": vx}
        self.multiply(
            rows, *((one, _Into(getattr(att, f"{z}2")), outputs[z]) for z, one in zip(low, laid, strict=True))
        )
        self.call(
            *("gates7", k, v, w, a, vx, v_first, read, att.w0, att.a0, None if first else att.v0, att.k_k, att.k_a),
            *(self.dtype, rows, H, N),
        )
        y, S = wkv7(*(z.view(heads) for z in (r, w, k, v, read, a)), S)
        self._heads_out(att, x, y, g, False, (r, k, v, att.r_k))
        return shift, S, v if first else v_first

    def _time_mix6(self, block, x, shape, shift, S, v_first):
        att, (rows, C) = block.att, x.shape
        A, heads = att.n_head * att.head_size, (*shape, att.n_head, att.head_size)
        (one,), _ = self._mix_in(block.ln1, x, shape, shift, [att.time_maa_x], "x")
        low = self.room("low", rows, att.time_maa_w1.shape[1])
        self.multiply(rows, (one, _Into(att.time_maa_w1), low))
        parts = zip("wkvrg", low.view(rows, 5, -1).unbind(1), strict=True)
        laid = self.activate(rows, *((f"low {z}", part, abi.TANH) for z, part in parts))
        extra = self.room("extra", 5, rows, C)
        self.multiply(rows, *zip(laid, map(_Into, att.time_maa_w2), extra, strict=True))
        mu = [getattr(att, f"time_maa_{z}") for z in "wkvrg"]
        (xw, xk, xv, xr, xg), shift = self._mix_in(block.ln1, x, shape, shift, mu, "wkvrg", extra=extra)
        r, k, v, g, w = (self.room(z, rows, A) for z in "rkvgw")
        low = self.room("decay", rows, att.time_decay_w1.shape[1])
        self.multiply(
            *(rows, (xr, att.receptance.weight, r), (xk, att.key.weight, k), (xv, att.value.weight, v)),
            *((xg, att.gate.weight, g), (xw, _Into(att.time_decay_w1), low)),
        )
        (low,) = self.activate(rows, ("decay", low, abi.TANH))
        self.multiply(rows, (low, _Into(att.time_decay_w2), w))
        self.call("decays6", w, att.time_decay, self.dtype, rows, A)
        y, S = wkv6(*(z.view(heads) for z in (r, w, k, v)), att.time_faaaa, S)
        self._heads_out(att, x, y, g, True)
        return shift, S, v_first

    def _time_mix5(self, block, x, shape, shift, S, v_first):
        att, rows = block.att, len(x)
        A, heads = att.n_head * att.head_size, (*shape, att.n_head, att.head_size)
        names = "kvrg" if att.gated else "kvr"
        mu = [getattr(att, f"time_mix_{z}") for z in names]
        laid, shift = self._mix_in(block.ln1, x, shape, shift, mu, names, of_present=True)
        weights = {"k": att.key, "v": att.value, "r": att.receptance} | ({"g": att.gate} if att.gated else {})
        out = {z: self.room(z, rows, A) for z in names}
        self.multiply(rows, *((one, weights[z].weight, out[z]) for z, one in zip(names, laid, strict=True)))
        log_decay, bonus = att.decay_and_bonus(torch.float32)
        y, S = wkv5(out["r"].view(heads), log_decay, out["k"].view(heads), out["v"].view(heads), bonus, S)
        self._heads_out(att, x, y, out.get("g"), True)
        return shift, S, v_first

    def _time_mix4(self, block, x, shape, shift, S, v_first):
        att, rows, A = block.att, len(x), len(block.att.time_decay)
        mu = (att.time_mix_k, att.time_mix_v, att.time_mix_r)
        (xk, xv, xr), shift = self._mix_in(block.ln1, x, shape, shift, mu, "kvr", of_present=True)
        k, v, r = (self.room(z, rows, A) for z in "kvr")
        self.multiply(rows, (xk, att.key.weight, k), (xv, att.value.weight, v), (xr, att.receptance.weight, r))
        y, S = wkv4(-torch.exp(att.time_decay.float()), att.time_first, k.view(*shape, A), v.view(*shape, A), S)
        laid = self.laid("out", rows, A)
        self.call("gate4", r, y.contiguous(), rows, A, laid, self.pairs)
        self.multiply(rows, (laid, att.output.weight, x), add=True)
        return shift, S, v_first

    def _heads_out(self, att, x, y, gate, silu, bonus=(None, None, None, None)):
        """The norm over the heads of y, the bonus and the gate, through the output matrix into x."""
        rows, A = len(x), att.n_head * att.head_size
        laid = self.laid("out", rows, A)
        weight, bias, eps, dtype = self.norm(att.ln_x)
        self.call(
            *("heads_out", y.contiguous(), weight, bias, eps, *bonus, gate, int(silu), dtype, rows),
            *(att.n_head, att.head_size, laid, self.pairs),
        )
        self.multiply(rows, (laid, att.output.weight, x), add=True)

    def _channel_mix(self, block, x, shape, shift):
        ffn, (rows, C) = block.ffn, x.shape
        gated = self.version != "7.0"
        kind = {"4": "time_mix_", "5": "time_mix_", "6": "time_maa_", "7": "x_"}[self.version[0]]
        mu = [getattr(ffn, kind + z) for z in ("kr" if gated else "k")]
        (xk, *xr), shift = self._mix_in(
            block.ln2, x, shape, shift, mu, ("k", "r")[: len(mu)], of_present=kind == "time_mix_"
        )
        hidden = self.room("ffn", rows, ffn.key.weight.shape[0])
        if not gated:
            self.multiply(rows, (xk, ffn.key.weight, hidden))
        else:
            r, y = self.room("ffn r", rows, C), self.room("ffn y", rows, C)
            self.multiply(rows, (xk, ffn.key.weight, hidden), (xr[0], ffn.receptance.weight, r))
        (laid,) = self.activate(rows, ("ffn", hidden, abi.RELU_SQUARE))
        if not gated:
            self.multiply(rows, (laid, ffn.value.weight, x), add=True)
        else:
            self.multiply(rows, (laid, ffn.value.weight, y))
            self.call("add_gated", x, r, y, rows, C)
        return shift


# ---------------------------------------------------------------------- the library


def _library() -> ctypes.CDLL:
    library = library_on_torch_threads("mix")
    library.has_pairs.restype = library.laid_floats.restype = ctypes.c_int64
    return library


def _pointers(tensors) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _c(argument):
    """A Python value as C has it: tensors and None are pointers."""
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
