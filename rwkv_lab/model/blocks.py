"""One pass through all blocks in torch: what the compiled prefill gives too, and the only one with gradients."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rwkv_lab.model.state import RWKVState, maker


def run_blocks(
    model: Any, tokens: torch.Tensor, state: RWKVState
) -> tuple[torch.Tensor, RWKVState, torch.Tensor | None]:
    """tokens `[B,T]` -> x `[B,T,C]` before ln_out, the state after them, v_first `[B,T,A]` of RWKV-7."""
    x = model.blocks[0].ln0(model.emb(tokens))  # [B,T,C]
    v_first, att_shift, ffn_shift, wkv = None, [], [], []
    for layer, block in enumerate(model.blocks):
        given = (x, state.att_shift[:, layer], state.ffn_shift[:, layer], state.wkv[:, layer], v_first)
        if model.gradient_checkpointing and torch.is_grad_enabled():
            x, att, ffn, S, v_first = checkpoint(block, *given, use_reentrant=False)
        else:
            x, att, ffn, S, v_first = block(*given)
        att_shift.append(att)
        ffn_shift.append(ffn)
        wkv.append(S)
    # Under autocast norms come out in float32; a state has the model's dtype all the same.
    att_shift, ffn_shift = (torch.stack(z, 1).to(model.emb.weight.dtype) for z in (att_shift, ffn_shift))
    layout = model.layout
    parts = torch.stack(wkv, 1), att_shift, ffn_shift
    return x, RWKVState(*parts, layout.version, layout.vocab_size, maker(model)), v_first
