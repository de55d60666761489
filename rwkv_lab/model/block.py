"""What all generations share: the block around time mix and channel mix, the token shift, the norm over heads.

Parameters carry the names and shapes of BlinkDL's checkpoints, so that a state dict is a checkpoint: matrices of Linear
layers lie as [out,in], low-rank pairs as [in,rank] and [rank,out], vectors as [1,1,C]. In all files of this folder
C = n_embd, A = dim_att, N = head_size, H = A/N, F = dim_ffn, L = n_layer, V = vocab_size.
"""

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.checkpoint import Layout
from rwkv_lab.model.capture import Capturable
from rwkv_lab.model.standard_modules import standard

GROUP_NORM_EPS = 64e-5  # of `att.ln_x` from RWKV-5 on: (1e-5)·8², whatever the head size
RESCALE_EVERY = 6  # layers


@standard
class Block(Capturable):
    """`blocks.i`: time mix and channel mix, each behind a LayerNorm and added to what came in.

    With float16 weights, RWKV-4 to 6 would overflow in deep layers. There x is halved after every sixth layer, and what
    a layer adds is divided by what x has been divided by so far; `ln_out` takes the scale out again. ChatRWKV does the
    same by changing the weights; here they stay as they are. RWKV-7 does not need it.
    """

    def __init__(self, layout: Layout, layer: int, att: nn.Module, ffn: nn.Module, halves_float16: bool):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(layout.n_embd)  # applied to the embedding
        self.ln1 = nn.LayerNorm(layout.n_embd)
        self.ln2 = nn.LayerNorm(layout.n_embd)
        self.att = att
        self.ffn = ffn
        self.halves = halves_float16 and halves_after(layer)

    def forward(
        self,
        x: torch.Tensor,
        att_shift: torch.Tensor,
        ffn_shift: torch.Tensor,
        wkv_state: torch.Tensor,
        v_first: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x `[B,T,C]`, shifts `[B,C]`, wkv_state `[B,H,V,K]` (RWKV-4: `[B,3,A]`), v_first `[B,T,A]` or None.

        Returns x, the three states after the last token, and v_first, which RWKV-7's first layer makes.
        """
        if self.receivers:
            self.show(x=x)
        x_att = self.ln1(x)
        y, wkv_state, v_first = self.att(x_att, att_shift, wkv_state, v_first)
        x = x + y
        x_ffn = self.ln2(x)
        x = x + self.ffn(x_ffn, ffn_shift)
        if self.halves and self.ln1.weight.dtype == torch.float16:
            x = x / 2
        return x, x_att[:, -1], x_ffn[:, -1], wkv_state, v_first


def halves_after(layer: int) -> bool:
    """Whether x is halved behind this layer, where a generation does so."""
    return layer % RESCALE_EVERY == RESCALE_EVERY - 1


def into_residual(linear: nn.Module, x: torch.Tensor, layer: int) -> torch.Tensor:
    """`linear(x)` for the last matrix of a time mix or channel mix, scaled as `Block` says where it is float16.

    x is scaled, not the product: the product is what might not fit into float16.
    """
    if linear.weight.dtype == torch.float16:
        x = x * 0.5 ** (layer // RESCALE_EVERY)
    return linear(x)


def vector(size: int) -> nn.Parameter:
    """A parameter `[1,1,size]`, without values yet."""
    return nn.Parameter(torch.empty(1, 1, size))


def matrix(*shape: int) -> nn.Parameter:
    """A parameter of that shape, without values yet."""
    return nn.Parameter(torch.empty(shape))


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A matrix `[n_out,n_in]`; RWKV has no biases."""
    return nn.Linear(n_in, n_out, bias=False)


def previous(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x of the token before, `[B,T,C]`; `shift` `[B,C]` is the one before the first."""
    return torch.cat([shift.unsqueeze(1), x[:, :-1]], dim=1)


def head_norm(y: torch.Tensor, ln_x: nn.GroupNorm) -> torch.Tensor:
    """GroupNorm over the heads of y `[B,T,H,N]` -> `[B,T,A]`; as a LayerNorm over the last axis it is much faster on a
    CPU."""
    y = F.layer_norm(y, y.shape[-1:], eps=ln_x.eps).flatten(2)
    return torch.addcmul(ln_x.bias, y, ln_x.weight)
