"""One token through a whole model as one compiled call: `kernels/cpu/step.cpp`, with weights used where they lie."""

import ctypes
from typing import Any

import torch
from torch import nn

from rwkv_lab.model.block import RESCALE_EVERY
from rwkv_lab.model.cpu import abi
from rwkv_lab.model.cpu.buffer_pool import Memory
from rwkv_lab.model.cpu.eligibility import Eligibility, Permit, forget
from rwkv_lab.model.cpu.lazy_state import lazy_state, memory_of
from rwkv_lab.model.cpu.model_faults import PACKED
from rwkv_lab.model.registry import compiled_form, generation_of
from rwkv_lab.model.state import RWKVState, check_state, maker, state_shapes
from rwkv_lab.wkv.pointers import check, strided_span

_ABSENT = abi.Tensor(None, None, 0, 0, 0, 1, 0, 0)


class Table:
    """A model as the step reads it. Nothing is computed from the weights, so values may change in place at any time."""

    def __init__(self, model: Any, found: Eligibility):
        layout, form, self._span_of = found.layout, compiled_form(found.layout), found.span_of
        self.vocab_size, self.dtype = layout.vocab_size, model.ln_out.weight.dtype
        rows = [row for m in (model.emb, model.blocks[0].ln0, model.ln_out, model.head) for row in self._of_module(m)]
        for layer, block in enumerate(model.blocks):
            for name in form.slots.values():
                unused = layer == 0 and name in form.unused_in_first_layer
                rows += [_ABSENT] if unused else self._of_slot(block, name, name in form.transposed)
        self.rows = (abi.Tensor * len(rows))(*rows)
        rescale = self.dtype == torch.float16 and generation_of(layout).halves_float16
        norm_eps, head_norm_eps = found.norm_eps() or (0.0, 0.0)
        self.model = abi.Model(
            ctypes.addressof(self.rows),
            *(abi.DTYPES[self.dtype], layout.n_layer, layout.n_embd, layout.dim_att, layout.dim_ffn),
            *(layout.vocab_size, layout.n_head, layout.head_size, norm_eps, head_norm_eps),
            *(form.number, RESCALE_EVERY if rescale else 0, len(rows)),
        )
        del self._span_of  # which holds this table
        self.state, self.shift = state_shapes(layout)["wkv"], (layout.n_layer, layout.n_embd)

    def _of_slot(self, block, name: str, transposed: bool) -> list[abi.Tensor]:
        owner, _, last = name.rpartition(".")
        found = getattr(getattr(block, owner) if owner else block, last, None)
        if found is None:
            return [_ABSENT]
        return self._of_module(found) if isinstance(found, nn.Module) else [self._of_parameter(found, transposed)]

    def _of_module(self, module) -> list[abi.Tensor]:
        if type(module) in PACKED:
            codes, scales, *zeros = (self._span_of(part) for part in module.buffers_of_parts())
            sizes = (abi.QUANTISED[module.kind], module.rows, module.columns, 0, codes.bytes, scales.bytes)
            return [abi.Tensor(codes.data, scales.data, *sizes, *((zeros[0].data, zeros[0].bytes) if zeros else ()))]
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            return [self._of_parameter(module.weight), self._of_parameter(module.bias)]
        return [self._of_parameter(module.weight)]

    def _of_parameter(self, x, transposed: bool = False) -> abi.Tensor:
        rows, columns = (x.shape[:-1].numel(), x.shape[-1]) if transposed or x.ndim == 2 else (1, x.numel())
        memory = self._span_of(x)
        return abi.Tensor(memory.data, None, abi.DTYPES[x.dtype], rows, columns, int(transposed), memory.bytes, 0)


def run(model: Any, permit: Permit, tokens: torch.Tensor, given: RWKVState | None) -> tuple[torch.Tensor, RWKVState]:
    """Take tokens `[B,T]` through an eligible model one by one: logits `[B,T,V]`, and the new state.

    Raises:
        ParameterError: a state that does not fit.
    """
    found = permit.found  # the permit itself holds the weights' memory until this returns
    if found.table is None:
        found.table = Table(model, found)
    table: Table = found.table
    layout, dtype, (B, T) = found.layout, table.dtype, tokens.shape
    made_for, wkv_shape, shift_shape = (layout, B, dtype, maker(model)), (B, *table.state), (B, *table.shift)
    step, threads, logits = found.step, torch.get_num_threads(), []
    fits = found.compare_meanwhile(model)
    state: RWKVState = model.create_state(B) if given is None else given
    for column in zip(*tokens.tolist(), strict=True):
        before = memory_of(state, made_for)
        if before is not None:
            where, sizes = _places(before, wkv_shape, shift_shape), before.sizes
        else:
            check_state(state, model, B)
            wkv = state.wkv.float() if len(wkv_shape) == 5 else _rows(state.wkv, torch.float32)
            before = wkv, _rows(state.att_shift, dtype), _rows(state.ffn_shift, dtype)
            where, sizes = _places_of_tensors(before, wkv_shape, shift_shape, dtype)
        after = Memory((wkv_shape, torch.float32), (shift_shape, dtype), (shift_shape, dtype))
        answer = Memory(((B, 1, table.vocab_size), dtype))
        new = (after.address + offset for offset in after.offsets)
        ids = (abi.INT64 * B)(*column)
        sizes = (ctypes.sizeof(ids), *sizes, *after.sizes, *answer.sizes)
        call = abi.Call(ctypes.addressof(ids), B, *where, *new, answer.address + answer.offsets[0], threads, *sizes)
        check(step(ctypes.byref(table.model), ctypes.byref(call)), "The step")
        logits += answer.tensors()
        state = lazy_state(after, made_for)
    if fits and not fits.result():
        forget(model)
        return model.forward(tokens, given)
    return logits[0] if T == 1 else torch.cat(logits, 1), state


def _places(memory: Memory, wkv_shape: tuple[int, ...], shift_shape: tuple[int, ...]) -> tuple:
    """What `abi.Call` has of a state that a step has made: addresses, and strides of logical dimensions."""
    wkv, att, ffn = (memory.address + offset for offset in memory.offsets)
    if len(wkv_shape) == 5:
        _, L, H, N, _ = wkv_shape
        strides = (L * H * N * N, H * N * N, N * N, 1, N)
    else:
        _, L, parts, A = wkv_shape
        strides = (L * parts * A, parts * A, A, 1, 0)
    rows = (shift_shape[1] * shift_shape[2], shift_shape[2])
    return wkv, strides, att, ffn, rows, rows


def _places_of_tensors(
    parts, wkv_shape: tuple[int, ...], shift_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple, list[int]]:
    """The same of any state, and the bytes behind its parts."""
    wkv, att, ffn = parts
    strides = wkv.stride() if wkv.ndim == 5 else (*wkv.stride(), 0)
    memory = strided_span(wkv, wkv_shape, torch.float32), *(strided_span(x, shift_shape, dtype) for x in (att, ffn))
    addresses = [one.data for one in memory]
    where = (addresses[0], strides, *addresses[1:], att.stride()[:2], ffn.stride()[:2])
    return where, [one.bytes for one in memory]


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A shift, or RWKV-4's sums, whose numbers lie side by side, in a dtype."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()
