"""One token through a whole model as one compiled call: `kernels/cpu/step*.cpp`, with weights used where they lie.

`compiled_step` says whether a call can go that way. It can where the answer is the same and nobody looks inside: on
the CPU, without gradients or anything that `plain` names, in float32, bfloat16 or float16, and with the modules that
this package makes. Otherwise the torch modules run, as they do with `use_backend("reference")` or "chunked".
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
from rwkv_lab.model.cpu import abi
from rwkv_lab.model.cpu.buffer_pool import Memory
from rwkv_lab.model.plain import is_plain, nobody_interferes
from rwkv_lab.model.state import RWKVState, check_state, state_shapes
from rwkv_lab.model.weight_only import PackedEmbedding, PackedLinear
from rwkv_lab.wkv.choice import chosen_backend
from rwkv_lab.wkv.loader import cpu_library

log = logging.getLogger(__name__)

_PACKED_MODULES = (PackedLinear, PackedEmbedding)

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


_NOTHING = abi.Tensor(None, None, 0, 0, 0, 1)


_address, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.is_contiguous


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
        self.modules += [model, model.blocks]
        if not all(type(m) in _PACKED_MODULES or is_plain(m) for m in self.modules):
            raise _Unfit
        self.trees = [m._modules for m in self.modules if m._modules]
        self.grown = [m for d in self.trees for m in d.values()]
        self.types, self.inside = list(map(type, self.modules)), list(map(vars, self.modules))
        self.options = [d for d in self.inside if "eps" in d or "max_norm" in d]
        self.opted = self._options()
        self.hooks = [d for m in self.modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.watched = [m for m in self.modules if hasattr(m, "watchers")]
        self.lent = [x for d in self.owners for x in d.values()]  # kept alive, so that no address is used again
        self.there = [x for x in self.lent if x is not None]
        self.addresses = list(map(_address, self.there))
        self.memory = [x.untyped_storage() for x in self.there]  # kept: a step may run on it
        self.large = sum(x.nbytes for x in self.there) > _CACHED
        self.used = False  # of a large model's table: from then on `_run` looks whether it holds, while it computes
        self.rows = (abi.Tensor * len(rows))(*rows)
        layout, norm_eps, head_norm_eps = model.layout, self._eps(nn.LayerNorm), self._eps(nn.GroupNorm)
        self.model = abi.Model(
            ctypes.addressof(self.rows),
            *(abi.DTYPES[self.dtype], layout.n_layer, layout.n_embd, layout.dim_att, layout.dim_ffn, layout.vocab_size),
            *(layout.n_head, layout.head_size, norm_eps, head_norm_eps),
            int(layout.version[0]),
            RESCALE_EVERY if self.dtype == torch.float16 and layout.version != "7.0" else 0,
        )

    def _of_module(self, module) -> list[abi.Tensor]:
        if type(module) in (nn.Linear, nn.Embedding):
            return [self._of_parameter(module, "weight")]
        if type(module) in (nn.LayerNorm, nn.GroupNorm):
            return [self._of_parameter(module, "weight"), self._of_parameter(module, "bias")]
        if type(module) in _PACKED_MODULES:
            codes, scales = module.codes.data_ptr(), module.scales.data_ptr()
            return [abi.Tensor(codes, scales, abi.PACKED_FORMATS[module.bits], module.rows, module.columns, 0)]
        raise _Unfit

    def _of_parameter(self, owner, name, turned=False) -> abi.Tensor:
        x = owner._parameters.get(name)
        if type(x) is not nn.Parameter or not x.is_contiguous() or x.dtype != self.dtype or x.device.type != "cpu":
            raise _Unfit
        rows, columns = (x.shape[:-1].numel(), x.shape[-1]) if turned or x.ndim == 2 else (1, x.numel())
        return abi.Tensor(x.data_ptr(), None, abi.DTYPES[x.dtype], rows, columns, int(turned))

    def _eps(self, kind: type[nn.Module]) -> float:
        """What all norms of that kind add to the variance; the C++ source knows one number."""
        found = {m.eps for m in self.modules if type(m) is kind} or {0.0}
        if len(found) > 1:
            raise _Unfit
        return found.pop()

    def _options(self) -> list:
        return [d.get("eps", d.get("max_norm")) for d in self.options]

    def still_there(self) -> bool:
        """Whether every module and tensor is the one that it was, and every tensor at the address where it was."""
        # Some hundred tensors are looked at for every token: `map` over C functions takes a third of a loop's time.
        for dictionaries, known in ((self.trees, self.grown), (self.owners, self.lent)):
            now = [x for d in dictionaries for x in d.values()]
            if len(now) != len(known) or not all(map(operator.is_, now, known)):
                return False
        return (
            list(map(_address, self.there)) == self.addresses
            and all(map(_is_contiguous, self.there))
            and list(map(type, self.modules)) == self.types
            and self._options() == self.opted
        )

    def undisturbed(self) -> bool:
        """Whether nobody watches the modules, has hooked into them or exchanged what they do."""
        return not (
            any(self.hooks) or any([m.watchers for m in self.watched]) or any(["forward" in d for d in self.inside])
        )

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
    if weight.dtype not in abi.DTYPES or weight.device.type != "cpu":
        return None
    if not nobody_interferes():
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
    return partial(_step, model, table, library.step)


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

    __class__ = property(lambda self: RWKVState)  # for all who ask but `type`

    def __getattr__(self, name: str):
        if name not in ("wkv", "att_shift", "ffn_shift"):
            raise AttributeError(name)
        inside = self.__dict__
        memory = inside.get("memory")
        if memory is not None:  # else another thread has just made them
            wkv, att, ffn = memory.tensors()
            # Key-major is how the kernel holds it: [B,L,H,K,V] in memory.
            inside.setdefault("wkv", wkv.transpose(-1, -2) if wkv.ndim == 5 else wkv)
            inside.setdefault("att_shift", att)
            inside.setdefault("ffn_shift", ffn)
            inside.pop("memory", None)
        return inside[name]

    def __reduce__(self):  # for copies and files
        return RWKVState, (self.wkv, self.att_shift, self.ffn_shift, self.version)


def _fresh_state(memory: Memory, made_for: tuple, version: str) -> _FreshState:
    state = object.__new__(_FreshState)
    state.__dict__.update(memory=memory, made_for=made_for, version=version)
    return state


def _step(model, table: _Table, step, tokens, state: RWKVState | None) -> tuple[torch.Tensor, RWKVState]:
    """Logits `[B,T,V]` and the new state."""
    return _run(model, table, step, tokens, state) or model.forward(tokens, state)


@torch.no_grad()
def _run(model, table: _Table, step, tokens, state: RWKVState | None) -> tuple[torch.Tensor, RWKVState] | None:
    """As `_step`; None where weights were exchanged meanwhile, or somebody wants to look inside."""
    layout, dtype, (B, T) = model.layout, table.dtype, tokens.shape
    made_for = (layout, B, dtype)
    if state is None:
        state = model.create_state(B)
    elif type(state) is not _FreshState or state.made_for != made_for:
        check_state(state, layout, B, dtype, tokens.device)
    holds = _looker.submit(table.holds) if table.used else None
    if tokens.dtype != torch.int64:
        tokens = tokens.to(torch.int64)
    shape, shifts = (B, *state_shapes(layout)["wkv"]), (B, layout.n_layer, layout.n_embd)
    logits = []
    for t in range(T):
        column = tokens if T == 1 and tokens.is_contiguous() else tokens[:, t].contiguous()
        before = state.__dict__.get("memory")  # in a name: it stays ours when another thread asks for the tensors
        if before is not None:
            where = _addresses(before, shape, shifts)
        else:
            before = state.wkv.float(), _rows(state.att_shift, dtype), _rows(state.ffn_shift, dtype)
            where = _addresses_of_tensors(*before)
        memory = Memory((shape, torch.float32), (shifts, dtype), (shifts, dtype))
        answer = Memory(((B, layout.vocab_size), dtype))
        new = (memory.address + offset for offset in memory.offsets)
        call = abi.Call(column.data_ptr(), B, *where, *new, answer.address, torch.get_num_threads())
        step(ctypes.byref(table.model), ctypes.byref(call))
        logits += answer.tensors()
        state = _fresh_state(memory, made_for, layout.version)
    if holds and not holds.result():
        _tables.pop(model, None)
        return None
    return logits[0].unsqueeze(1) if len(logits) == 1 else torch.stack(logits, 1), state


def _addresses(memory: Memory, shape: tuple[int, ...], shifts: tuple[int, ...]) -> tuple:
    """What `abi.Call` says about a state that a step has made: addresses, and strides of logical dimensions."""
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
