"""Linear layers whose weight is not trained, and may be stored in fewer bits."""

from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.arguments import Size, checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.peft.quantised import PackedWeight
from rwkv_lab.peft.settings import check_quant


class _TimesPacked(torch.autograd.Function):
    """x Wᵀ with a packed W, unpacked again for the backward pass instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        ctx.packed = packed
        return F.linear(x, packed.dense())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.packed.dense(gradient.dtype), None


class FrozenLinear(nn.Linear):
    """A Linear without bias whose weight is not trained, and may be packed. `weight` reads as the unpacked one then.

    `more_than_weight`: whether the layer's function is more than `weight`. Code that computes with weights directly, as
    a compiled path may, has to call the layer where it is True, and reads an unpacked copy where `packed` is not None.
    """

    more_than_weight = False
    packed: PackedWeight | None

    def __init__(
        self,
        in_features: Size,
        out_features: Size,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        self.packed = None

    @classmethod
    @checked
    def from_linear(cls, linear: nn.Linear, *args: Any, **kwargs: Any) -> Self:
        """The same layer as one of this class, which shares its weight.

        Raises:
            ParameterError: a layer with a bias, which no layer of RWKV has.
        """
        if linear.bias is not None:
            raise ParameterError(f"{linear} has a bias; layers of RWKV have none, and none is kept here.")
        new = cls(linear.in_features, linear.out_features, *args, device="meta", dtype=linear.weight.dtype, **kwargs)
        packed = getattr(linear, "packed", None)
        if packed is not None:
            new.packed = packed
            del new.weight
        else:
            new.weight = linear.weight
            new.weight.requires_grad_(False)
        new._make_adapter()
        return new.train(linear.training)

    def _make_adapter(self) -> None:
        """Called where the weight came after the layer: give what is added to it memory on the weight's device."""

    def pack(self, quant: str) -> None:
        """Store the weight as one of `QUANTS`; "none" leaves it.

        Raises:
            NumericsError: NaN or infinity in the weight.
            ParameterError: no such storage.
        """
        check_quant(quant)
        if quant != "none":
            self.packed = PackedWeight(self.weight, quant)
            del self.weight

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            packed = self.__dict__.get("_modules", {}).get("packed")
            if packed is not None:
                return packed.dense()
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        return F.linear(x, self.weight) if self.packed is None else _TimesPacked.apply(x, self.packed)


class NF4Linear(FrozenLinear):
    """A frozen Linear of 4.5 bits a weight; `NF4Linear.from_linear(layer)` makes one of an existing layer."""

    @checked
    def __init__(
        self,
        in_features: Size,
        out_features: Size,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, device, dtype)
        if self.weight.device.type != "meta":
            self.pack("nf4")

    def _make_adapter(self) -> None:
        if self.packed is None:
            self.pack("nf4")
