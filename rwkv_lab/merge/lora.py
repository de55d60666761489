"""Method "lora": W + alpha/r · B A, in the layout of RWKV-LM-LoRA and RWKV-PEFT.

Keys: `X.lora_A [r, in]` and `X.lora_B [out, r]` for the base's `X.weight [out, in]`; any other tensor in the file
(`ln*`, `time_*`) is whole, and takes the place of the base's. The file does not say alpha. A PiSSA adapter has the same
keys, and is not a LoRA: its base is what the decomposition left over.
"""

import re
from collections.abc import Iterator

import torch

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo
from rwkv_lab.errors import LayoutError
from rwkv_lab.merge.change import Change
from rwkv_lab.merge.overlay import full_tensors, refuse_prefix, same_dimensions


def changes(
    base: Checkpoint,
    tuned: Checkpoint,
    layout: Layout,
    alpha: float,
    precision: torch.dtype,
    allow_extra: list[str],
) -> list[Change]:
    """One change per adapted matrix, and one per whole tensor.

    Args:
        alpha: the LoRA's; its delta is scaled by alpha / r.
    Raises:
        LayoutError: halves without their other half, ranks or shapes that do not fit, or names the base does not have.
    """
    if any(re.search(r"\.lora_[AB]\..*weight$", n) for n in tuned.info):
        raise LayoutError(
            f"{tuned.path} is an adapter in Hugging Face's layout; this method reads X.lora_A and X.lora_B"
        )
    adapted: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for name, info in tuned.info.items():
        if name.endswith((".lora_A", ".lora_B")):
            adapted.setdefault(name[: -len(".lora_A")], {})[name[-1]] = info
        else:
            whole[name] = info
    if not adapted:
        raise LayoutError(f"{tuned.path} has no tensor named *.lora_A; it is of kind {tuned.kind!r}")
    unmatched = [f"{x}.lora_{h}" for x, halves in adapted.items() if f"{x}.weight" not in base.info for h in halves]
    halves = {n: t for n, t in tuned.info.items() if n not in whole}
    refuse_prefix(unmatched, halves, base)
    same_dimensions(tuned, layout)
    if unmatched:
        raise LayoutError(
            f"{len(unmatched)} of {len(halves)} LoRA tensors have no matrix in the base: {', '.join(unmatched[:10])}.\n"
            f"The base is RWKV-{layout.version} with {layout.n_layer} layers; the adapter is of another model."
        )
    both = next((x for x in adapted if f"{x}.weight" in whole), None)
    if both is not None:
        raise LayoutError(f"{both}.weight stands in {tuned.path} whole and as a LoRA; only one of them can be meant")
    out = [_adapted(x, base.info[f"{x}.weight"], halves, alpha, precision) for x, halves in adapted.items()]
    # Whole tensors are the tuned values themselves: alpha says nothing about them.
    return out + full_tensors(base, tuned, layout, whole, 1.0, precision, allow_extra)


def _adapted(x: str, weight: TensorInfo, halves: dict[str, TensorInfo], alpha: float, precision: torch.dtype) -> Change:
    for here, missing in ("AB", "BA"):
        if missing not in halves:
            raise LayoutError(f"{x}.lora_{here} is there, {x}.lora_{missing} is not; the adapter is incomplete")
    a, b = halves["A"], halves["B"]
    if len(weight.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
        raise LayoutError(
            f"{x}: weight {list(weight.shape)}, lora_A {list(a.shape)}, lora_B {list(b.shape)}: matrices needed"
        )
    rank = a.shape[0]
    if rank == 0 or b.shape[1] != rank or a.shape[1] != weight.shape[1] or b.shape[0] != weight.shape[0]:
        raise LayoutError(
            f"{x}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit the weight {list(weight.shape)}; "
            "[r, in] and [out, r] with r of at least 1 are needed"
        )

    def compute() -> Iterator[torch.Tensor]:
        down, up = a.read().to(precision), b.read().to(precision)  # [r, in], [out, r]
        row = 0
        for block in weight.blocks(multiple=weight.shape[1]):
            values = block.to(precision).view(-1, weight.shape[1])  # [rows, in]
            values.addmm_(up[row : row + len(values)], down, alpha=alpha / rank)
            row += len(values)
            yield values.flatten()

    return Change(f"{x}.weight", "lora", "base + tuned", weight.shape, weight.dtype, compute=compute)
