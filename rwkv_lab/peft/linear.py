"""Linear layers with a frozen weight and a small trained part: LoRA (arXiv 2106.09685) and PiSSA (arXiv 2404.02948)."""

import math
from abc import abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.arguments import Size, checked
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.peft.frozen_linear import FrozenLinear
from rwkv_lab.peft.settings import check_dropout, check_rank, lora_scaling


class AdaptedLinear(FrozenLinear):
    """A frozen weight and the parameters in `adapter_names`, which change what the layer does."""

    more_than_weight = True
    adapter_names: tuple[str, ...] = ()

    def _device(self) -> torch.device:
        """Of the weight, packed or not."""
        return self.weight.device if self.packed is None else self.packed.codes.device

    def adapter(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: getattr(self, name) for name in self.adapter_names}

    @abstractmethod
    def merged_weight(self) -> torch.Tensor:
        """The one matrix `[out, in]` that does what this layer does without dropout: float32, float64 for float64."""

    def _base(self) -> torch.Tensor:
        """The frozen weight in the dtype that merging computes in."""
        weight = self.weight.detach()
        return weight if weight.dtype == torch.float64 else weight.float()


class LoraLinear(AdaptedLinear):
    """y = W x + scaling · B A dropout(x), with W frozen.

    Args:
        r: rank.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: share of x that the adapter does not see in training.
        adapter_dtype: of A and B; None for the weight's. What they add is rounded with W x, once.

    Attributes:
        lora_A: `[r, in]`, drawn from torch's generator.
        lora_B: `[out, r]`, zeros: the layer starts as W x, bit for bit.

    Raises:
        ParameterError: a rank larger than the layer, or numbers out of range.
    """

    adapter_names = ("lora_A", "lora_B")

    @checked
    def __init__(
        self,
        in_features: Size,
        out_features: Size,
        r: int = 8,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_rank(r, in_features, out_features)
        check_dropout(lora_dropout)
        scaling = lora_scaling(lora_alpha, r, use_rslora)
        super().__init__(in_features, out_features, device, dtype)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling, self.lora_dropout = scaling, lora_dropout
        self.adapter_dtype = adapter_dtype or self.weight.dtype
        self._make_adapter()

    def _make_adapter(self) -> None:
        device, dtype = self._device(), self.adapter_dtype
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.r, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        y = super().forward(x)
        seen = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        change = F.linear(F.linear(seen.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling
        return (y + change).to(y.dtype)

    def merged_weight(self) -> torch.Tensor:
        weight = self._base()
        return weight + self.scaling * (self.lora_B.detach().to(weight.dtype) @ self.lora_A.detach().to(weight.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"


class PissaLinear(LoraLinear):
    """LoRA that starts from the weight's own principal part: y = (W - scaling · B₀A₀) x + scaling · B A x.

    A and B start as A₀ and B₀; `start` takes them from the SVD, `start_from` from a file. The frozen `weight` is what
    is left over, rounded once: so far is W kept. There is no dropout: it would take away parts of the model.

    Attributes:
        init_lora_A, init_lora_B: A₀ and B₀, in the adapter's dtype; None before the start. Only with them can A and B
            be merged into the original model.
    """

    @checked
    def __init__(
        self,
        in_features: Size,
        out_features: Size,
        r: int = 8,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        # RWKV-PEFT knows no alpha for PiSSA: its scaling is 1.
        alpha = r if lora_alpha is None else lora_alpha
        super().__init__(in_features, out_features, r, alpha, 0.0, use_rslora, adapter_dtype, device, dtype)

    def _make_adapter(self) -> None:
        super()._make_adapter()
        self.init_lora_A: torch.Tensor | None
        self.init_lora_B: torch.Tensor | None
        self.register_buffer("init_lora_A", None, persistent=False)
        self.register_buffer("init_lora_B", None, persistent=False)

    @torch.no_grad()
    def start(self, niter: int | None) -> None:
        """Decompose the weight, and leave in it what A and B do not hold.

        Args:
            niter: power iterations of the randomised SVD, which draws from torch's generator; None for the exact one.

        Raises:
            NumericsError: NaN or infinity in the weight or in its SVD.
            ParameterError: a weight that is packed already.
        """
        down, up = principal_part(self.weight, self.r, niter)
        scale = math.sqrt(self.scaling)
        self.start_from(down / scale, up / scale)

    @torch.no_grad()
    def start_from(self, init_A: torch.Tensor, init_B: torch.Tensor) -> None:
        """Take A₀ `[r, in]` and B₀ `[out, r]` out of the weight, and A and B from there.

        Raises:
            ParameterError: a weight that is packed already: what is left over is to be packed, not what was there.
        """
        if self.packed is not None:
            raise ParameterError("PiSSA takes the weight apart before it is quantised; load the model anew.")
        self.lora_A.copy_(init_A)
        self.lora_B.copy_(init_B)
        A, B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        self.init_lora_A, self.init_lora_B = A, B
        # In the adapter's own rounded values, so that weight + scaling · B A is W again.
        base = self._base()
        rest = base - self.scaling * (B.to(base.dtype) @ A.to(base.dtype))
        self.weight = nn.Parameter(rest.to(self.weight.dtype), requires_grad=False)


def principal_part(weight: torch.Tensor, r: int, niter: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, in], B [out, r]) with B A the best approximation of `weight` of that rank: U √S and √S Vᵀ, in float32, or
    float64 for float64.

    Args:
        niter: power iterations of the randomised SVD (arXiv 0909.4061), which is near the best; None for the exact one.

    Raises:
        NumericsError: NaN or infinity in the weight, or an SVD that does not converge.
    """
    values = weight.detach()
    values = values if values.dtype == torch.float64 else values.float()
    if not values.isfinite().all():
        raise NumericsError("The weight holds NaN or infinity; it has no singular value decomposition.")
    try:
        if niter is None:
            U, S, Vh = torch.linalg.svd(values, full_matrices=False)
            U, S, Vh = U[:, :r], S[:r], Vh[:r]
        else:
            U, S, V = torch.svd_lowrank(values, q=r, niter=niter)
            Vh = V.T
    except torch.linalg.LinAlgError as e:  # pyright: ignore[reportPrivateImportUsage]  # documented, not listed
        raise NumericsError(f"The singular value decomposition of a weight {list(weight.shape)} failed: {e}") from e
    root = S.sqrt()
    if not all(part.isfinite().all() for part in (U, root, Vh)):
        raise NumericsError(f"The singular value decomposition of a weight {list(weight.shape)} gave NaN or infinity.")
    return root[:, None] * Vh, U * root
