"""MiSS (arXiv 2409.15371), called Bone and DiSHA before: one small block of numbers, repeated over the whole weight.

With rank r, a weight `[out, in]` and i, o counting inputs and outputs, the variants are
* "default", block D `[r, out]`: W[o, i] + D[i mod r, o].
* "mini", block D `[r, mini_r]`: W[o, i] + D[i mod r, o mod mini_r].
* "bat-hf", block D `[out/r, r, r]`: the tile W[a, b] of r x r becomes W[a, b] + W[a, b] D[a] + D[a]. Hugging Face's
  peft calls this "bat".
* "bat-rwkv-peft", block D `[in/r, r, r]`: the same with D[b]. RWKV-PEFT calls this "bat".
The two bats are different functions, and nothing in a block tells them apart where in = out.
"""

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.arguments import Size, checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.peft.linear import AdaptedLinear
from rwkv_lab.peft.settings import block_shape, check_dropout, check_rank


def bat_change(weight: torch.Tensor, block: torch.Tensor, variant: str) -> torch.Tensor:
    """What a bat adds to `weight` `[out, in]`: W[a, b] D + D per tile, `[out, in]`. Both in one dtype."""
    r = block.shape[-1]
    tiles = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # [out/r, in/r, r, r]
    D = block[:, None] if variant == "bat-hf" else block[None]
    return (tiles @ D + D).transpose(1, 2).flatten(2, 3).flatten(0, 1)


class MissLinear(AdaptedLinear):
    """A frozen weight and a MiSS block, zeros to begin with: the layer starts as W x, bit for bit.

    Args:
        variant: "default", "mini", "bat-hf" or "bat-rwkv-peft", as above.
        mini_r: columns of the block in "mini".
        lora_dropout: share of x that the block does not see in training; not for the bats, whose change is in W.
        adapter_dtype: of the block; None for the weight's.

    Attributes:
        miss_block: the trained numbers.

    Raises:
        ParameterError: a rank that does not fit the layer, no such variant, or numbers out of range.
    """

    adapter_names = ("miss_block",)

    @checked
    def __init__(
        self,
        in_features: Size,
        out_features: Size,
        r: int = 8,
        variant: str = "default",
        mini_r: int = 1,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_rank(r, in_features, in_features)
        check_dropout(lora_dropout)
        shape = block_shape(variant, r, in_features, out_features, mini_r)
        if variant.startswith("bat") and lora_dropout:
            raise ParameterError(f"{variant} changes the weight itself; there is nothing to drop out. Pass dropout 0.")
        super().__init__(in_features, out_features, device, dtype)
        self.r, self.variant, self.lora_dropout, self.block_shape = r, variant, lora_dropout, shape
        self.adapter_dtype = adapter_dtype or self.weight.dtype
        self._make_adapter()

    def _make_adapter(self) -> None:
        self.miss_block = nn.Parameter(torch.zeros(self.block_shape, dtype=self.adapter_dtype, device=self._device()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        if self.variant.startswith("bat"):
            weight = self.weight
            common = torch.promote_types(weight.dtype, self.miss_block.dtype)
            change = bat_change(weight.to(common), self.miss_block.to(common), self.variant)
            return F.linear(x, (weight + change).to(weight.dtype))
        y = super().forward(x)
        seen = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        seen = F.pad(seen.to(self.miss_block.dtype), (0, -self.in_features % self.r))
        folded = seen.unflatten(-1, (-1, self.r)).sum(-2)  # [..., r]
        return (y + folded @ self._columns()).to(y.dtype)

    def merged_weight(self) -> torch.Tensor:
        weight = self._base()
        if self.variant.startswith("bat"):
            return weight + bat_change(weight, self.miss_block.detach().to(weight.dtype), self.variant)
        rows = torch.arange(self.in_features, device=weight.device) % self.r
        return weight + self._columns().detach().to(weight.dtype)[rows].T

    def _columns(self) -> torch.Tensor:
        """The block as `[r, out]`."""
        return self.miss_block.repeat(1, self.out_features // self.miss_block.shape[1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, variant={self.variant}"
