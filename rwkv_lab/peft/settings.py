"""What the settings of adapters may be: ranks, dropout, scales, variants, and how frozen matrices are stored.

The layers and what they compute are beside it; nothing here needs torch, so that settings are refused before it is
there.
"""

import math

from rwkv_lab.errors import ParameterError
from rwkv_lab.text import counted

QUANTS = ("none", "int8", "nf4", "fp4", "bnb-int8")
BITS = {"int8": 8.0, "nf4": 4 + 32 / 64, "fp4": 4 + 32 / 64, "bnb-int8": 8.0}  # per value, with the scales of blocks
WHOLE_MATRIX = ("bnb-int8",)  # one scale for all rows
VARIANTS = ("default", "mini", "bat-hf", "bat-rwkv-peft")


def check_quant(quant: str) -> None:
    """Raises:
    ParameterError: no such storage.
    """
    if quant not in QUANTS:
        raise ParameterError(f"There is no quant {quant!r}; there are: {', '.join(QUANTS)}.")


def check_rank(r: int, in_features: int, out_features: int) -> None:
    """Raises:
    ParameterError: a rank that is no positive whole number, or larger than the layer.
    """
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ParameterError(f"rank {r!r}: it must be a whole number of at least 1.")
    if r > min(in_features, out_features):
        raise ParameterError(
            f"rank {r} is larger than the layer, {out_features} x {in_features}: at most "
            f"{min(in_features, out_features)} makes sense here."
        )


def check_dropout(p: float) -> None:
    """Raises:
    ParameterError: not a share from 0 to below 1.
    """
    if not isinstance(p, int | float) or isinstance(p, bool) or not 0 <= p < 1:
        raise ParameterError(f"dropout {p!r}: it must be from 0 to below 1.")


def lora_scaling(alpha: float, r: int, use_rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732).

    Raises:
        ParameterError: an alpha that is not a positive number.
    """
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ParameterError(f"alpha={alpha!r}: it must be a positive number.")
    return alpha / math.sqrt(r) if use_rslora else alpha / r


def check_variant(variant: str) -> None:
    """Raises:
    ParameterError: no such variant, or "bat", which is two of them.
    """
    if variant == "bat":
        raise ParameterError(
            'miss_variant="bat" has two meanings: "bat-hf" (Hugging Face peft, one block per output tile) and\n'
            '"bat-rwkv-peft" (RWKV-PEFT, one block per input tile). Pass one of them.'
        )
    if variant not in VARIANTS:
        raise ParameterError(f"There is no MiSS variant {variant!r}; there are: {', '.join(VARIANTS)}.")


def block_shape(variant: str, r: int, in_features: int, out_features: int, mini_r: int = 1) -> tuple[int, ...]:
    """Shape of the block for a weight `[out_features, in_features]`.

    Raises:
        ParameterError: a rank that does not fit this layer.
    """
    check_variant(variant)
    if variant == "default":
        return (r, out_features)
    if variant == "mini":
        if mini_r < 1 or out_features % mini_r:
            raise ParameterError(f"mini_r={mini_r} does not divide the {counted(out_features, 'output')} of the layer.")
        return (r, mini_r)
    if in_features % r or out_features % r:
        raise ParameterError(
            f"rank {r} does not divide a layer of {out_features} x {in_features}; {variant} needs whole tiles."
        )
    return (out_features // r if variant == "bat-hf" else in_features // r, r, r)
