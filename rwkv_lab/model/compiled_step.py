"""One token through a whole model as one compiled call: `kernels/cpu/step*.cpp`, with weights used where they lie.

`compiled_step` says whether a call can go that way. It can where the answer is the same and nobody looks inside: on
the CPU, without gradients, hooks, watchers or autocast, in float32, bfloat16 or float16, and with the modules that this
package makes. Otherwise the torch modules run, as they do with `use_backend("reference")` or "chunked".
"""

import ctypes
import logging
import operator
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rwkv_lab.errors import KernelError
from rwkv_lab.model.block import RESCALE_EVERY
from rwkv_lab.model.recycled import Memory
from rwkv_lab.model.state import RWKVState, check_state, state_shapes
from rwkv_lab.model.weight_only import PackedEmbedding, PackedLinear
from rwkv_lab.wkv.choice import chosen_backend
from rwkv_lab.wkv.loader import cpu_library

log = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PACKED = {8: 3, 4: 4}  # bits -> format

# Per layer, in the order that the C++ source has; "w1" and the like lie as [in,out].
_SEVEN = (
    "ln1 ln2 att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g att.w0 att.w1 att.w2 att.a0 att.a1 att.a2 att.v0 att.v1 "
    "att.v2 att.g1 att.g2 att.k_k att.k_a att.r_k att.receptance att.key att.value att.output att.ln_x "
    "ffn.x_k ffn.key ffn.value"
).split()
_FOUR = (
    "ln1 ln2 att.time_decay att.time_first att.time_mix_k att.time_mix_v att.time_mix_r att.key att.value "
    "att.receptance att.output ffn.time_mix_k ffn.time_mix_r ffn.key ffn.receptance ffn.value"
).split()
_FIVE = (
    "ln1 ln2 att.time_faaaa att.time_first att.time_decay att.receptance att.key att.value att.gate att.output "
    "att.ln_x "
    "ffn.time_mix_k ffn.time_mix_r ffn.key ffn.receptance ffn.value "
    "att.time_mix_k att.time_mix_v att.time_mix_r att.time_mix_g"
).split()
_SIX = (
    "ln1 ln2 att.time_faaaa att.time_first att.time_decay att.receptance att.key att.value att.gate att.output "
    "att.ln_x "
    "ffn.time_maa_k ffn.time_maa_r ffn.key ffn.receptance ffn.value "
    "att.time_maa_x att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_r att.time_maa_g "
    "att.time_maa_w1 att.time_maa_w2 att.time_decay_w1 att.time_decay_w2"
).split()
_SOURCES = {
    "4.0": ("step4", _FOUR),
    "5.0": ("step56", _FIVE),
    "5.1": ("step56", _FIVE),
    "5.2": ("step56", _FIVE),
    "6.0": ("step56", _SIX),
    "7.0": ("step7", _SEVEN),
}
_TURNED = {f"att.{x}{i}" for x in (*"wavg", "time_maa_w", "time_decay_w") for i in "12"}
_IDLE = {"att.v0", "att.v1", "att.v2"}  # of the first layer
_MISSING = {"att.time_first", "att.time_faaaa", "att.gate", "att.time_mix_g"}  # not in every model of RWKV-5 and 6


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("turned", ctypes.c_int32),
    ]


_NOTHING = _Tensor(None, None, 0, 0, 0, 1)


class _Model(ctypes.Structure):
    _fields_ = [
        ("tensors", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("dtype", "L", "C", "A", "F", "V", "H", "N")),
        ("norm_eps", ctypes.c_float),
        ("head_norm_eps", ctypes.c_float),
        ("generation", ctypes.c_int32),
        ("rescale", ctypes.c_int32),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("B", ctypes.c_int64),
        ("wkv", ctypes.c_void_p),
        ("wkv_strides", ctypes.c_int64 * 5),
        ("att_shift", ctypes.c_void_p),
        ("ffn_shift", ctypes.c_void_p),
        ("att_strides", ctypes.c_int64 * 2),
        ("ffn_strides", ctypes.c_int64 * 2),
        ("new_wkv", ctypes.c_void_p),
        ("new_att_shift", ctypes.c_void_p),
        ("new_ffn_shift", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


_address = torch.Tensor.data_ptr


class _Unfit(Exception):
    """This model cannot run here; the torch modules can."""


class _Table:
    """Where a model's tensors lie, and how to notice that they moved.

    Nothing is computed from the weights in advance, so values may change in place at any time.
    """

    def __init__(self, model):
        self.source, names = _SOURCES[model.layout.version]
        self.dtype = model.ln_out.weight.dtype
        self.modules = [model.emb, model.blocks[0].ln0, model.ln_out, model.head]
        rows = []
        for module in self.modules:
            rows += self._of_module(module)
        for block in model.blocks:
            self.modules += [block, block.att, block.ffn]
            for name in names:
                owner, _, last = name.rpartition(".")
                owner = getattr(block, owner) if owner else block
                if last in owner._modules:
                    self.modules.append(owner._modules[last])
                    rows += self._of_module(owner._modules[last])
                else:
                    idle = name in _IDLE and block is model.blocks[0]
                    missing = name in _MISSING and last not in owner._parameters
                    turned = name in _TURNED
                    rows.append(_NOTHING if idle or missing else self._of_parameter(owner, last, turned))
        self.owners = [d for m in self.modules for d in (m._parameters, m._buffers) if d]
        self.trees = [m._modules for m in (model, model.blocks, *self.modules) if m._modules]
        self.grown = [m for d in self.trees for m in d.values()]
        self.hooks = [d for m in self.modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.watched = [m for m in self.modules if hasattr(m, "watchers")]
        self.lent = [x for d in self.owners for x in d.values()]  # kept alive, so that no address is used again
        self.there = [x for x in self.lent if x is not None]
        self.addresses = list(map(_address, self.there))
        self.memory = [x.untyped_storage() for x in self.there]  # kept: a step may run on it
        self.large = sum(x.nbytes for x in self.there) > _CACHED
        self.used = False  # of a large model's table: from then on `_run` looks whether it holds, while it computes
        self.rows = (_Tensor * len(rows))(*rows)
        layout, ln_x = model.layout, getattr(model.blocks[0].att, "ln_x", None)
        self.model = _Model(
            ctypes.addressof(self.rows),
            *(_DTYPES[self.dtype], layout.n_layer, layout.n_embd, layout.dim_att, layout.dim_ffn, layout.vocab_size),
            *(layout.n_head, layout.head_size, model.ln_out.eps, 0.0 if ln_x is None else ln_x.eps),
            int(layout.version[0]),
            RESCALE_EVERY if self.dtype == torch.float16 and layout.version != "7.0" else 0,
        )

    def _of_module(self, module) -> list[_Tensor]:
        if type(module) in (nn.Linear, nn.Embedding) and module._parameters.get("bias") is None:
            return [self._of_parameter(module, "weight")]
        if type(module) in (nn.LayerNorm, nn.GroupNorm):
            return [self._of_parameter(module, "weight"), self._of_parameter(module, "bias")]
        if type(module) in (PackedLinear, PackedEmbedding):
            codes, scales = module.codes.data_ptr(), module.scales.data_ptr()
            return [_Tensor(codes, scales, _PACKED[module.bits], module.rows, module.columns, 0)]
        raise _Unfit

    def _of_parameter(self, owner, name, turned=False) -> _Tensor:
        x = owner._parameters.get(name)
        if type(x) is not nn.Parameter or not x.is_contiguous() or x.dtype != self.dtype or x.device.type != "cpu":
            raise _Unfit
        rows, columns = (x.shape[:-1].numel(), x.shape[-1]) if turned or x.ndim == 2 else (1, x.numel())
        return _Tensor(x.data_ptr(), None, _DTYPES[x.dtype], rows, columns, int(turned))

    def still_there(self) -> bool:
        """Whether every module and tensor is the one that it was, and every tensor at the address where it was."""
        # Some hundred tensors are looked at for every token: `map` over C functions takes a third of a loop's time.
        for dictionaries, known in ((self.trees, self.grown), (self.owners, self.lent)):
            now = [x for d in dictionaries for x in d.values()]
            if len(now) != len(known) or not all(map(operator.is_, now, known)):
                return False
        return list(map(_address, self.there)) == self.addresses

    def undisturbed(self) -> bool:
        """Whether nobody watches the modules or has hooked into them."""
        return not any(self.hooks) and not any([m.watchers for m in self.watched])

    def holds(self) -> bool:
        """Whether this table may be used for a step."""
        return self.still_there() and self.undisturbed()


_tables: WeakKeyDictionary[nn.Module, _Table] = WeakKeyDictionary()

# Bytes of weights that throw everything else out of the caches when they are read. After such a token it takes half a
# millisecond to look at all tensors again, so that a second thread does it while the next token is computed.
_CACHED = 1 << 24
_looker = ThreadPoolExecutor(1, "rwkv_lab looks at weights")


def _after_fork() -> None:
    global _looker
    _looker = ThreadPoolExecutor(1, "rwkv_lab looks at weights")  # the thread of the other is gone


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def compiled_step(model, tokens, state: RWKVState | None) -> Callable | None:
    """What takes these tokens `[B,T]` through the model one by one, where it can: a function `(tokens, state)` that
    returns logits `[B,T,V]` and the new state, and raises ParameterError for a state that does not fit.

    Raises:
        KernelError: the step cannot be compiled, and `use_backend("cpu")` demands it.
    """
    backend = chosen_backend()
    if backend not in ("auto", "cpu") or model.layout.version not in _SOURCES or type(tokens) is not torch.Tensor:
        return None
    weight = model.ln_out.weight
    if weight.dtype not in _DTYPES or weight.device.type != "cpu":
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return None
    table = _table(model)
    if table is None or not (table.used or table.undisturbed()):
        return None
    table.used = table.large
    if torch.is_grad_enabled():
        given = () if state is None else state.tensors().values()
        if any([x.requires_grad for x in (*table.there, *given)]):
            return None
    try:
        library = cpu_library(table.source)
    except KernelError as error:
        if backend == "cpu":
            raise
        if table.source not in _told:
            _told.add(table.source)
            log.warning("Tokens go through torch one by one: %s", error)
        return None
    return partial(_run, model, table, library.step)


_told: set[str] = set()  # sources of which somebody has been told that they do not compile


def _table(model) -> _Table | None:
    table = _tables.get(model)
    if table is None or not (table.used or table.still_there()):
        _tables.pop(model, None)
        try:
            table = _tables[model] = _Table(model)
        except _Unfit:
            return None
    return table


class _FreshState(RWKVState):
    """The state that a step has made: its tensors come to be when somebody asks for one, and then it is an RWKVState
    like any other. Most are never looked at, but go straight into the next step, to which addresses are enough; a torch
    operator takes 30 microseconds when a token's weights have just gone through the caches."""

    def __init__(self, memory: Memory, made_for: tuple, version: str):
        self.__dict__.update(memory=memory, made_for=made_for, version=version)

    def __getattr__(self, name: str):
        if name not in ("wkv", "att_shift", "ffn_shift"):
            raise AttributeError(name)
        wkv, att, ffn = self.memory.tensors()
        # Key-major is how the kernel holds it: [B,L,H,K,V] in memory.
        found = {"wkv": wkv.transpose(-1, -2) if wkv.ndim == 5 else wkv, "att_shift": att, "ffn_shift": ffn}
        self.__dict__.update(found)
        del self.__dict__["memory"], self.__dict__["made_for"]
        object.__setattr__(self, "__class__", RWKVState)
        return found[name]

    def __reduce__(self):  # for copies and files
        return RWKVState, (self.wkv, self.att_shift, self.ffn_shift, self.version)


@torch.no_grad()
def _run(model, table: _Table, step, tokens, state: RWKVState | None) -> tuple[torch.Tensor, RWKVState]:
    layout, dtype, (B, T) = model.layout, table.dtype, tokens.shape
    made_for = (layout, B, dtype)
    if state is None:
        state = model.create_state(B)
    elif type(state) is not _FreshState or state.made_for != made_for:
        check_state(state, layout, B, dtype, tokens.device)
    given, holds = state, _looker.submit(table.holds) if table.used else None
    if tokens.dtype != torch.int64:
        tokens = tokens.to(torch.int64)
    shape, shifts = (B, *state_shapes(layout)["wkv"]), (B, layout.n_layer, layout.n_embd)
    logits = []
    for t in range(T):
        column = tokens if T == 1 and tokens.is_contiguous() else tokens[:, t].contiguous()
        if type(state) is _FreshState:
            before = state.memory
            where = _addresses(before, shape, shifts)
        else:
            before = state.wkv.float(), _rows(state.att_shift, dtype), _rows(state.ffn_shift, dtype)
            where = _addresses_of_tensors(*before)
        memory = Memory((shape, torch.float32), (shifts, dtype), (shifts, dtype))
        answer = Memory(((B, layout.vocab_size), dtype))
        new = (memory.address + offset for offset in memory.offsets)
        call = _Call(column.data_ptr(), B, *where, *new, answer.address, torch.get_num_threads())
        step(ctypes.byref(table.model), ctypes.byref(call))
        logits += answer.tensors()
        state = _FreshState(memory, made_for, layout.version)
    if holds and not holds.result():
        # Weights were exchanged, or somebody wants to look inside: what was computed is not the answer.
        _tables.pop(model, None)
        return model.forward(tokens, given)
    return logits[0].unsqueeze(1) if len(logits) == 1 else torch.stack(logits, 1), state


def _addresses(memory: Memory, shape: tuple[int, ...], shifts: tuple[int, ...]) -> tuple:
    """What `_Call` says about a state that a step has made: addresses, and strides of logical dimensions."""
    wkv, att, ffn = (memory.address + offset for offset in memory.offsets)
    if len(shape) == 5:
        _, L, H, N, _ = shape
        strides = (L * H * N * N, H * N * N, N * N, 1, N)
    else:
        _, L, parts, A = shape
        strides = (L * parts * A, parts * A, A, 1, 0)
    rows = (shifts[1] * shifts[2], shifts[2])
    return wkv, strides, att, ffn, rows, rows


def _addresses_of_tensors(wkv, att, ffn) -> tuple:
    strides = wkv.stride() if wkv.ndim == 5 else (*wkv.stride(), 0)
    return wkv.data_ptr(), strides, att.data_ptr(), ffn.data_ptr(), att.stride()[:2], ffn.stride()[:2]


def _rows(x, dtype):
    """A shift whose numbers lie side by side, in the model's dtype."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()
