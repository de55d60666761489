"""A PiSSA adapter that is given as a LoRA: what B A is then is not a change of the base but a part of the base itself.

PiSSA starts from the largest singular values and vectors of W. So, with P the projection on the rows of A, B A is close
to W P: all that W does to the inputs which A sees. A LoRA's product is small beside W P, and points elsewhere.
"""

from statistics import median

import torch

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.errors import ParameterError
from rwkv_lab.peft.adapter import Adapter
from rwkv_lab.peft.kinds.lora import LoraTarget

_LOOKED_AT = 5  # matrices
_ALIKE = 0.85  # cosine of B A and W P: of PiSSA 0.99 and less by what training moved it, of a LoRA up to 0.3 or so
_FOUND = 0.2  # of ⟨B A, W⟩ / ‖B A‖², how far it may be from 1 in every matrix of a base that contains B A
_SIGMAS = 8  # of the cosine of unrelated matrices, 1 / sqrt(numel)


def notes_on_products(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Whether a LoRA's products stand in the base already. Reads a few matrices of both.

    Returns:
        A sentence where they seem to have been added once.
    Raises:
        ParameterError: they are the base's own largest parts, as PiSSA's are; says what to pass.
    """
    targets = {x: t for x, t in adapter.targets.items() if isinstance(t, LoraTarget) and f"{x}.weight" in base}
    if adapter.method != "lora" or not targets:
        return []
    names = list(targets)[:: max(len(targets) // _LOOKED_AT, 1)][:_LOOKED_AT]
    found = [_compared(targets[x], base.info[f"{x}.weight"]) for x in names]
    cosines = [cosine for cosine, _ in found]
    if median(cosines) > _ALIKE:
        near = sum(cosine > _ALIKE for cosine in cosines)
        raise ParameterError(
            f"{adapter.where} looks like PiSSA: in {near} of {len(found)} matrices B A is what the base does itself\n"
            f"(first {names[0]}, cosine up to {max(cosines):.2f}), and as a LoRA it would go in twice.\n"
            "Pass pissa_init= (what it started from), or method='lora' if it is a LoRA all the same."
        )
    if all(there for _, there in found):
        return [
            f"{adapter.where} seems to be in the base already, though its record does not say so: in {len(found)} of "
            f"{len(found)} matrices the base has B A once."
        ]
    return []


@torch.no_grad()
def _compared(target: LoraTarget, weight: TensorInfo) -> tuple[float, bool]:
    """(the cosine of W P and B A, 0 where their sizes are far apart; whether B A, scaled or not, is in W once), of as
    many rows as are read at a time."""
    columns = weight.shape[1]
    W = next(weight.blocks(multiple=columns)).view(-1, columns)[: max(BLOCK // columns, 1)].float()
    A, B = target.A.read().float(), target.B.read()[: len(W)].float()
    Q = torch.linalg.qr(A.T).Q  # [in, r]
    own, product = W @ Q, B @ (A @ Q)  # [out, r]
    size, whole = float(own.square().sum()), float(W.square().sum())
    length, along = float(product.square().sum()), float((own * product).sum())
    if not (0 < size < float("inf") and 0 < length < float("inf")):
        return 0.0, False
    alike = along / (size * length) ** 0.5 if 0.01 < length / size < 100 else 0.0
    sure = along > _SIGMAS * (length * whole / W.numel()) ** 0.5
    return alike, sure and any(abs(along / length - scale) < _FOUND * abs(scale) for scale in (1.0, target.scaling))
